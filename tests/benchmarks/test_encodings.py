"""The benchmark of encodings: nothing is timed that is not right, and the figures are what they are called."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import encodings
from fedcore._core import Codec

SIZE = 1 << 20


def test_every_encoding_of_every_kind_of_tensors_has_a_row() -> None:
    rows = encodings.sweep(SIZE, 1)
    assert len(rows) == len(encodings.TENSORS) * (2 * len(encodings.ENCODINGS) - 1)
    assert {row["tensors"] for row in rows} == set(encodings.TENSORS)
    assert all(
        row[f"{what}_gb_s"] > 0 for row in rows for what in ("encode", "update", "decode", "reduce")
    )
    for row in rows:
        if row["tensors"].endswith("fp32") and not row["lossless"]:
            least = {"raw": 1, "bf16": 2, "fp16": 2, "int8": 3.8, "nf4": 7.5, "top-k": 60}
            most = {"raw": 0, "bf16": 3e-3, "fp16": 4e-4, "int8": 0.02, "nf4": 0.13, "top-k": 0.95}
            assert row["ratio"] >= least[row["update"]]
            assert row["relative_rms_error"] <= most[row["update"]]


def test_a_mean_that_is_not_what_both_sites_sent_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = encodings.Reduction.run

    def wrong(self: encodings.Reduction) -> None:
        run(self)
        self.out.view()[-1] ^= 0x40

    monkeypatch.setattr(encodings.Reduction, "run", wrong)
    work = encodings.Work("LoRA, fp32", SIZE // 4)
    with pytest.raises(ArithmeticError, match="not what both sites sent"):
        encodings.measure(work, "int8", False, repeats=2)


@pytest.mark.parametrize("name", encodings.TENSORS)
@pytest.mark.parametrize("encoding", encodings.ENCODINGS)
def test_an_encoding_that_is_off_by_one_value_is_not_timed(name: str, encoding: str) -> None:
    work = encodings.Work(name, SIZE // 4)
    codec = Codec(work.layout, encoding, False, encodings.TOP_K)
    chunks, out = work.encode(codec), np.empty_like(work.local)
    work.decode(codec, chunks, out)
    encodings.validate(work, encoding, chunks, out)
    out[-1] ^= 0x40  # a bit of the last value's exponent
    with pytest.raises(ArithmeticError, match=encoding):
        encodings.validate(work, encoding, chunks, out)
