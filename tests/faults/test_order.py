"""One set of updates, one aggregate: in any order, on any instruction set, with 1 to 4 threads."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from fedcore import _core
from fedcore._core import Layout
from fedcore.model_file import create_model

from .reference import CHUNK, flat, mean, random_update, stands_for
from .world import Site, World

pytestmark = pytest.mark.usefixtures("any_level")

LAYOUT = Layout(
    [
        ("f32", "F32", [9001]),
        ("bf16", "BF16", [5003]),
        ("f16", "F16", [4999]),
        ("f64", "F64", [701]),
        ("i64", "I64", [37]),
        ("bool", "BOOL", [5]),
    ],
    CHUNK,
)
SITES = {"a": 7, "b": 1, "c": (1 << 24) - 1, "d": 65_537}
UPDATES = {name: random_update(LAYOUT, seed) for seed, name in enumerate(SITES, 100)}
BASE = bytes(random_update(LAYOUT, 99))
ORDERS = 100


@pytest.mark.parametrize("encoding", ["raw", "int8", "nf4"])
@pytest.mark.parametrize("level", _core.simd_levels())
def test_a_hundred_orders_of_arrival_give_one_hash(level: str, encoding: str) -> None:
    _core.set_simd_level(level)
    hashes = set()
    for seed in range(ORDERS):
        dice = random.Random(seed)
        budget = dice.choice([1, 3 * CHUNK * len(SITES), 1 << 30])
        sites = [Site(name, weight, UPDATES[name]) for name, weight in SITES.items()]
        threads = 1 + seed // 2 % 4
        world = World(
            LAYOUT,
            sites,
            dice,
            budget,
            BASE,
            ahead=seed % 2 == 0,
            threads=threads,
            encoding=encoding,
        )
        world.run()
        assert world.result is not None
        hashes.add(hashlib.sha256(world.result).hexdigest())
    _core.set_simd_level("baseline")
    updates = [
        (weight, stands_for(LAYOUT, bytes(UPDATES[name]), BASE, encoding))
        for name, weight in sorted(SITES.items())
    ]
    exact = flat(LAYOUT, mean(LAYOUT, updates, BASE))
    assert hashes == {hashlib.sha256(exact).hexdigest()}


@pytest.mark.parametrize("level", _core.simd_levels())
def test_any_number_of_threads_gives_one_hash(level: str) -> None:
    _core.set_simd_level(level)
    layout = Layout([("w", "F32", [3_000_001]), ("h", "BF16", [1_500_007])], 1 << 20)
    files = []
    for seed in range(3):
        file = create_model(None, layout)
        generator = np.random.default_rng(seed)
        file.view("w")[:] = generator.standard_normal(3_000_001).astype(np.float32).tobytes()
        file.view("h")[:] = (
            generator.integers(0x3F00, 0x4100, 1_500_007).astype(np.uint16).tobytes()
        )
        files.append(file)
    tensors = [
        (
            dtype,
            nbytes,
            [file.data_offset + offset for file in files],
            files[0].data_offset + offset,
        )
        for _, dtype, _, offset, nbytes in layout.tensors
    ]
    hashes = set()
    for threads in (1, 2, 3, 4):
        out = create_model(None, layout)
        bad = _core.reduce_files([f.file for f in files], [5, 1, 99], tensors, out.file, threads)
        assert bad is None
        hashes.add(hashlib.sha256(out.file.view(out.data_offset)).hexdigest())
    updates = [
        (w, bytes(f.file.view(f.data_offset))) for w, f in zip((5, 1, 99), files, strict=True)
    ]
    assert hashes == {hashlib.sha256(flat(layout, mean(layout, updates))).hexdigest()}
