from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from typing_extensions import Buffer

_Rule: TypeAlias = str | tuple[str, Mapping[str, float]] | PythonRule | WeighedRule | LoraRule

def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def set_simd_level(level: str) -> None: ...
def set_device(device: Any | None) -> None: ...
def crc32c(data: Buffer, seed: int = 0) -> int: ...
def crc32c_by_each_path(data: Buffer, seed: int = 0) -> list[int]: ...
def chunk_checksums(file: MappedFile, offset: int, length: int, chunk_bytes: int) -> list[int]: ...
def same_bytes(one: Buffer, other: Buffer) -> bool: ...
def find_non_finite(dtype: str, data: Buffer) -> int: ...
def mean(
    dtype: str,
    inputs: Sequence[Buffer],
    weights: Sequence[int],
    out: Buffer,
    base: Buffer | None = None,
) -> None: ...
def reduce_files(
    inputs: Sequence[MappedFile],
    weights: Sequence[int],
    tensors: Sequence[tuple[str, int, Sequence[int], int]],
    out: MappedFile,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
    rule: _Rule = "mean",
) -> tuple[int, int, int] | None: ...
def rules() -> list[tuple[str, int, bool, bool, bool, int, list[str]]]: ...
def combine_wide(
    rule: _Rule,
    dtype: str,
    inputs: Sequence[Buffer],
    weights: Sequence[int],
    out: Buffer,
) -> None: ...
def rule_scratch(rule: _Rule, sources: int) -> int: ...
def survey_scratch(sources: int, chunk_bytes: int) -> int: ...
def finishers() -> list[tuple[str, int, list[str], list[str]]]: ...
def round_state(
    state: MappedFile, offset: int, model: MappedFile, to: int, dtype: str, count: int
) -> None: ...
def finish_mean(
    finisher: Finisher,
    inputs: Sequence[Buffer],
    weights: Sequence[int],
    base: Buffer,
    out: Buffer,
    after: Mapping[str, tuple[MappedFile, int]],
) -> None: ...

class PythonRule:
    def __init__(
        self,
        name: str,
        version: int,
        weighted: bool,
        symmetric: bool,
        least: int,
        make: Callable[[list[float]], Callable[[memoryview, memoryview], None]],
    ) -> None: ...

class WeighedRule:
    def __init__(self, rule: _Rule, equal: bool, max_share: int) -> None: ...

def pair_distances(
    inputs: Sequence[MappedFile],
    tensors: Sequence[tuple[str, int, Sequence[int]]],
    threads: int,
    progress: Callable[[int], None],
) -> tuple[list[float], tuple[int, int, int] | None]: ...
def weigh(examples: Sequence[float], equal: bool, max_share: int) -> list[float]: ...
def recompress(
    terms: Sequence[tuple[float, Buffer, Buffer] | tuple[float, Buffer, Buffer, str]],
    max_rank: int,
    threads: int = 1,
) -> tuple[Any, Any, Any, dict[str, Any]]: ...

class LoraRule:
    def __init__(
        self,
        method: str,
        layout: Layout,
        groups: Sequence[tuple[str, str]],
        max_rank: int,
        figure: bool = True,
        threads: int = 1,
    ) -> None: ...
    def reports(self) -> list[dict[str, Any] | None]: ...

def factor_error(
    weights: Sequence[float],
    pairs: Sequence[tuple[Buffer, Buffer] | tuple[Buffer, Buffer, str]],
    base: tuple[Buffer, Buffer] | tuple[Buffer, Buffer, str] | None = None,
    threads: int = 1,
) -> tuple[float, float, float]: ...

class Layout:
    def __init__(
        self, tensors: Sequence[tuple[str, str, Sequence[int]]], chunk_bytes: int = 1048576
    ) -> None: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def chunk_bytes(self) -> int: ...
    @property
    def chunk_count(self) -> int: ...
    @property
    def tensor_count(self) -> int: ...
    @property
    def tensors(self) -> list[tuple[str, str, tuple[int, ...], int, int]]: ...
    def chunk_range(self, index: int) -> tuple[int, int]: ...
    def locate(self, byte_offset: int) -> tuple[str, int]: ...

class Codec:
    def __init__(
        self,
        layout: Layout,
        encoding: str,
        lossless: bool = False,
        top_k: float = 0.01,
        stages: Sequence[tuple[str, Mapping[str, float]]] = (),
    ) -> None: ...
    def encode(
        self,
        index: int,
        values: Buffer,
        base: Buffer | None = None,
        residual: Buffer | None = None,
    ) -> tuple[int, bytes]: ...
    def decode(
        self, index: int, encoding: int, body: Buffer, out: Buffer, base: Buffer | None = None
    ) -> None: ...
    def carry(
        self, index: int, values: Buffer, residual: Buffer | None, decoded: Buffer, out: Buffer
    ) -> None: ...

def encode_update(
    codec: Codec,
    values: MappedFile,
    values_at: int,
    base: MappedFile,
    base_at: int,
    out: MappedFile,
    residual: MappedFile | None = None,
    lost: MappedFile | None = None,
    threads: int = 1,
) -> tuple[list[int], bytes, list[int], int, list[float], list[float]]: ...

class MappedFile:
    def check_whole(self) -> None: ...
    @staticmethod
    def create(path: str, size: int) -> MappedFile: ...
    @staticmethod
    def open(path: str, writable: bool = False) -> MappedFile: ...
    @staticmethod
    def anonymous(size: int) -> MappedFile: ...
    @property
    def size(self) -> int: ...
    @property
    def path(self) -> str: ...
    def view(self, offset: int = 0, length: int | None = None) -> memoryview: ...
    def release(self, offset: int, length: int) -> None: ...
    def write(self, offset: int, data: Buffer) -> None: ...
    def evict(self) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...

class FlatWriter:
    def __init__(self, file: MappedFile, offset: int, length: int, chunk_bytes: int) -> None: ...
    def write(self, data: Buffer) -> None: ...
    def checksums(self) -> list[int]: ...

class Spill:
    def __init__(
        self, path: str, slot_bytes: int, keep_free: int = 0, extent_bytes: int = ...
    ) -> None: ...
    def begin(self, key: bytes) -> None: ...
    @property
    def used(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...

class Record:
    @staticmethod
    def create(
        path: str, key: bytes, sources: Sequence[tuple[str, bytes, int]], chunk_count: int
    ) -> Record: ...
    @staticmethod
    def open(path: str) -> Record | None: ...
    @property
    def key(self) -> bytes: ...
    @property
    def sources(self) -> list[tuple[str, bytes, int]]: ...
    @property
    def chunk_count(self) -> int: ...
    def at(self, index: int) -> int | None: ...

class Finisher:
    def __init__(
        self,
        layout: Layout,
        name: str,
        options: Mapping[str, float],
        plain: Set[str] = ...,
        before: Mapping[str, tuple[MappedFile, int]] = ...,
        checksums: Mapping[str, Sequence[int]] = ...,
        ema: float | None = None,
    ) -> None: ...
    @property
    def states(self) -> list[tuple[str, Layout]]: ...
    @property
    def chunk_bytes(self) -> int: ...

class CollectorOptions:
    def __init__(
        self,
        budget_bytes: int,
        *,
        stall_ms: int = 2000,
        write_behind: bool = False,
        spill: Spill | None = None,
        spill_after_ms: int = 250,
        codec: Codec | None = None,
        threads: int = 1,
        base_checksums: Sequence[int] = (),
        rule: _Rule = "mean",
        finisher: Finisher | None = None,
        aside: bool = False,
        plain: Set[str] = ...,
        survey: bool = False,
        base_weight: int = 0,
        digest_key: bytes = b"",
        keep_surveyed: bool = False,
    ) -> None: ...

class Collector:
    def __init__(
        self,
        layout: Layout,
        sources: Sequence[tuple[bytes, bytes, int]],
        out: MappedFile,
        out_offset: int,
        base: tuple[MappedFile, int] | None,
        options: CollectorOptions,
        record: Record | None = None,
        states: Mapping[str, tuple[MappedFile, int]] = ...,
        digests: Sequence[bytes] = (),
        own: Sequence[tuple[Layout | None, tuple[MappedFile, int] | None, Codec | None]] = (),
    ) -> None: ...
    @staticmethod
    def open(
        layout: Layout,
        expected: int,
        base: tuple[MappedFile, int] | None,
        options: CollectorOptions,
    ) -> Collector: ...
    @property
    def id(self) -> int: ...
    @property
    def aside(self) -> bool: ...
    @property
    def done(self) -> bool: ...
    @property
    def surveying(self) -> bool: ...
    def digests(self, source: int) -> bytes: ...
    @property
    def distances(self) -> list[list[float]]: ...
    @property
    def window(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...
    @property
    def checksums(self) -> list[int]: ...
    def progress(self) -> tuple[int, int, list[int]]: ...

# What an exchange reports; each field is read-only.

_Event: TypeAlias = (
    CollectorDone
    | SourceRejected
    | SourceStalled
    | OutputBroken
    | RuleFailed
    | NoRoom
    | SetDamaged
    | FrameMalformed
    | PeerUnknown
    | RateExceeded
    | ConnectionsExceeded
)

@final
@dataclass(frozen=True)
class CollectorDone:
    collector: int

@final
@dataclass(frozen=True)
class SourceRejected:
    collector: int
    source: int
    code: str
    message: str

@final
@dataclass(frozen=True)
class SourceStalled:
    collector: int
    source: int
    silent_ms: int

@final
@dataclass(frozen=True)
class OutputBroken:
    collector: int
    message: str

@final
@dataclass(frozen=True)
class RuleFailed:
    collector: int
    message: str
    trace: str

@final
@dataclass(frozen=True)
class NoRoom:
    collector: int
    message: str

@final
@dataclass(frozen=True)
class SetDamaged:
    set_id: bytes
    message: str

@final
@dataclass(frozen=True)
class FrameMalformed:
    peer: bytes
    message: str

@final
@dataclass(frozen=True)
class PeerUnknown:
    peer: bytes

@final
@dataclass(frozen=True)
class RateExceeded:
    peer: bytes
    message: str

@final
@dataclass(frozen=True)
class ConnectionsExceeded:
    peer: bytes
    message: str

class Exchange:
    def publish(
        self,
        set_id: bytes,
        file: MappedFile,
        offset: int,
        length: int,
        chunk_bytes: int,
        checksums: Sequence[int] = (),
    ) -> None: ...
    def publish_encoded(
        self,
        set_id: bytes,
        file: MappedFile,
        offsets: Sequence[int],
        encodings: bytes,
        checksums: Sequence[int] = (),
    ) -> None: ...
    def publish_packed(
        self,
        set_id: bytes,
        file: MappedFile,
        offset: int,
        codec: Codec,
        packed: MappedFile,
        checksums: Sequence[int] = (),
    ) -> None: ...
    def withdraw(self, set_id: bytes) -> None: ...
    def restrict(self, set_id: bytes, audience: int) -> None: ...
    def enrol(self, peer: bytes, audience: int) -> None: ...
    def expel(self, peer: bytes, audience: int) -> None: ...
    def limit_audience(self, audience: int, outgoing: int, control: int) -> None: ...
    def published(self) -> list[bytes]: ...
    def start(self, collector: Collector) -> None: ...
    def add(
        self,
        collector: Collector,
        peer: bytes,
        set_id: bytes,
        weight: int,
        *,
        layout: Layout | None = None,
        base: tuple[MappedFile, int] | None = None,
        codec: Codec | None = None,
    ) -> int: ...
    def survey(self, collector: Collector, sources: Sequence[int]) -> None: ...
    def close(
        self,
        collector: Collector,
        sources: Sequence[int],
        out: MappedFile,
        out_offset: int,
        record: Record | None = None,
        states: Mapping[str, tuple[MappedFile, int]] = ...,
        weights: tuple[Sequence[int], int] | None = None,
    ) -> None: ...
    def cancel(self, collector: Collector) -> None: ...
    def combine(self, collector: Collector) -> None: ...
    def retry(self, collector: Collector, source: int, peer: bytes | None = None) -> None: ...
    def drop(self, collector: Collector, source: int) -> None: ...
    def pulls(self, collector: Collector) -> list[tuple[int, int]]: ...
    def deliver(self, now_ms: int, peer: bytes, header: Buffer, body: Buffer | None) -> int: ...
    def next_out(self, now_ms: int) -> tuple[bytes, bytes, memoryview | None] | None: ...
    def tick(self, now_ms: int) -> int: ...
    def next_event(self) -> _Event | None: ...
    def next_control(self, now_ms: int) -> tuple[bytes, bytes] | None: ...
    def has_event(self) -> bool: ...
    def listening(self) -> None: ...
    def set_limits(
        self,
        outgoing: int,
        control_per_peer: int,
        control: int,
        paced: bool = False,
        unasked: int = 268435456,
    ) -> None: ...
    @property
    def wake_fd(self) -> int: ...
    def clear_wake(self) -> None: ...
    @property
    def outgoing_bytes(self) -> int: ...
    def mute(self, peer: bytes, until_ms: int) -> None: ...
    def discard(self, peer: bytes) -> None: ...
    def heartbeat(self, interval_ms: int) -> None: ...
    def silent(self, now_ms: int) -> bool: ...
    def dialled(self, now_ms: int) -> None: ...
    def reconnected(self, now_ms: int) -> None: ...
    def sent(self, size: int, now_ms: int) -> None: ...
    def moved(self, received: int, acked: int, now_ms: int) -> None: ...
    def last_heard(self, peer: bytes) -> int | None: ...
    def silent_ms(self, peer: bytes, now_ms: int) -> int | None: ...
    def busy_until(self, peer: bytes) -> int: ...
    def unreachable(self, peer: bytes) -> None: ...
    def forget(self, peer: bytes) -> None: ...
    def block(self, user: bytes, blocked: bool) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def stats_of(self, audience: int) -> dict[str, int]: ...
    def capsule(self) -> Any: ...
