"""How far the mean of adapters' factors is off the mean of their products: in a run's log, status and summary."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.adapters.report import Figure, Measured
from fedcore.errors import LayoutError
from fedcore.monitor.ask import read_summary
from fedcore.monitor.view import PlainLines
from fedcore.server.service import Server
from fedcore.server.storage.past import read_past
from fedcore.server.storage.store import Store
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.local import LocalNetwork

from ..support.factor_runs import (
    PAIRS,
    WEIGHTS,
    Values,
    config,
    models,
    run_through,
    trained,
)


def numbers(before: Values, round_: int) -> dict[str, tuple[float, float, float]]:
    """Of each module the norms of the mean of products, of the error, and of the change, in binary64."""
    sites = [(w, trained(before, site, round_, frozenset())) for site, w in WEIGHTS.items()]
    total, found = sum(WEIGHTS.values()), {}
    for a, b in PAIRS:
        wide = [(w, s[b].astype(np.float64), s[a].astype(np.float64)) for w, s in sites]
        mean = sum(w * (of_b @ of_a) for w, of_b, of_a in wide) / total
        b_mean, a_mean = (sum(w * x[i] for w, *x in wide) / total for i in range(2))
        old = before[b].astype(np.float64) @ before[a].astype(np.float64)
        found[a.removesuffix(".lora_A.weight")] = tuple(
            float(np.linalg.norm(x)) for x in (mean, mean - b_mean @ a_mean, mean - old)
        )
    return found


def totals(of: dict[str, tuple[float, float, float]]) -> tuple[float, float]:
    """The error as a part of the norm and of the change, of all modules together."""
    norm, error, change = (np.hypot.reduce([values[i] for values in of.values()]) for i in range(3))
    return float(error / norm), float(error / change)


def test_a_run_says_how_far_the_mean_of_factors_is_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    folder = run_through(config(tmp_path / "one", "factors"))
    plain = run_through(config(tmp_path / "two", None))
    found = models(folder)
    assert [{n: v.tobytes() for n, v in one.items()} for one in found] == [
        {n: v.tobytes() for n, v in one.items()} for one in models(plain)
    ], "the bytes are those of the mean"
    summary = json.loads((folder / "summary.json").read_text())
    assert "factors" not in summary["versions"][0]
    assert all(
        "factors" not in of for of in json.loads((plain / "summary.json").read_text())["versions"]
    )
    lines: list[str] = []
    reply = read_summary(folder)
    PlainLines(lines.append).show(reply)
    for round_ in (1, 2, 3):
        modules = numbers(found[round_ - 1], round_)
        of_norm, of_change = totals(modules)
        assert 0.001 < of_norm < of_change
        of = summary["versions"][round_]["factors"]
        assert (of["modules"], of["of"]) == (2, 2)
        assert of["total"]["of_norm"] == pytest.approx(of_norm, rel=1e-9)
        assert of["total"]["of_change"] == pytest.approx(of_change, rel=1e-9)
        for one in of["worst"]:
            wanted = modules[one["module"]]
            assert (one["norm"], one["error"], one["change"]) == pytest.approx(wanted, rel=1e-9)
        status = reply.versions[round_].factors
        assert status is not None
        assert status.of_norm == pytest.approx(of_norm)
        assert status.worst == of["worst"][0]["module"]
        text = f"round {round_}: the mean of the factors is {100 * of_norm:.3g} % off the mean of"
        assert text in caplog.text
        assert (
            f"{100 * of_change:.3g} % of what the round changed; most in {status.worst}"
            in caplog.text
        )
        assert any(f"factors {100 * of_norm:.3g} % off" in line for line in lines)


def test_the_figure_of_a_round_is_in_the_journal_and_goes_back_with_it(tmp_path: Path) -> None:
    folder = run_through(config(tmp_path, "factors", 2))
    with contextlib.closing(Store(folder, None)) as store:
        before = [row.factors for row in store.versions()]
    assert before[0] is None
    assert all(of is not None and of.total.of_norm for of in before[1:])
    assert [v.factors is None for v in read_past(folder).versions] == [True, False, False]
    store = Store(folder, None)
    store.roll_back(1)
    assert [row.factors for row in store.versions()] == before[:2]
    store.close()
    with contextlib.closing(sqlite3.connect(folder / "run.sqlite")) as db:
        assert db.execute("SELECT version FROM figures").fetchall() == [(1,)]
        db.execute("UPDATE figures SET text = '{}'")
        db.commit()
    store = Store(folder, None)
    assert [row.factors for row in store.versions()] == [None, None], "it decides nothing"
    store.close()


@pytest.mark.parametrize("method", ["freeze-a", "alternate"])
def test_a_round_of_one_factor_has_no_figure_as_its_mean_is_exact(
    method: Any, tmp_path: Path
) -> None:
    folder = run_through(config(tmp_path, method, 1))
    assert "factors" not in json.loads((folder / "summary.json").read_text())["versions"][1]


SECTIONS: dict[str, dict[str, Any]] = {
    "differences in bf16": {"transfer": {"update": "bf16"}},
    "differences in int8": {"transfer": {"update": "int8"}},
    "the largest differences": {"transfer": {"update": "top-k", "top_k": 0.5}},
    "a server optimizer": {"aggregation": {"optimizer": {"name": "adam"}}},
    "equal weights": {"aggregation": {"weights": "equal"}},
    "an average of the models": {"aggregation": {"ema": 0.5}},
}


@pytest.mark.parametrize("sections", SECTIONS)
def test_measuring_changes_no_byte(sections: str, tmp_path: Path) -> None:
    found = [
        models(run_through(config(tmp_path / str(method), method, 2, **SECTIONS[sections])))
        for method in ("factors", None)
    ]
    assert [[{n: v.tobytes() for n, v in one.items()} for one in of] for of in found] == [
        [{n: v.tobytes() for n, v in one.items()} for one in found[1]]
    ] * 2


def test_figures_beyond_all_floats_are_no_numbers_for_programs() -> None:
    huge = Figure("m", 1e200, float("inf"), 1e300, 0.0, 4, 4)
    measured = Measured.of_figures([huge, Figure("n", 0.0, 0.0, 0.0)], 3)
    text = measured.text
    assert "Infinity" not in text
    assert "NaN" not in text
    again = Measured.of_text(text)
    assert (again.modules, again.of, again.total.error) == (2, 3, float("inf"))
    assert measured.status.of_norm is None
    with pytest.raises(ValueError, match="no figure of adapters"):
        Measured.of_text("[]")


def test_memory_that_does_not_hold_a_modules_factors_is_refused_at_the_declaration(
    tmp_path: Path,
) -> None:
    rows = 1 << 21
    specs = [(PAIRS[0][0], "F32", [4, 30]), (PAIRS[0][1], "F32", [rows, 4])]
    run = config(tmp_path, "factors", server={"insecure": True, "memory": "32MiB"})
    with closing(LocalNetwork()) as network, ThreadPoolExecutor(1) as pool:
        server = Server(run, link=network.server())
        serving = pool.submit(server.run)
        session = Session(SiteSettings("local", "a", idle_timeout=200), network.dial)
        try:
            assert session.is_running()
            with pytest.raises(LayoutError, match="memory is too little for the"):
                session.begin(specs, {}, lambda _: b"", roles={}, pairs=PAIRS[:1])
        finally:
            session.close()
            server.stop()
            serving.result(200)
