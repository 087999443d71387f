"""Splits of one data set over sites: complete, repeatable, and distributed as the papers say."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean, pvariance

import pytest

from fedcore.errors import ConfigError
from fedcore.files.partition import Partition, by_length, by_source, dirichlet, iid, plot

Command = Callable[..., subprocess.CompletedProcess[str]]

LABELS = [place % 5 for place in range(500)]


def chi_square(counts: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in counts)


def splits(seed: int) -> dict[str, Partition]:
    return {
        "iid": iid(500, 7, seed=seed),
        "unbalanced": dirichlet(LABELS, 7, alpha=0.5, seed=seed),
        "balanced": dirichlet(LABELS, 7, alpha=0.5, balanced=True, seed=seed),
        "source": by_source([place % 13 for place in range(500)], 7, seed=seed),
        "length": by_length([place % 10 for place in range(500)], 7, seed=seed),
    }


def test_every_example_is_at_exactly_one_site() -> None:
    for seed in range(5):
        for split in splits(seed).values():
            assert sorted(index for site in split.sites for index in site) == list(range(500))
            assert all(list(site) == sorted(site) for site in split.sites)


def test_a_split_depends_on_the_seed_and_on_nothing_else() -> None:
    assert splits(3) == splits(3)
    other = splits(4)
    assert all(split != other[name] for name, split in splits(3).items())
    assert iid(10, 3, seed=0).sites == ((2, 4, 7, 9), (1, 5, 8), (0, 3, 6))
    assert dirichlet([0, 1] * 10, 3, alpha=1.0, seed=0).sizes == [4, 14, 2]


def test_iid_puts_any_example_at_any_site_with_the_same_chance() -> None:
    where = Counter(
        (index, site)
        for seed in range(1500)
        for site, held in enumerate(iid(6, 3, seed=seed).sites)
        for index in held
    )
    for index in range(6):  # 2 degrees of freedom: 13.8 at one in a thousand
        assert chi_square([where[index, site] for site in range(3)], 500) < 13.8


def test_iid_draws_every_split_with_the_same_chance() -> None:
    seen = Counter(iid(4, 2, seed=seed).sites for seed in range(3000))
    assert len(seen) == 6
    assert chi_square(list(seen.values()), 500) < 20.5  # 5 degrees of freedom


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 10.0])
def test_shares_of_a_label_have_the_moments_of_the_dirichlet_distribution(alpha: float) -> None:
    sites, each = 4, 250
    labels = [place % 4 for place in range(4 * each)]
    shares = [
        count.get(label, 0) / each
        for seed in range(150)
        for count in dirichlet(labels, sites, alpha=alpha, min_size=0, seed=seed).counts(labels)[:1]
        for label in range(4)
    ]
    expected = (1 / sites) * (1 - 1 / sites) / (sites * alpha + 1)
    assert abs(mean(shares) - 1 / sites) < 3.5 * math.sqrt(expected / len(shares))
    assert pvariance(shares) == pytest.approx(expected, rel=0.2)


def test_a_balanced_split_is_the_more_even_the_greater_alpha() -> None:
    def spread(alpha: float) -> float:
        found = []
        for seed in range(20):
            split = dirichlet(LABELS, 5, alpha=alpha, balanced=True, seed=seed)
            assert split.sizes == [100] * 5
            found += [
                pvariance([c.get(k, 0) / 100 for k in range(5)]) for c in split.counts(LABELS)
            ]
        return mean(found)

    spreads = [spread(alpha) for alpha in (0.1, 1.0, 10.0, 1e6)]
    assert spreads == sorted(spreads, reverse=True)
    # Drawn without replacement from 5 labels of 100: hypergeometric, 100 x 0.2 x 0.8 x 400/499 per label.
    assert spreads[-1] == pytest.approx(0.2 * 0.8 / 100 * 400 / 499, rel=0.25)


def test_a_balanced_split_keeps_the_labels_shares_on_average() -> None:
    labels = ["a"] * 300 + ["b"] * 100
    first = [
        dirichlet(labels, 4, alpha=1.0, balanced=True, seed=seed).counts(labels)[0].get("a", 0)
        for seed in range(300)
    ]
    last = [
        dirichlet(labels, 4, alpha=1.0, balanced=True, seed=seed).counts(labels)[3].get("a", 0)
        for seed in range(300)
    ]
    for counts in (first, last):
        assert abs(mean(counts) - 75) < 3.5 * math.sqrt(pvariance(counts) / 300)


def test_no_site_is_smaller_than_the_minimum() -> None:
    for seed in range(20):
        assert min(dirichlet(LABELS, 5, alpha=0.2, min_size=40, seed=seed).sizes) >= 40
    with pytest.raises(ConfigError, match="at least 99 examples at each of 5 sites; raise alpha"):
        dirichlet([place % 2 for place in range(500)], 5, alpha=0.001, min_size=99)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: iid(3, 4), "3 examples are too few for 4 sites"),
        (lambda: iid(3, 0), "sites 0: expected at least 1"),
        (lambda: iid(3, 2, seed=-1), "seed -1"),
        (lambda: dirichlet(LABELS, 2, alpha=0), "alpha 0"),
        (lambda: dirichlet(LABELS, 2, alpha=math.nan), "alpha nan"),
        (lambda: dirichlet(LABELS, 2, alpha=1, min_size=251), "500 examples are too few"),
        (lambda: by_source(["a", "b"], 3), "2 examples are too few"),
        (lambda: by_source(["a", "b", "b"], 3), "3 sites, but only 2 sources"),
    ],
)
def test_a_split_that_is_not_possible_says_why(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        call()


def test_a_source_stays_together_and_sites_are_filled_evenly() -> None:
    sizes = zip("abcdefg", (90, 50, 40, 40, 30, 20, 10), strict=True)
    sources = [name for name, size in sizes for _ in range(size)]
    split = by_source(sources, 3)
    homes = [set(count) for count in split.counts(sources)]
    assert sum(map(len, homes)) == 7
    assert max(split.sizes) - min(split.sizes) <= 10
    assert by_source(["x", "y", "x"]).sites == ((0, 2), (1,))


def test_lengths_rise_from_site_to_site_and_ties_are_shuffled() -> None:
    lengths = [5, 1, 3, 3, 3, 3, 9, 2]
    split = by_length(lengths, 4)
    held = [[lengths[index] for index in site] for site in split.sites]
    assert sorted(map(sorted, held)) == [[1, 2], [3, 3], [3, 3], [5, 9]]
    assert len({by_length(lengths, 4, seed=seed).sites for seed in range(20)}) > 3


def test_a_plot_is_drawn_without_a_display_and_nothing_heavy_is_imported_before(
    tmp_path: Path,
) -> None:
    program = (
        "import sys, fedcore.files.partition; print({'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
    plot(dirichlet(LABELS, 4, alpha=0.5), LABELS, tmp_path / "who.png")
    assert (tmp_path / "who.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_copies_each_line_of_a_jsonl_file_to_one_site(
    tmp_path: Path, fedcore: Command
) -> None:
    lines = [f'{{"text": "é{i}",  "label": {i % 3}}}' for i in range(60)]
    source = tmp_path / "all.jsonl"
    source.write_text("\n".join(lines[:30]) + "\n\n" + "\n".join(lines[30:]), encoding="utf-8")
    options = ["--by", "label", "--alpha", "0.5", "--sites", "4", "--out", tmp_path / "sites"]
    done = fedcore("partition", source, *options)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / f"sites/site-{place}.jsonl" for place in (1, 2, 3, 4)]
    held = [path.read_text(encoding="utf-8").splitlines() for path in files]
    assert sorted(line for part in held for line in part) == sorted(lines)
    expected = dirichlet([i % 3 for i in range(60)], 4, alpha=0.5)
    assert held == [[lines[index] for index in site] for site in expected.sites]
    about = json.loads((tmp_path / "sites/partition.json").read_text())
    assert sum(sum(site["counts"].values()) for site in about["sites"].values()) == 60
    assert f"site-1.jsonl: {len(held[0])} rows (" in done.stdout
    again = fedcore("partition", source, *options)
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_the_command_splits_a_csv_file_with_its_header(tmp_path: Path, fedcore: Command) -> None:
    source = tmp_path / "all.csv"
    rows = [["note", "hospital"], ["a,\nb", "n"], ['"q"', "s"], ["c", "n"]]
    with source.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    done = fedcore(
        "partition", source, "--by", "source", "--column", "hospital", "--out", tmp_path / "s",
        "--plot", tmp_path / "who.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "s/site-1.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [rows[0], rows[1], rows[3]]
    assert (tmp_path / "who.png").exists()
    wrong = fedcore("partition", source, "--by", "label", "--sites", "2", "--out", tmp_path / "t")
    assert wrong.returncode == 2
    assert "row 1 has no 'label'; --column names another one of 'note', 'hospital'" in wrong.stderr
    assert not (tmp_path / "t").exists()


def test_the_example_of_the_page_prints_what_the_page_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/partition.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    said = re.search(r"print\(split.sizes\)  # (.*)", page)
    assert example is not None
    assert said is not None
    done = subprocess.run(
        [sys.executable, "-P", "-c", example[1]], cwd=tmp_path, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout.strip() == said[1]
    assert (tmp_path / "partition.png").exists()
