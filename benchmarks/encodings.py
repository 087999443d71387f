"""The encodings of updates: how much less travels, what is lost, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedcore._core import Codec, Collector, CollectorOptions, Exchange, Layout, MappedFile
from fedcore.encoding import UpdateEncoder
from fedcore.errors import ProtocolError
from fedcore.protocol import UPDATE_ENCODINGS, read_header

from .report import MIB

ENCODINGS: Final = UPDATE_ENCODINGS
TOP_K: Final = 0.01
_ROWS: Final = 1024
_BOUND: Final = {"bf16": 2.0**-8, "fp16": 2.0**-11, "int8": 0.5 / 127 * 1.001, "nf4": 0.17}

Flat = NDArray[np.uint8]
Floats = NDArray[np.float32]
Chunks = list[tuple[int, bytes]]


def _bf16(values: Floats) -> Flat:
    """Return the nearest bfloat16 values, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    words = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return words.astype(np.uint16).view(np.uint8)


def _floats(flat: Flat, dtype: str) -> Floats:
    if dtype == "F32":
        return flat.view(np.float32)
    return (flat.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _weights(count: int, seed: int) -> tuple[Floats, Floats]:
    """Return weights as a layer has them, and a round's change of them.

    Each row has a scale of its own (log-normal); weights are normal, changes heavy-tailed (Student's t with four
    degrees of freedom) and fifty times smaller.
    """
    dice = np.random.default_rng(seed)
    scale = np.repeat(dice.lognormal(np.log(0.02), 0.4, -(-count // _ROWS)), _ROWS)[:count]
    weights = dice.standard_normal(count) * scale
    change = dice.standard_t(4, count) * scale / 50
    return weights.astype(np.float32), change.astype(np.float32)


def _adapters(count: int, seed: int) -> tuple[Floats, Floats]:
    """Return LoRA factors after some rounds, A beside B, and a round's change of them.

    A is uniform and moves little, B began at zero and is of the size of its changes.
    """
    dice = np.random.default_rng(seed)
    half = count // 2
    a = dice.uniform(-1, 1, half) / np.sqrt(_ROWS)
    b = dice.standard_t(4, count - half) * 2e-3
    change = np.concatenate(
        [dice.standard_t(4, half) * 3e-4, dice.standard_t(4, count - half) * 1e-3]
    )
    return np.concatenate([a, b]).astype(np.float32), change.astype(np.float32)


TENSORS: Final[dict[str, tuple[str, Callable[[int, int], tuple[Floats, Floats]]]]] = {
    "all weights, fp32": ("F32", _weights),
    "all weights, bf16": ("BF16", _weights),
    "LoRA, fp32": ("F32", _adapters),
}


class Work:
    """One kind of tensors as a site has them after training, and the base that both sides have."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.dtype, make = TENSORS[name]
        count = max(1, size // (4 if self.dtype == "F32" else 2))
        base, change = make(count, 0)
        into = _bf16 if self.dtype == "BF16" else lambda x: x.view(np.uint8)
        self.base: Flat = into(base)
        self.local: Flat = into(base + change)
        self.layout = Layout([("w", self.dtype, [count])], MIB)
        self.parts = [
            slice(at, at + nbytes)
            for at, nbytes in map(self.layout.chunk_range, range(self.layout.chunk_count))
        ]

    def trained(self, seed: int) -> Flat:
        """Return what another site has after training: the base with changes of its own."""
        base = _floats(self.base, self.dtype)
        _, change = TENSORS[self.name][1](len(base), seed)
        return _bf16(base + change) if self.dtype == "BF16" else (base + change).view(np.uint8)

    def encode(self, codec: Codec, local: Flat | None = None) -> Chunks:
        """Return every chunk's encoding and body, of ``local`` or of what one site has."""
        values = self.local if local is None else local
        return [
            codec.encode(i, values[p].data, self.base[p].data) for i, p in enumerate(self.parts)
        ]

    def encode_only(self, codec: Codec) -> None:
        """Encode every chunk and let go of it, as one that is written to a file."""
        for index, part in enumerate(self.parts):
            codec.encode(index, self.local[part].data, self.base[part].data)

    def decode(self, codec: Codec, chunks: Chunks, out: Flat) -> None:
        """Write what the chunks stand for."""
        for index, (part, (number, body)) in enumerate(zip(self.parts, chunks, strict=True)):
            codec.decode(index, number, body, out[part].data, self.base[part].data)


def validate(work: Work, encoding: str, chunks: Chunks, out: Flat) -> None:
    """Compare what the chunks stand for with the tensors, and see that a damaged chunk is refused.

    Raises:
        ArithmeticError: an element is farther off than its encoding allows.
    """
    want, got, base = (_floats(flat, work.dtype) for flat in (work.local, out, work.base))
    change, lost = want - base, np.abs(want.astype(np.float64) - got)
    ulp = np.spacing(np.maximum(np.abs(want), np.abs(got))) * (1 if work.dtype == "F32" else 2**16)
    if encoding == "raw" or (encoding in ("bf16", "fp16") and work.dtype == "BF16"):
        right = out.tobytes() == work.local.tobytes()
    elif encoding == "top-k":
        kept = got != base
        share = kept.sum() / len(kept)
        right = bool((lost[kept] <= ulp[kept]).all()) and 0.5 * TOP_K < share <= 1.01 * TOP_K
    else:
        # The blocks of int8 and nf4 have a scale each; the casts' errors go with each value.
        block = {"int8": 128, "nf4": 64}.get(encoding, 1)
        padded = np.zeros(-(-len(change) // block) * block, np.float32)
        padded[: len(change)] = np.abs(change)
        largest = np.repeat(padded.reshape(-1, block).max(axis=1), block)[: len(change)]
        right = bool((lost <= _BOUND[encoding] * largest + 2 * ulp + 2.0**-25).all())
    if not right:
        raise ArithmeticError(f"{encoding}: {work.name} are not what was encoded")
    codec = Codec(work.layout, encoding, True, TOP_K)
    number, body = chunks[0]
    first = work.parts[0]
    try:
        codec.decode(0, number, body[:-1], out[first].copy().data, work.base[first].data)
    except ProtocolError:
        return
    raise ArithmeticError(f"{encoding}: a chunk without its last byte was decoded")


class Reduction:
    """The server's work for sites that send these chunks: check, decode and reduce, all but the sockets."""

    def __init__(
        self, work: Work, updates: Sequence[Chunks], encoding: str, threads: int = 1
    ) -> None:
        self.weights: Final = range(1, len(updates) + 1)
        self._work = work
        self._threads = threads
        self._encoding = encoding
        self._base, self.out = (MappedFile.anonymous(len(work.base)) for _ in range(2))
        self._base.view()[:] = work.base.tobytes()
        self._frames: dict[tuple[bytes, int], tuple[bytes, bytes]] = {}
        self._sites: dict[bytes, Exchange] = {}
        for weight, chunks in zip(self.weights, updates, strict=True):
            peer = bytes([weight])
            body = b"".join(body for _, body in chunks)
            file = MappedFile.anonymous(len(body))
            file.view()[:] = body
            offsets = np.cumsum([0] + [len(body) for _, body in chunks]).tolist()
            encodings = bytes(number for number, _ in chunks)
            self._sites[peer] = Exchange()
            self._sites[peer].publish_encoded(peer * 16, file, offsets, encodings)
        self.run()  # and so makes the frames

    def run(self) -> None:
        """Collect the updates into ``out``."""
        work = self._work
        codec = Codec(work.layout, self._encoding, True, TOP_K)
        sources = [
            (peer, peer * 16, weight)
            for peer, weight in zip(self._sites, self.weights, strict=True)
        ]
        collector = Collector(
            work.layout,
            sources,
            self.out,
            0,
            (self._base, 0),
            CollectorOptions(64 * MIB, codec=codec, threads=self._threads),
        )
        server = Exchange()
        server.start(collector)
        while True:
            server.tick(0)
            if collector.done:
                return
            asked = server.next_out(0)
            if asked is None:
                raise ArithmeticError(f"{self._encoding}: the collection stands still")
            peer, head, _ = asked
            wanted = read_header(head)
            first, count = wanted.index, wanted.count
            if (peer, first + count - 1) not in self._frames:
                self._make_frames(peer, first, head)
            for index in range(first, first + count):
                server.deliver(0, peer, *self._frames[peer, index])

    def _make_frames(self, peer: bytes, first: int, head: bytes) -> None:
        site = self._sites[peer]
        site.deliver(0, b"", head, None)
        while (reply := site.next_out(0)) is not None:
            self._frames[peer, first] = reply[1], bytes(reply[2] or b"")
            first += 1


def _best(
    action: Callable[[], object], repeats: int, clock: Callable[[], float] = time.thread_time
) -> float:
    """Return the least CPU time of some runs: others' work on the machine only adds to it."""
    times = []
    for _ in range(repeats):
        begin = clock()
        action()
        times.append(clock() - begin)
    return min(times)


def memcpy_gb_s(repeats: int) -> float:
    """Return the GB that a copy of 64 MiB reads and writes per second of CPU time."""
    source, target = (np.ones(64 * MIB, np.uint8) for _ in range(2))
    return 2 * len(source) / _best(lambda: np.copyto(target, source), repeats) / 1e9


def whole_updates(work: Work, encoding: str, lossless: bool, repeats: int) -> tuple[float, int]:
    """Return the least CPU time in which a site encodes an update with its residual, and the bytes it touches.

    These are the values, the base, the residual before and after, and what travels, each once.

    Raises:
        ArithmeticError: what travels are not the chunks that are encoded one by one.
    """
    size = len(work.local)
    values, base = (MappedFile.anonymous(size) for _ in range(2))
    values.write(0, work.local.data)
    base.write(0, work.base.data)
    encoder = UpdateEncoder(work.layout, encoding, lossless=lossless, top_k=TOP_K)
    update = encoder.encode(1, values, 0, base, 0)
    bodies = [body for _, body in work.encode(Codec(work.layout, encoding, lossless, TOP_K))]
    if bytes(update.file.view(0, update.nbytes)) != b"".join(bodies):
        raise ArithmeticError(f"{encoding}: an update of {work.name} is not its chunks")

    def again() -> None:
        encoder.settle(1, included=True)
        encoder.encode(1, values, 0, base, 0)

    seconds = _best(again, max(2, repeats))  # the first one touches new memory
    return seconds, (2 if encoding == "raw" else 4) * size + update.nbytes


def measure(
    work: Work, encoding: str, lossless: bool, repeats: int, threads: int = 1
) -> dict[str, Any]:
    """Return ratio, relative RMS error of the change, and GB of flat bytes per second of CPU time on one core.

    ``decode`` is that of single chunks, as they are spilled; ``reduce`` what a server does with each that comes,
    with several threads per second of wall time. ``update`` is what a site does with its update, error feedback
    included, and ``memcpy_share`` how fast that goes through the bytes that it touches, of a copy's rate.
    """
    codec = Codec(work.layout, encoding, lossless, TOP_K)
    out = np.empty_like(work.local)
    chunks = work.encode(codec)
    work.decode(codec, chunks, out)
    validate(work, encoding, chunks, out)
    want, got, base = (
        _floats(f, work.dtype).astype(np.float64) for f in (work.local, out, work.base)
    )
    size = len(work.local)
    # The mean of two such updates is what the chunks stand for.
    reduction = Reduction(work, [chunks, chunks], encoding, threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    reduce_s = _best(reduction.run, repeats, clock)
    if bytes(reduction.out.view()) != out.tobytes():
        raise ArithmeticError(f"{encoding}: the mean of {work.name} is not what both sites sent")
    update_s, touched = whole_updates(work, encoding, lossless, repeats)
    return {
        "tensors": work.name,
        "bytes": size,
        "update": encoding,
        "lossless": lossless,
        "threads": threads,
        "ratio": size / sum(len(body) for _, body in chunks),
        "relative_rms_error": float(
            np.sqrt(np.mean((got - want) ** 2) / np.mean((want - base) ** 2))
        ),
        "packed_chunks": sum(number >= 0x80 for number, _ in chunks) / len(chunks),
        "encode_gb_s": size / _best(lambda: work.encode_only(codec), repeats) / 1e9,
        "update_gb_s": size / update_s / 1e9,
        "memcpy_share": touched / update_s / 1e9 / memcpy_gb_s(repeats),
        "decode_gb_s": size / _best(lambda: work.decode(codec, chunks, out), repeats) / 1e9,
        "reduce_gb_s": len(reduction.weights) * size / reduce_s / 1e9,
    }


def sweep(size: int, repeats: int, threads: int = 1) -> list[dict[str, Any]]:
    """Measure every encoding of every kind of tensors, compressed on top or not."""
    rows = []
    for name in TENSORS:
        work = Work(name, size)
        for encoding in ENCODINGS:
            for lossless in (False, True):
                if not (lossless and encoding == "top-k"):  # which is never compressed
                    rows.append(measure(work, encoding, lossless, repeats, threads))
    return rows
