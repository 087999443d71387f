"""``fedcore status --metrics``: what sites logged, as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcore.cli.app import app
from fedcore.monitor.ask import StatusClient
from fedcore.server.service import Server
from fedcore.server.storage.store import Store

from ..support.raw_site import DEADLINE
from ..support.run_folders import SETTINGS, run_of
from ..support.runs import run, run_config


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A run folder that a server works on."""
    folder = run_of(tmp_path / "run", 3.0, 2.0)
    with closing(Store(folder, SETTINGS)) as store:
        store.logged.add("a", 1, 10, {"loss": 4.0, "[red]lr": 0.1})
        store.logged.add("a", 1, 20, {"loss": float("nan")})
        store.logged.add("b", 2, None, {"loss": float("-inf")})
        store.leave()
        yield store


def shown(folder: Path | str, *options: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["status", str(folder), "--metrics", "--timeout=200", *options])
    assert done.exit_code == status, done.output
    return done.output


def test_each_metric_of_each_site_is_a_line_of_the_table(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = shown(store.folder).splitlines()
    (loss,) = [line.split() for line in lines if " a " in line and "loss" in line]
    assert [word for word in loss if word != "│"] == [
        "a", "loss", "2", "4", "nan", "4", "4", "round", "1,", "step", "20",
    ]  # fmt: skip
    assert any("[red]lr" in line for line in lines)
    assert any("-inf" in line and "round 2 " in line for line in lines)


def test_json_has_each_series_in_short_and_its_points(store: Store) -> None:
    found = {
        (s["site"], s["name"]): s for s in json.loads(shown(store.folder, "--json"))["metrics"]
    }
    loss = found["a", "loss"]
    assert (loss["count"], loss["first"], loss["last"], loss["min"]) == (2, 4.0, None, 4.0)
    assert loss["not_finite"] == {"round": 1, "step": 20}
    assert [(p["round"], p["step"], p["value"]) for p in loss["points"]] == [
        (1, 10, 4.0),
        (1, 20, None),
    ]
    assert loss["points"][0]["time"].endswith("+00:00")
    assert found["b", "loss"]["points"][0]["step"] is None


def test_csv_has_a_line_for_each_point_and_spells_nan_and_infinity(store: Store) -> None:
    rows = list(csv.DictReader(io.StringIO(shown(store.folder, "--csv"))))
    assert [(r["site"], r["name"], r["round"], r["step"], r["value"]) for r in rows] == [
        ("a", "[red]lr", "1", "10", "0.1"),
        ("a", "loss", "1", "10", "4.0"),
        ("a", "loss", "1", "20", "nan"),
        ("b", "loss", "2", "", "-inf"),
    ]


def test_who_reads_the_metrics_disturbs_no_server(store: Store) -> None:
    with closing(sqlite3.connect(f"{store.folder.as_uri()}/run.sqlite?mode=ro", uri=True)) as db:
        reading = db.execute("SELECT * FROM points")
        reading.fetchone()
        store.logged.add("a", 2, 30, {"loss": 5.0})
        store.logged.write_if_due(10)  # it neither waits nor raises
        reading.close()
    assert "5.0" not in shown(store.folder, "--csv")
    store.logged.write_if_due(11)
    assert "5.0" in shown(store.folder, "--csv")


def test_a_folder_of_a_fedcore_that_kept_none_has_none(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", 3.0)
    with closing(sqlite3.connect(folder / "run.sqlite")) as db:
        db.executescript("DROP VIEW metrics; DROP TABLE points; DROP TABLE series")
    assert "no site has logged a metric yet" in shown(folder)
    assert json.loads(shown(folder, "--json"))["metrics"] == []


def test_a_server_is_asked_for_its_metrics_page_by_page(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a"], rounds=1))
    logged = server.runs[0].store.logged
    names = [f"m{i:03d}" for i in range(50)]
    for step in range(60):
        logged.add("a", 1, step, dict.fromkeys(names, float(step)))
    logged.add("a", 1, None, {"odd": float("nan")})
    server.runs[0].store.leave()

    def look() -> int:
        with StatusClient(server.endpoint) as client:
            first = client.page(0, DEADLINE)
            found = {one.name: one for one in client.training(DEADLINE)}
        rows = list(csv.DictReader(io.StringIO(shown(server.endpoint, "--csv", "--insecure"))))
        server.stop()
        assert 0 < len(first.series) < len(names)
        assert list(found) == [*names, "odd"]
        assert [point[2] for point in found["m007"].points] == list(range(60))
        assert len(rows) == 60 * len(names) + 1
        assert (rows[-1]["step"], rows[-1]["value"]) == ("", "nan")
        return 0

    run(server, look)


@pytest.mark.parametrize(
    ("target", "options", "text"),
    [
        ("run", ["--watch"], "not with --watch"),
        ("run", ["--json", "--csv"], "with --json or --csv"),
        ("elsewhere", [], "neither a run folder nor an address"),
    ],
)
def test_where_metrics_cannot_be_had_is_one_clear_line(
    target: str, options: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(tmp_path / "run", 3.0)
    monkeypatch.chdir(tmp_path)
    assert text in shown(target, *options, status=2)


def test_csv_without_metrics_is_refused_with_what_is_missing() -> None:
    done = CliRunner().invoke(app, ["status", "run", "--csv"])
    assert done.exit_code == 2
    assert "--csv needs --metrics" in done.output
