"""The benchmark of whole updates: each case once, and nothing is timed that is not right."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import updates

SIZE = 3 << 20


def test_each_case_is_measured_once(tmp_path: Path) -> None:
    rows = updates.measure(SIZE, 1, folder=tmp_path)
    cases = {(row["update"], row["feedback"], row["threads"]) for row in rows}
    assert len(cases) == len(rows) == 2 * len(updates.ENCODINGS) * 2
    for row in rows:
        assert row["bytes"] == SIZE
        assert 0 < row["memcpy_share"] < 10
        assert row["peak_bytes"] >= 0


def test_an_update_that_is_not_what_the_codec_makes_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(updates.Update, "expected", lambda *_: b"")
    with pytest.raises(ArithmeticError, match="first chunk is wrong"):
        updates.measure(SIZE, 1)
