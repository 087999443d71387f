"""Server optimizers, bit by bit against NumPy: what is kept, what is written, and what stays the plain mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fedcore import _core
from fedcore._core import Finisher, Layout, MappedFile, finish_mean, finishers
from fedcore.errors import ConfigError, LayoutError, NonFiniteError, StorageError
from fedcore.rules.finishers import FINISHERS

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
WEIGHTS = [3, 1, 4]
FOUR_DTYPES = Layout(
    [("a", "BF16", [1001]), ("b", "F16", [700]), ("c", "F32", [1903]), ("d", "F64", [53])], 4096
)
Places = dict[str, tuple[MappedFile, int]]


class Versions:
    """A model and its states from version to version, as the core makes them."""

    def __init__(
        self,
        layout: Layout,
        options: Mapping[str, float],
        plain: set[str],
        kind: str = "momentum",
        ema: float | None = None,
    ) -> None:
        self.ema = ema
        self.layout = layout
        self.kind = kind
        self.options = options
        self.plain = plain
        self.states: Places = {}

    def step(self, inputs: list[bytes], base: bytes) -> bytes:
        finisher = Finisher(
            self.layout, self.kind, self.options, self.plain, self.states, ema=self.ema
        )
        after: Places = {
            name: (MappedFile.anonymous(layout.total_bytes + 8), 8)
            for name, layout in finisher.states
        }
        out = bytearray(self.layout.total_bytes)
        for _ in range(2):  # a chunk may be reduced more than once
            finish_mean(finisher, inputs, WEIGHTS, base, out, after)
        self.states = after
        return bytes(out)

    def state(self, name: str, tensor: str, dtype: Any) -> Any:
        finisher = Finisher(self.layout, self.kind, self.options, self.plain, ema=self.ema)
        layout = dict(finisher.states)[name]
        file, at = self.states[name]
        begin, nbytes = next(t[3:] for t in layout.tensors if t[0] == tensor)
        return np.frombuffer(bytes(file.view(at + begin, nbytes)), dtype)


def tensors(layout: Layout, flat: bytes) -> dict[str, Any]:
    return {
        name: np.frombuffer(flat[at : at + nbytes], DTYPES[dtype])
        for name, dtype, _, at, nbytes in layout.tensors
        if dtype in DTYPES
    }


def joined(layout: Layout, values: Mapping[str, Any]) -> bytes:
    return b"".join(values[name].tobytes() for name, *_ in layout.tensors)


def mean(values: list[Any]) -> Any:
    """The mean in binary64, summed in order, before it is rounded."""
    total = np.zeros(values[0].shape)
    for weight, value in zip(WEIGHTS, values, strict=True):
        total = total + weight * value.astype(np.float64)
    return total / sum(WEIGHTS)


def test_200_rounds_of_momentum_are_a_reference_to_the_last_bit_of_the_master() -> None:
    rng = np.random.default_rng(1)
    layout = Layout([("a", "BF16", [40, 30]), ("b", "F16", [700]), ("c", "F32", [1900])], 4096)
    options = {"learning_rate": 0.1, "momentum": 0.9}
    versions = Versions(layout, options, set())
    model = {
        name: rng.normal(size=tensor.shape).astype(tensor.dtype)
        for name, tensor in tensors(layout, bytes(layout.total_bytes)).items()
    }
    master = {name: value.astype(np.float32) for name, value in model.items()}
    kept = {name: np.zeros(value.shape, np.float32) for name, value in model.items()}
    for _ in range(200):
        updates = [
            {
                name: (value.astype(np.float64) + 1e-3 * rng.normal(size=value.shape)).astype(
                    value.dtype
                )
                for name, value in model.items()
            }
            for _ in WEIGHTS
        ]
        flat = versions.step([joined(layout, update) for update in updates], joined(layout, model))
        for name, value in model.items():
            step = mean([update[name] for update in updates]) - value.astype(np.float64)
            kept[name] = (0.9 * kept[name].astype(np.float64) + step).astype(np.float32)
            master[name] = (
                master[name].astype(np.float64) + 0.1 * kept[name].astype(np.float64)
            ).astype(np.float32)
            model[name] = master[name].astype(value.dtype)
        assert flat == joined(layout, model)
    for name in model:
        assert versions.state("momentum", name, np.float32).tobytes() == kept[name].tobytes()
    for name in ("a", "b"):
        assert versions.state("master", name, np.float32).tobytes() == master[name].tobytes()


def kept(value: Any, dtype: Any) -> Any:
    return value.astype(dtype).astype(np.float64)


def reference(kind: str, options: Mapping[str, float], step: Any, state: Any, dtype: Any) -> Any:
    """Change a state in place and return what is added to x: Reddi et al. 2021, Algorithm 2, and two momentums."""
    o = options
    if kind in ("momentum", "nesterov"):
        state["momentum"] = kept(o["momentum"] * state["momentum"] + step, dtype)
        ahead = o["momentum"] * state["momentum"] + step
        return o["learning_rate"] * (ahead if kind == "nesterov" else state["momentum"])
    square = step * step
    if kind == "adagrad":
        state["variance"] = kept(state["variance"] + square, dtype)
        return o["learning_rate"] * step / (np.sqrt(state["variance"]) + o["tau"])
    v, rest = state["variance"], 1 - o["beta2"]
    state["momentum"] = kept(o["beta1"] * state["momentum"] + (1 - o["beta1"]) * step, dtype)
    if kind == "adam":
        state["variance"] = kept(o["beta2"] * v + rest * square, dtype)
    else:
        state["variance"] = kept(v - rest * square * np.sign(v - square), dtype)
    return o["learning_rate"] * state["momentum"] / (np.sqrt(state["variance"]) + o["tau"])


def drifted(rng: np.random.Generator, model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return three updates of a model: apart from each other, but alike in the binary64 tensor ``d``."""
    common = {n: 1e-2 * rng.normal(size=len(x)) for n, x in model.items()}
    return [
        {
            n: (x.astype(np.float64) + common[n] * (1 if n == "d" else k)).astype(x.dtype)
            for n, x in model.items()
        }
        for k in range(3)
    ]


@pytest.fixture(params=_core.simd_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.simd_level()
    _core.set_simd_level(request.param)
    yield request.param
    _core.set_simd_level(before)


@pytest.mark.parametrize("kind", FINISHERS)
def test_every_optimizer_is_its_reference_to_the_last_bit_at_every_level(
    kind: str, level: str
) -> None:
    rng = np.random.default_rng(3)
    layout = FOUR_DTYPES
    options = {name: option.default for name, option in FINISHERS[kind].options.items()}
    versions = Versions(layout, options, set(), kind)
    empty = tensors(layout, bytes(layout.total_bytes))
    model = {n: rng.normal(size=len(t)).astype(t.dtype) for n, t in empty.items()}
    wide = {n: np.float64 if n == "d" else np.float32 for n in model}
    master = {n: x.astype(np.float64) for n, x in model.items()}
    start = {"variance": options.get("tau", 0.0) ** 2, "momentum": 0.0}
    states = {
        n: {s: kept(np.full(len(x), start[s]), wide[n]) for s in FINISHERS[kind].states}
        for n, x in model.items()
    }
    for _ in range(4):
        updates = drifted(rng, model)
        flat = versions.step([joined(layout, u) for u in updates], joined(layout, model))
        for n, x in model.items():
            # A mean of equal numbers in binary64 is that number: the core's own is wider than NumPy's.
            combined = updates[0][n] if n == "d" else mean([u[n] for u in updates])
            step = combined - x.astype(np.float64)
            moved = master[n] + reference(kind, options, step, states[n], wide[n])
            master[n] = kept(moved, wide[n])
            model[n] = master[n].astype(x.dtype)
        assert flat == joined(layout, model)
    for n, state in states.items():
        for name, values in state.items():
            found = versions.state(name, n, wide[n])
            assert found.tobytes() == values.astype(wide[n]).tobytes(), (n, name)


@pytest.mark.parametrize("kind", [*FINISHERS, "none"])
def test_the_average_is_its_reference_to_the_last_bit_and_changes_no_model(
    kind: str, level: str
) -> None:
    rng = np.random.default_rng(4)
    layout = FOUR_DTYPES
    options = (
        {n: o.default for n, o in FINISHERS[kind].options.items()} if kind in FINISHERS else {}
    )
    averaged = Versions(layout, options, {"b"}, kind, 0.9)
    bare = Versions(layout, options, {"b"}, kind)
    empty = tensors(layout, bytes(layout.total_bytes))
    model = {n: rng.normal(size=len(t)).astype(t.dtype) for n, t in empty.items()}
    wide = {n: np.float64 if n == "d" else np.float32 for n in model if n != "b"}
    average = {n: model[n].astype(np.float64) for n in wide}
    for _ in range(4):
        updates = drifted(rng, model)
        inputs, base = [joined(layout, u) for u in updates], joined(layout, model)
        flat = averaged.step(inputs, base)
        if kind == "none":
            for n, values in tensors(layout, flat).items():
                out = bytearray(values.nbytes)
                dtype = next(of for name, of, *_ in layout.tensors if name == n)
                _core.mean(dtype, [u[n].tobytes() for u in updates], WEIGHTS, out)
                assert values.tobytes() == bytes(out)
        else:
            assert flat == bare.step(inputs, base)
        model = tensors(layout, flat)
        for n, dtype in wide.items():
            x = model[n].astype(np.float64)
            if n == "a" and kind == "none":
                x = kept(mean([u[n] for u in updates]), np.float32)
            elif n == "a":
                x = averaged.state("master", n, np.float32).astype(np.float64)
            average[n] = kept(0.9 * average[n] + (1 - 0.9) * x, dtype)
            assert averaged.state("ema", n, dtype).tobytes() == average[n].astype(dtype).tobytes()
    names = [
        name
        for name, *_ in dict(Finisher(layout, kind, options, {"b"}, ema=0.9).states)["ema"].tensors
    ]
    assert sorted(names) == ["a", "c", "d"]


def test_adaptive_optimizers_move_each_element_about_as_far_as_the_learning_rate() -> None:
    layout = Layout([("w", "F32", [3])], 4096)
    base, update = np.zeros(3, np.float32), np.float32([1e-2, 1.0, -1e4])
    for kind in ("adagrad", "adam", "yogi"):
        options = {name: option.default for name, option in FINISHERS[kind].options.items()}
        versions, model = Versions(layout, options, set(), kind), base.tobytes()
        moved = np.frombuffer(versions.step([update.tobytes()] * 3, model), np.float32)
        assert (np.sign(moved) == np.sign(update)).all()
        assert (abs(moved) <= options["learning_rate"] * 1.01).all()


def test_a_step_far_below_the_last_place_of_bfloat16_adds_up_in_the_master() -> None:
    layout = Layout([("w", "BF16", [8])], 4096)
    versions = Versions(layout, {"learning_rate": 0.01, "momentum": 0.0}, set())
    base = np.full(8, 1.0, ml_dtypes.bfloat16)
    for _ in range(200):  # each step is 2^-7 * 0.01, and half a place at 1 is 2^-8
        update = (base.astype(np.float64) + 2.0**-7).astype(ml_dtypes.bfloat16)
        base = np.frombuffer(versions.step([update.tobytes()] * 3, base.tobytes()), base.dtype)
    assert float(base[0]) == 1 + 2.0**-6  # 200 * 2^-7 * 0.01


def test_plain_tensors_keep_the_mean_and_integers_those_of_the_base() -> None:
    rng = np.random.default_rng(2)
    layout = Layout(
        [("mean", "F32", [1500]), ("n", "I64", [3]), ("w", "F32", [1500]), ("z", "F16", [5])], 4096
    )
    versions = Versions(layout, {"learning_rate": 0.5, "momentum": 0.9}, {"mean", "z"})
    floats = {"mean": np.float32, "w": np.float32, "z": np.float16}

    def values(n: int) -> dict[str, Any]:
        made = {
            name: rng.normal(size=5 if name == "z" else 1500).astype(dtype)
            for name, dtype in floats.items()
        }
        return {**made, "n": np.full(3, n)}

    base, updates = values(7), [values(n) for n in range(3)]
    found = tensors(
        layout, versions.step([joined(layout, u) for u in updates], joined(layout, base))
    )
    for name in ("mean", "z"):
        expected = mean([update[name] for update in updates]).astype(floats[name])
        assert found[name].tobytes() == expected.tobytes()
    step = (mean([update["w"] for update in updates]) - base["w"].astype(np.float64)).astype(
        np.float32
    )
    expected = (base["w"].astype(np.float64) + 0.5 * step.astype(np.float64)).astype(np.float32)
    assert found["w"].tobytes() == expected.tobytes()
    assert list(versions.states) == ["momentum"]  # no parameter is narrow


def test_float64_parameters_have_states_of_float64() -> None:
    layout = Layout([("w", "F64", [3000]), ("x", "F32", [2])], 4096)
    versions = Versions(layout, {"learning_rate": 0.3, "momentum": 0.5}, set())
    base = {"w": np.linspace(0, 1, 3000), "x": np.zeros(2, np.float32)}
    update = {"w": base["w"] + 1 / 3, "x": np.ones(2, np.float32)}
    flat = versions.step([joined(layout, update)] * 3, joined(layout, base))
    step = update["w"] - base["w"]
    assert tensors(layout, flat)["w"].tobytes() == (base["w"] + 0.3 * step).tobytes()
    assert versions.state("momentum", "w", np.float64).tobytes() == step.tobytes()


@pytest.mark.parametrize("kind", FINISHERS)
def test_what_diverges_stays_finite_with_the_same_bits_at_every_level(kind: str) -> None:
    many = 37  # whole registers, and some that fill none
    sizes = {"a": 1e38, "b": 6e4, "c": 1e308, "d": 1e38}
    layout = Layout(
        [(n, t, [many]) for n, t in zip("abcd", ("F32", "F16", "F64", "BF16"), strict=True)], 4096
    )
    options = {name: option.default for name, option in FINISHERS[kind].options.items()}
    parts = np.linspace(-1, 1, many)
    like = tensors(layout, bytes(layout.total_bytes))
    start = {n: (3 * parts if n == "a" else parts) * size for n, size in sizes.items()}
    update = {n: -value for n, value in start.items()} | {"b": 1.05 * start["b"]}
    before, found = _core.simd_level(), set()
    try:
        for level in _core.simd_levels():
            _core.set_simd_level(level)
            versions = Versions(layout, options | {"learning_rate": 10.0}, set(), kind)
            flat = joined(layout, {n: v.astype(like[n].dtype) for n, v in start.items()})
            inputs = [joined(layout, {n: v.astype(like[n].dtype) for n, v in update.items()})] * 3
            for _ in range(30):
                flat = versions.step(inputs, flat)
                values = [v.astype(np.float64) for v in tensors(layout, flat).values()]
                assert all(np.isfinite(value).all() for value in values)
            found.add(flat)
    finally:
        _core.set_simd_level(before)
    assert len(found) == 1


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_mean_of_many_is_the_same_with_a_finisher_behind_it(dtype: str, level: str) -> None:
    rng, many = np.random.default_rng(5), 2101
    layout = Layout([("w", dtype, [many])], 1 << 14)
    updates = [rng.normal(size=many).astype(DTYPES[dtype]).tobytes() for _ in range(19)]
    weights = [int(weight) for weight in rng.integers(1, 1 << 24, 19)]
    for count in (1, 8, 9, 16, 17, 19):
        finisher = Finisher(layout, "none", {}, ema=0.5)
        after = {n: (MappedFile.anonymous(of.total_bytes), 0) for n, of in finisher.states}
        made, plain = bytearray(layout.total_bytes), bytearray(layout.total_bytes)
        finish_mean(finisher, updates[:count], weights[:count], updates[0], made, after)
        _core.mean(dtype, updates[:count], weights[:count], plain)
        assert made == plain, count


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_a_value_that_is_not_finite_is_refused_wherever_it_lies(dtype: str, level: str) -> None:
    many = 75
    layout = Layout([("w", dtype, [many])], 4096)
    good = np.ones(many, DTYPES[dtype])
    for place in (0, 1, 31, 32, many - 1):
        for value in (np.nan, np.inf, -np.inf):
            bad = good.copy()
            bad[place] = value
            for inputs in ([bad], [*[good] * 8, bad], [bad, *[good] * 9]):
                versions = Finisher(layout, "momentum", {"learning_rate": 1.0, "momentum": 0.0})
                after = {n: (MappedFile.anonymous(of.total_bytes), 0) for n, of in versions.states}
                flat = [update.tobytes() for update in inputs]
                out = bytearray(layout.total_bytes)
                with pytest.raises(NonFiniteError):
                    finish_mean(versions, flat, [1] * len(flat), good.tobytes(), out, after)


def test_a_finisher_that_does_not_fit_is_refused_by_name() -> None:
    layout = Layout([("w", "F32", [4]), ("n", "I64", [4])], 4096)
    good = {"learning_rate": 1.0, "momentum": 0.0}
    with pytest.raises(ConfigError, match="no server optimizer is named 'sgd'"):
        Finisher(layout, "sgd", good)
    with pytest.raises(ConfigError, match="has 2 options"):
        Finisher(layout, "momentum", {"learning_rate": 1.0, "beta": 0.0})
    with pytest.raises(ConfigError, match="no tensor on which"):
        Finisher(layout, "momentum", good, {"w"})
    with pytest.raises(LayoutError, match="not in the layout"):
        Finisher(layout, "momentum", good, {"v"})
    with pytest.raises(StorageError, match="not the states"):
        Finisher(layout, "momentum", good, set(), {"master": (MappedFile.anonymous(16), 0)})
    with pytest.raises(StorageError):
        Finisher(layout, "momentum", good, set(), {"momentum": (MappedFile.anonymous(15), 0)})


def test_the_registry_of_finishers_says_what_the_core_says() -> None:
    listed = [(f.name, f.version, list(f.states), list(f.options)) for f in FINISHERS.values()]
    assert finishers() == listed
    assert all(o.allows(o.default) for f in FINISHERS.values() for o in f.options.values())
