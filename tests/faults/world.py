"""A server and its sites without sockets: frames wait in a list and arrive in seeded order; the clock is a number.

The server side does what `fedcore.server.run` does with the core's events: a site that was rejected, or sent
nothing of what was asked for in `LOST_MS`, is left out, and the rest is collected again from the start. A server
that is killed is followed by one that goes on with its files.
"""

from __future__ import annotations

import random
import resource
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedcore._core import (
    Codec,
    Collector,
    CollectorDone,
    CollectorOptions,
    Exchange,
    Layout,
    NoRoom,
    Record,
    SourceRejected,
    SourceStalled,
    Spill,
)
from fedcore.encoding import EncodedUpdate, UpdateEncoder
from fedcore.errors import NonFiniteError, WeightError
from fedcore.layout import TensorSpec, compare_layouts, table
from fedcore.model_file import ModelFile, create_model, reopen_model
from fedcore.protocol import Kind, read_header
from fedcore.protocol import frame_header as header
from fedcore.rules.registry import CoreRule
from fedcore.transport.link import CollectorEvent

from ..support.offering import offer
from .reference import CHUNK, TOP_K

PAGE = 4096
LOST_MS = 20_000
SPILL_EXTENT = 4 * CHUNK
MAX_STEPS = 20_000


def chunk_frame(peer: bytes, set_id: bytes, index: int, body: bytes) -> Frame:
    """A well-formed CHUNK that no publisher sent."""
    return Frame(peer, header(Kind.CHUNK, set_id, index, 0, body), body, genuine=False)


@dataclass(frozen=True)
class Frame:
    """A frame on its way to the server.

    Attributes:
        due: when it may arrive at the earliest, in ms.
        genuine: whether a site's publisher made it; only these are interfered with.
        only_after: whether it is sent only once the server has accepted the true chunk of its index.
    """

    peer: bytes
    head: bytes
    body: bytes = b""
    due: int = 0
    genuine: bool = True
    only_after: bool = False

    @property
    def kind(self) -> int:
        return self.head[5]

    @property
    def set_id(self) -> bytes:
        return self.head[8:24]

    @property
    def index(self) -> int:
        return int.from_bytes(self.head[24:32], "little")


Interference = Callable[["World", "Site", Frame], "list[Frame]"]


@dataclass
class Site:
    """A site's data plane, and what interferes with the frames that it sends.

    Attributes:
        declared: the tensors that it says it has, where they are not the run's.
        encode: gives the update as encoded chunks, or None where it leaves as it is.
    """

    name: str
    weight: int
    update: bytearray
    declared: list[TensorSpec] | None = None
    encode: Callable[[ModelFile], EncodedUpdate | None] = lambda _: None
    process: int = 0
    offer: int = 0
    chunks_missing: int = 0
    gone: bool = False
    withdrawn: bool = False
    deaf_until: int = 0
    requests_lost: set[int] = field(default_factory=set)
    interferences: list[Interference] = field(default_factory=list)
    exchange: Exchange = field(default_factory=Exchange)

    @property
    def peer(self) -> bytes:
        return f"{self.name}-process-{self.process}".encode().ljust(16, b".")

    @property
    def set_id(self) -> bytes:
        return f"{self.name}-update-{self.offer}".encode().ljust(16, b".")

    def publish(self) -> None:
        """Offer the update, or all of it but the last chunks, to a fresh data plane."""
        self.exchange = Exchange()
        length = len(self.update)
        chunks = -(-length // CHUNK) - self.chunks_missing
        held = create_model(None, Layout([("u", "U8", [length])], CHUNK))
        held.view("u")[:] = self.update
        sent = self.encode(held)
        if self.withdrawn:
            return
        whole = sent if sent is not None else EncodedUpdate.raw(held)
        offsets, encodings = whole.offsets[: chunks + 1], whole.encodings[:chunks]
        part = EncodedUpdate(whole.file, offsets, encodings, whole.checksums[:chunks])
        offer(self.exchange, self.name, self.set_id, part)


class World:
    """One collection from its first request to its end.

    Attributes:
        rejections: why each site that was left out was left out.
        malformed: how many malformed frames reached the server.
        stalls: how often the server asked silent sites again.
        asked: chunk indices that were asked for, by set id.
        spill: where chunks wait of sites that are ahead, if they may.
        threads: how many chunks the server reduces at the same time.
        ahead: whether sites are added to an open collection one by one, which is closed some time later.
        encoding: how updates travel; other than raw only with a base.
        rule: what combines the updates.
        disk_full: from now on no file may grow beyond what a model and one extent of the spill file take.
    """

    def __init__(
        self,
        layout: Layout,
        sites: list[Site],
        dice: random.Random,
        budget: int,
        base: bytes | None,
        *,
        spilling: bool = False,
        ahead: bool = False,
        threads: int = 1,
        encoding: str = "raw",
        rule: CoreRule = "mean",
    ) -> None:
        self.rule = rule
        self.threads = threads
        self.encoding = encoding
        self.ahead = ahead
        self.layout = layout
        self.dice = dice
        self.budget = budget
        self.server = Exchange()
        self.sites = sorted(sites, key=lambda site: site.name)
        self.now = 0
        self.rejections: dict[str, tuple[str, str]] = {}
        self.malformed = 0
        self.stalls = 0
        self.asked: dict[bytes, set[int]] = {}
        self.result: bytes | None = None
        self.collector: Collector | None = None
        self.collecting: list[Site] = []
        self.added: list[Site] = []
        self.is_open = False
        self.kills = 0
        self.torn = False
        self.disk_full = False
        self._folder = tempfile.TemporaryDirectory(prefix="fedcore-faults-")
        self._accepted: set[tuple[bytes, int]] = set()
        self._to_server: list[Frame] = []
        self._to_sites: list[tuple[bytes, bytes]] = []
        self.spill = self._open_spill() if spilling else None
        self._base = None
        if base is not None:
            self._base = create_model(None, layout)
            self._base.file.view(self._base.data_offset)[:] = base
        for site in self.sites:
            site.encode = self._encode
            site.publish()

    def _encode(self, update: ModelFile) -> EncodedUpdate | None:
        """What a site does before it publishes: an update with NaN leaves as it is."""
        if self.encoding == "raw":
            return None
        assert self._base is not None
        places = update.file, update.data_offset, self._base.file, self._base.data_offset
        try:
            return UpdateEncoder(self.layout, self.encoding, top_k=TOP_K).encode(1, *places)
        except NonFiniteError:
            return None

    @property
    def _codec(self) -> Codec | None:
        return None if self.encoding == "raw" else Codec(self.layout, self.encoding)

    @property
    def _options(self) -> CollectorOptions:
        return CollectorOptions(
            self.budget,
            rule=self.rule,
            spill=self.spill,
            codec=self._codec,
            threads=self.threads,
        )

    # --- what the server's process does ---

    def collect(self) -> None:
        """Begin a collection of all sites that were not left out, from the first chunk on."""
        if self.collector is not None:
            self.server.cancel(self.collector)
            self.collector = None
        self._accepted.clear()
        self.collecting = [s for s in self.sites if s.name not in self.rejections]
        for site in self.collecting:
            if site.declared is not None:
                difference = compare_layouts(site.declared, table(self.layout), site.name, "all")
                assert difference is not None
                self.leave_out(site, "layout", difference)
                return
        if self.collecting:
            self._begin(fresh=True)

    def _begin(self, *, fresh: bool) -> None:
        if not self.ahead or not (fresh or self.is_open):
            self._pull(fresh=fresh)
            return
        self.added, self.is_open = [], True
        base = None if self._base is None else (self._base.file, self._base.data_offset)
        self.collector = Collector.open(
            self.layout,
            len(self.collecting),
            base,
            self._options,
        )
        self.server.start(self.collector)

    def _open_further(self) -> None:
        """Add another site to the open collection, or close it once all are there."""
        assert self.collector is not None
        waiting = [site for site in self.collecting if site not in self.added]
        if waiting:
            site = self.dice.choice(waiting)
            try:
                number = self.server.add(self.collector, site.peer, site.set_id, site.weight)
            except WeightError as error:
                self.leave_out(site, "weight", str(error))
                return
            assert number == len(self.added)
            self.added.append(site)
            return
        self.out, record = self._files(fresh=True)
        order = [self.added.index(site) for site in self.collecting]
        self.server.close(self.collector, order, self.out.file, self.out.data_offset, record)
        self.server.tick(self.now)
        self.is_open = False

    def kill_server(self) -> None:
        """Another server goes on with the collection; what is on its way reaches that one."""
        self.kills += 1
        self.server = Exchange()
        self.malformed = 0
        self._accepted.clear()
        if self.spill is not None:
            self.spill = self._open_spill()
        if self.collector is not None:
            self._begin(fresh=False)

    def tear(self) -> None:
        """Of one file that a server leaves, a page is not what was written to it."""
        self.torn = True
        names = ("out", "record", f"spill-{self.kills}", f"spill-{self.kills}-index")
        files = [Path(self._folder.name) / name for name in names]
        there = [path for path in files if path.exists() and path.stat().st_size]
        if not there:
            return
        path = self.dice.choice(there)
        pages = -(-path.stat().st_size // PAGE)
        at = PAGE * self.dice.choice([pages - 1, self.dice.randrange(pages)])
        with path.open("r+b") as file:
            file.seek(at)
            written = file.read(PAGE)
            begin = self.dice.randrange(len(written))  # what is behind did not reach the disk
            file.seek(at + begin)
            file.write(self.dice.choice([bytes, self.dice.randbytes])(len(written) - begin))

    def _open_spill(self) -> Spill:
        """The spill file of this server, with what the one before left: its own would go with that object."""
        old, new = (Path(self._folder.name) / f"spill-{n}" for n in (self.kills - 1, self.kills))
        for end in ("", "-index"):
            left = old.with_name(old.name + end)
            if left.exists():
                shutil.copyfile(left, new.with_name(new.name + end))
        spill = Spill(str(new), CHUNK, 0, extent_bytes=SPILL_EXTENT)
        spill.begin(bytes(64))
        return spill

    def _files(self, *, fresh: bool) -> tuple[ModelFile, Record]:
        out, noted = Path(self._folder.name) / "out", Path(self._folder.name) / "record"
        if not fresh:
            file, record = reopen_model(out, self.layout), Record.open(str(noted))
            if file is not None and record is not None:
                return file, record
            assert self.torn, "what was left is not whole"
        out.unlink(missing_ok=True)
        file = create_model(out, self.layout)
        return file, Record.create(str(noted), bytes(64), self.weighed(), self.layout.chunk_count)

    def weighed(self) -> list[tuple[str, bytes, int]]:
        """Whose updates are reduced, and what they weigh."""
        return [(s.name, s.set_id, s.weight) for s in self.collecting]

    def _pull(self, *, fresh: bool) -> None:
        self.added, self.is_open = list(self.collecting), False
        base = None if self._base is None else (self._base.file, self._base.data_offset)
        try:
            self.out, record = self._files(fresh=fresh)
            self.collector = Collector(
                self.layout,
                [(s.peer, s.set_id, s.weight) for s in self.collecting],
                self.out.file,
                self.out.data_offset,
                base,
                self._options,
                record=record,
            )
        except WeightError as error:
            refused = next(s for s in self.collecting if f"weight {s.weight}:" in str(error))
            self.leave_out(refused, "weight", str(error))
            return
        self.server.start(self.collector)

    def leave_out(self, site: Site, code: str, message: str) -> None:
        """Take a site out and collect the others again."""
        assert site.name not in self.rejections, "a site was rejected twice"
        self.rejections[site.name] = (code, message)
        self.collect()

    def _events(self) -> None:
        while (event := self.server.next_event()) is not None:
            if self.collector is None or not isinstance(event, CollectorEvent):
                continue
            if event.collector != self.collector.id:
                continue
            if isinstance(event, CollectorDone):
                assert self.collector.done
                self.done()
            elif isinstance(event, SourceRejected):
                self.leave_out(self.added[event.source], event.code, event.message)
            elif isinstance(event, NoRoom):
                assert self.disk_full
            elif isinstance(event, SourceStalled):
                self.stalls += 1
                if event.silent_ms >= LOST_MS:
                    self.leave_out(self.added[event.source], "lost", "")
            else:
                raise AssertionError(event)
        if self.result is None:
            self._check_alive()

    def done(self) -> None:
        """All chunks are reduced."""
        self.result = bytes(self.out.file.view(self.out.data_offset))

    def _check_alive(self) -> None:
        """Leave out who fell silent, as far as nothing of it can be on its way; others are heard each second."""
        for site in self.collecting:
            if not site.gone:
                continue
            heard = self.server.last_heard(site.peer) or 0
            if self.now > max(heard + LOST_MS, self.server.busy_until(site.peer)):
                self.leave_out(site, "lost", "")
                return

    # --- the wires ---

    def run(self) -> None:
        """Run until the collection is done or no site is left."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            self._run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def fill_disk(self) -> None:
        """No file may grow any more."""
        self.disk_full = True
        most = max(SPILL_EXTENT, self.layout.total_bytes + CHUNK)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )

    def _run(self) -> None:
        self.collect()
        for _ in range(MAX_STEPS):
            if self.result is not None or not self.collecting:
                break
            while self._send():
                pass
            due = [i for i, frame in enumerate(self._to_server) if frame.due <= self.now]
            choice = self.dice.randrange(len(due) + len(self._to_sites) or 1)
            if choice < len(due):
                self.arrive(self._to_server.pop(due[choice]))
            elif self._to_sites:
                self._ask(*self._to_sites.pop(choice - len(due)))
            elif self.collecting and not self.is_open:
                self._wait()
            if self.collector is not None and self.is_open and self.dice.random() < 0.2:
                self.now += self.dice.choice([0, 50, 2000])
                self.server.tick(self.now)
                self._open_further()
            self._events()
        assert self.result is not None or not self.collecting, "the collection never ended"
        assert self.server.stats()["dropped"] == self.malformed

    def _send(self) -> bool:
        """Put what both sides have to send on its way; whether there was anything."""
        sent = False
        while (request := self.server.next_out(self.now)) is not None:
            peer, head, body = request
            assert body is None
            sent = True
            get = read_header(head)
            asked = range(get.index, get.index + get.count)
            self.asked.setdefault(get.set_id, set()).update(asked)
            self._to_sites.append((peer, head))
        for site in self.sites:
            while (reply := site.exchange.next_out(self.now)) is not None:
                frames = [Frame(site.peer, reply[1], bytes(reply[2] or b""), self.now)]
                for interfere in site.interferences:
                    frames = [
                        passed
                        for frame in frames
                        for passed in (interfere(self, site, frame) if frame.genuine else [frame])
                    ]
                if not site.gone and site.deaf_until <= self.now:
                    self._to_server += frames
                sent = True
        return sent

    def arrive(self, frame: Frame) -> None:
        """The server receives a frame."""
        key = (frame.set_id, frame.index)
        if frame.only_after and key not in self._accepted:
            return
        before = self.collector.progress()[2] if self.collector is not None else []
        verdict = self.server.deliver(self.now, frame.peer, frame.head, frame.body or None)
        self.malformed += verdict == 3
        if self.collector is not None and self.collector.progress()[2] != before:
            self._accepted.add(key)

    def _ask(self, peer: bytes, head: bytes) -> None:
        get = read_header(head)
        first, count = get.index, get.count
        for site in self.sites:
            if site.peer != peer or site.gone or site.deaf_until > self.now:
                continue
            lost = site.requests_lost & set(range(first, first + count))
            site.requests_lost -= lost
            if not lost:
                site.exchange.deliver(self.now, b"server", head, None)

    def _wait(self) -> None:
        """Nothing can arrive now: go to the next frame's time or the next timer."""
        collecting = self.collector
        left = self.server.tick(self.now)
        self._events()
        if self.result is not None or self.collector is not collecting or self._send():
            return  # it reduced what was there
        times = [frame.due for frame in self._to_server]
        if left >= 0:
            times.append(self.now + max(1, left))
        assert times, "nothing is under way and no timer runs"
        self.now = max(self.now, min(times))
        self.server.tick(self.now)

    # --- what a site's process does ---

    def restart(self, site: Site) -> None:
        """The site's process is another one: it offers all again under new ids, and all is collected again."""
        site.process += 1
        site.offer += 1
        site.publish()
        if site.name not in self.rejections:
            self.collect()

    def reconnect(self, site: Site) -> None:
        """The same update under another routing id; what was under way to the server is lost."""
        self._to_server = [frame for frame in self._to_server if frame.peer != site.peer]
        site.process += 1
        if self.collector is not None and site in self.added:
            self.server.retry(self.collector, self.added.index(site), site.peer)
