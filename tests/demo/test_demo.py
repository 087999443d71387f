"""The demo: its data, its downloads, and the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedcore.cli.app import main
from fedcore.demo.assets import Asset, AssetError, Member, ensure
from fedcore.demo.encoder import SITE_TOPICS, EncoderTask, build_sites, topic_names
from fedcore.demo.tasks import batch_order


def corpus(path: Path, tag: str) -> Path:
    rows = [
        f"{topic}\t{tag} {topic} {number} " + " ".join(["word"] * 25)
        for topic in topic_names()
        for number in range(200)
    ]
    path.write_text("class\ttext\nd\ts\nclass\tmeta\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_sites_hold_mostly_their_own_topics_and_share_no_text(tmp_path: Path) -> None:
    files = corpus(tmp_path / "a.tab", "early"), corpus(tmp_path / "b.tab", "late")
    sites = build_sites(*files, EncoderTask(seed=3))
    assert sites == build_sites(*files, EncoderTask(seed=3))
    assert sites != build_sites(*files, EncoderTask(seed=4))
    seen: set[tuple[str, str]] = set()
    for name, site in sites.items():
        assert [len(site.train), len(site.val), len(site.test)] == [360, 100, 200]
        own = sum(row.label in SITE_TOPICS[name] for row in site.train)
        assert own == 324
        for row in (*site.train, *site.val, *site.test):
            assert (row.label, row.text) not in seen
            seen.add((row.label, row.text))
        assert all(row.text.startswith("late") for row in site.test)


def test_batches_go_through_every_row_before_one_comes_again() -> None:
    batches = batch_order(10, 4, "seed")
    first = [row for _ in range(5) for row in next(batches)]
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))


def test_an_asset_that_cannot_be_had_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "1" if name == "PIP_NO_INDEX" else "")
    asset = Asset(
        "x", "fedcore-no-such-package==1.0", "x-1.0-py3-none-any.whl", "0" * 64, 10, "none", ()
    )
    asset = Asset(**{**asset.__dict__, "members": (Member("x/y", "0" * 64, 1),)})
    with pytest.raises(AssetError, match=r"could not be downloaded(.|\n)*To get it by hand"):
        ensure(asset, tmp_path)
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / asset.archive).write_bytes(b"something else")
    with pytest.raises(AssetError, match="not the expected archive"):
        ensure(asset, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_federated_model_beats_every_local_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--out", str(tmp_path / "demo"), "--seed", "1"])
    assert ended.value.code == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["federated"] > max(report["local"].values()) + 0.08
    assert report["mode"] == "max"
    assert (tmp_path / "demo" / "report.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_federated_causal_model_beats_every_local_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--task", "causal", "--out", str(tmp_path / "demo"), "--seed", "1"])
    assert ended.value.code == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["mode"] == "min"
    assert report["federated"] < min(report["local"].values()) - 0.8
    assert report["lead_over_best_local"] > 5 * report["lead_standard_error"]
    assert (tmp_path / "demo" / "report.png").stat().st_size > 10_000
