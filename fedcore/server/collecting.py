"""The collection under way: what is pulled, for whom it is kept or begun anew, and what the core says of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from fedcore import __version__, protocol
from fedcore._core import (
    Collector,
    CollectorDone,
    CollectorOptions,
    Layout,
    NoRoom,
    OutputBroken,
    RuleFailed,
    SourceRejected,
    SourceStalled,
    Spill,
)
from fedcore.adapters.forms import ranks_of
from fedcore.config import RunConfig
from fedcore.errors import ConfigError, RuleError, StorageError
from fedcore.roles import pairs_of
from fedcore.rules.registry import weighed
from fedcore.server.rounds.actions import Participant, PullAhead, StartCollect
from fedcore.server.rounds.verdicts import Verdict, decide
from fedcore.server.storage.scratch import Scratch
from fedcore.server.storage.store import Store
from fedcore.transport.link import CollectorEvent, DataEvent

from .collection import Collection, CollectionSetting, Own, open_spill, update_codec
from .rule import rule_of
from .run_link import RunLink
from .spill_room import lack_of_room
from .versions import Versions, declared_layout

__all__ = ["Collecting", "Reduced", "Rejected", "Stalled"]

DIGEST_KEY_BYTES: Final = 1032
_PART: Final = "part"
"""What is collected where updates hold a part of the model: a file beside the version's until its commit."""

logger = logging.getLogger("fedcore.server")


@dataclass(frozen=True)
class Reduced:
    """All chunks are reduced, or surveyed."""


@dataclass(frozen=True)
class Rejected:
    """What a site sends is no valid update, or initial model."""

    site: str
    reason: str


@dataclass(frozen=True)
class Stalled:
    """Nothing came of what a site was asked for, for so long."""

    site: str
    silent_ms: int


class Collecting:
    """The collection of the version under way, from the first update that is pulled ahead to its commit.

    Args:
        config, store, versions: the run's.
        link: over which chunks come.
        memory: what they may take.

    Attributes:
        running: the collection; None before the first update and after the commit.
        no_room: what `look_at_room` found; empty if nothing is amiss.
        judged: what a rule of several passes has decided of the updates that are reduced; None before it has.
    """

    def __init__(
        self, config: RunConfig, store: Store, versions: Versions, link: RunLink, memory: int
    ) -> None:
        self.running: Collection | None = None
        self._config = config
        self._store = store
        self._versions = versions
        self._link = link
        self._memory = memory
        self._parked = False  # it waits for a decision on who takes part
        self._spill: Spill | None = None
        self._said_no_room = False
        self.no_room = ""
        self.judged: Verdict | None = None
        self._is_new = False
        self._fits: tuple[int, ...] = ()  # ranks that all sites may have, as far as memory goes
        self._version = -1  # that `start` was called for last

    def scratch(self, version: int) -> Scratch:
        """Return where a version is written, with all that its bytes depend on but layout and participants."""
        optimizer, rule = self._versions.optimizer, rule_of(self._config)
        buffers = () if rule.folds else self._versions.roles.buffers or ()
        of = {
            "fedcore": __version__,
            "run": self._store.run_id,
            "version": version,
            "base": self._versions.checksum,
            **rule.key(),
            **self._config.model_dump(mode="json", include={"aggregation", "transfer"}),
            **optimizer.key(),
            **({"buffers": buffers} if buffers else {}),
        }
        model = self._versions.model
        path = self._store.scratch(version)
        if model is None:
            apart = self._versions.factors.ranked
        else:
            apart = self._versions.update_layout(version) is not model.layout
        if apart:
            path = self._store.state_scratch(version, _PART)
        return Scratch(
            path,
            self._store.record(version),
            of,
            self._versions.metadata(version),
            optimizer.scratches(version, None if model is None else model.layout),
        )

    # --- what is decided ---

    def pull_ahead(self, action: PullAhead, peers: Mapping[str, bytes], most: int) -> None:
        """Pull an update ahead; a version holds at most ``most`` of them."""
        if self.running is None:
            self.running = Collection(self._prepare(action.version), most)
        if self.running.wants(action.participant.site):
            self.running.offer(action.participant, peers[action.participant.site])
            self._link.kick()

    def look_at_room(self, round_: int) -> None:
        """Look before a round whether the spill file can keep all updates until it is decided which of them count.

        What finds no room is pulled once more, so the round goes on in any case.
        """
        before, model = self.no_room, self._versions.model
        if model is not None:
            states = self._versions.optimizer.layouts(model.layout).values()
            room = sum(of.total_bytes for of in states)
            self.no_room = lack_of_room(self._config, self._store.run_id, model.layout, room)
        if self.no_room not in ("", before):
            logger.warning("round %d: %s", round_, self.no_room)

    def lack_of_memory(self, site: str, declare: protocol.Declare) -> str:
        """Say that memory does not hold the factors of this site's rank beside those of the others.

        Only where products of factors are looked at: a module's factors of all sites are needed at the same time.
        Those of as many sites are looked at as a round has: with the ranks that they have said, or with this one's
        while no site has another.

        Raises:
            LayoutError: the tensors make no layout.
        """
        factors = self._versions.factors
        if not factors.measured:
            return ""
        own, pairs = declared_layout(declare, self._store.chunk_bytes), pairs_of(declare)
        model, most = factors.model_layout(own, pairs), self._config.participants.trained
        here = tuple(ranks_of(declare.tensors, pairs))
        others = [factors.ranks(other) for other in factors.known if other != site]
        # A site that has left may have said them of an adapter of other modules.
        others = [ranks for ranks in others if len(ranks) == len(here)]
        mixed = any(ranks != here for ranks in others)
        if mixed:
            known = [factors.ranked_layout(model, pairs, ranks) for ranks in others]
            known.sort(key=lambda layout: layout.total_bytes, reverse=True)
            layouts = [own, *known][:most]
        else:  # looked at once, however many sites there are
            layouts = [own] * most
            if self._fits == here:
                return ""
        room = self._store.untouched(model.total_bytes), 0
        rule = factors.rule(model, self._config.reducer_threads, pairs)
        try:
            Collector(
                model,
                [(b"", number.to_bytes(16, "big"), 1) for number in range(len(layouts))],
                *room,
                room,
                CollectorOptions(self._memory, rule=rule, threads=self._config.reducer_threads),
                own=[(layout, None, None) for layout in layouts],
            )
        except ConfigError as error:
            return (
                f"server.memory is too little for the adapter of site {site!r}: {error}; raise server.memory, or "
                "take a lower rank at the site"
            )
        if not mixed:
            self._fits = here
        return ""

    def start(
        self,
        action: StartCollect,
        peers: Mapping[str, bytes],
        declared: Mapping[str, protocol.Declare],
    ) -> bool:
        """Reduce these participants' updates, and go on with what is here of them.

        Args:
            action: whose updates count.
            peers: each site's routing id.
            declared: what sites have declared; the initial model has the layout that its site's tensors make.

        Returns whether all is reduced, or surveyed, already: it was while the collection was parked.
        """
        self._version = action.version
        if self._versions.model is not None and rule_of(self._config).several is not None:
            return self._start_several(action, peers)
        running = self.running
        if running is not None and running.open:
            if running.close(action.participants, peers):
                self._link.kick()
                return False
        elif running is not None and running.narrow(action.participants, peers):
            self._parked = False
            self._link.kick()
            return running.collector.done
        self.cancel()
        setting = self._prepare(action.version, declared.get(action.participants[0].site))
        self.running = Collection.of(setting, action.participants, peers)
        self._link.kick()
        return False

    def _start_several(self, action: StartCollect, peers: Mapping[str, bytes]) -> bool:
        """Start where a rule of several passes decides which updates count, or has decided."""
        verdict = self.verdict(action.version)
        if verdict is not None and verdict.surveyed(action.participants):
            if not verdict.holds_for(action.participants):
                verdict = verdict.among(rule_of(self._config), action.participants)
                self._keep(verdict)
            self.judged = verdict
            return self._start_combining(verdict, peers)
        self.judged = None
        if self._store.verdict(action.version) is not None:
            self._store.forget_verdict(action.version)
        running = self.running
        if running is not None and running.open:
            if running.close(action.participants, peers):
                self._link.kick()
                return False
        elif (
            running is not None and running.surveying and running.narrow(action.participants, peers)
        ):
            self._parked = False
            self._link.kick()
            return running.collector.done
        self.cancel()
        self.running = Collection(self._prepare(action.version), len(action.participants))
        self.running.close(action.participants, peers)
        self._link.kick()
        return False

    def _start_combining(self, verdict: Verdict, peers: Mapping[str, bytes]) -> bool:
        running, base_weight = self.running, verdict.decision.base
        if (
            running is not None
            and running.file is not None
            and running.scratch.base_weight == base_weight
            and running.narrow(verdict.kept, peers)
        ):
            self._parked = False
            self._link.kick()
            return running.collector.done
        self.cancel()
        setting = replace(
            self._prepare(self._version), digest_key=verdict.key, digests=verdict.kept_digests
        )
        setting.scratch.base_weight = base_weight
        self.running = Collection.of(setting, verdict.kept, peers)
        self._link.kick()
        return False

    @property
    def surveyed(self) -> bool:
        """Whether updates are surveyed, and `judge` is to decide which of them count."""
        return self.running is not None and self.running.surveying and self.running.collector.done

    def judge(self) -> None:
        """Decide which updates count, keep that in the journal, and reduce them.

        Raises:
            RuleError: none of them counts.
            StorageError: the journal or the new model can't be written.
        """
        running = self.running
        assert running is not None
        rule = rule_of(self._config)
        verdict = replace(
            decide(rule, running.participants, running.collector.distances),
            key=running.digest_key,
            digests=running.digests,
        )
        self._keep(verdict)
        running.combine(verdict.kept, verdict.decision.base)
        self._link.kick()

    def _keep(self, verdict: Verdict) -> None:
        self._store.keep_verdict(self._version, verdict)
        self.judged, self._is_new = verdict, True

    def new_verdict(self) -> Verdict | None:
        """Return what was decided since the last call; None if nothing was."""
        found, self._is_new = self.judged if self._is_new else None, False
        return found

    def verdict(self, version: int) -> Verdict | None:
        """Return what the run's rule has decided of the updates of a version; None where it has not.

        What another version of the rule had decided, before an upgrade, does not hold: it is decided anew.
        """
        rule = rule_of(self._config)
        if version == 0 or rule.several is None:
            return None
        found = self._store.verdict(version)
        return found if found is not None and found.rule == rule.recorded else None

    def decided(self, version: int) -> tuple[Participant, ...]:
        """Return whose updates a killed server was collecting, if it can be gone on with; else nobody's."""
        verdict = self.verdict(version)
        return self.scratch(version).decided() if verdict is None else verdict.counted

    def park(self) -> None:
        """Have it wait for a decision on who takes part: the next collection may go on with what is here."""
        self._parked = True

    def lost(self, site: str) -> None:
        """Note that a site is gone."""
        if self.running is not None:
            self.running.lost(site)

    def pulls(self) -> dict[str, tuple[int, int]]:
        """Return, of each site that is pulled, how many chunks are missing of what it was asked for, and how many
        came."""
        return {} if self.running is None else self.running.pulls()

    def take(self) -> Collection:
        """Return the collection, whose chunks are all reduced, to be committed."""
        running, self.running = self.running, None
        assert running is not None
        return running

    def cancel(self) -> None:
        """Stop pulling; nothing of it counts."""
        self._parked = False
        if self.running is not None:
            self.running.cancel()
            self.running = None

    def close(self) -> None:
        """Stop pulling for good, and let go of the spill file."""
        self.cancel()
        self._spill = None

    def _prepare(self, version: int, initial: protocol.Declare | None = None) -> CollectionSetting:
        """Return what the collection of a version works with; ``initial`` describes the run's first one."""
        model = self._versions.model
        base, checksums = None, list[int]()
        if model is None:
            assert initial is not None
            layout = declared_layout(initial, self._store.chunk_bytes)
            self._versions.factors.take(initial)
            whole = self._versions.factors.model_layout(layout)
            self._versions.cards = self._versions.factors.cards(initial.files, whole)
        else:
            whole, layout = model.layout, self._versions.update_layout(version)
            self._versions.roles.settle()
        self._versions.release_superseded()
        optimizer, rule = self._versions.optimizer, rule_of(self._config)
        surveys = model is not None and rule.several is not None
        finisher = optimizer.finisher(layout)  # of the initial model it is asked to refuse it early
        kept = {} if model is None else optimizer.layouts(layout)
        sizes = {name: of.total_bytes for name, of in kept.items()}
        if layout is not whole:
            sizes[_PART] = layout.total_bytes
        self._store.announce(version, whole.total_bytes, sizes)
        if self._spill is None:
            room = sum(sizes.values())
            self._spill = open_spill(self._config, self._store.run_id, whole, room)
        if model is not None:
            base, checksums = self._versions.base_of(layout)
        combine = rule.core
        if base is not None and self._versions.factors.measured:
            lora = self._versions.factors.start(layout, self._config.reducer_threads)
            combine = weighed(lora, rule.weighing)
        return CollectionSetting(
            self._link.exchange,
            layout,
            self.scratch(version),
            base=base,
            checksums=checksums,
            codec=update_codec(self._config.transfer, layout, initial=base is None),
            memory=self._memory,
            spill=self._spill,
            threads=self._config.reducer_threads,
            # The initial model is one site's, as it is.
            rule="mean" if base is None else combine,
            finisher=None if base is None else finisher,
            plain=frozenset() if base is None or rule.folds else optimizer.plain(layout),
            survey=surveys,
            keep_surveyed=rule.several is not None and rule.several.keeps_most,
            own=self._own_layouts(layout) if base is not None else None,
            digest_key=os.urandom(DIGEST_KEY_BYTES) if surveys else b"",
        )

    def _own_layouts(self, model: Layout) -> Callable[[str], Own] | None:
        """Return what gives the layout of each site's updates, where they have ranks of their own."""
        factors, transfer = self._versions.factors, self._config.transfer

        def own(site: str) -> Own:
            layout = factors.own_layout(model, site)
            return layout, update_codec(transfer, layout, initial=False)

        return own if factors.ranked else None

    # --- what the core says ---

    def concerns(self, event: DataEvent) -> bool:
        """Whether an event is of the collection that runs."""
        running = self.running
        if running is None or not isinstance(event, CollectorEvent):
            return False
        return event.collector == running.collector.id

    def handle(self, event: DataEvent) -> Reduced | Rejected | Stalled | None:
        """Return what an event of this collection comes to; None if nothing, or if it is of another one.

        Raises:
            StorageError: the new model can't be written.
            RuleError: the rule has failed.
        """
        running = self.running
        if running is None or not self.concerns(event):
            return None
        match event:
            case OutputBroken():
                raise StorageError(f"the new model can't be written: {event.message}")
            case RuleFailed():
                raise RuleError(event.message, trace=event.trace)
            case NoRoom():
                if not self._said_no_room:
                    logger.warning("sites that are ahead are held back: %s", event.message)
                self._said_no_room = True
            case SourceRejected():
                return self._rejected(running, event.source, event.message)
            case CollectorDone() if running.collector.done and not self._parked:
                return Reduced()
            case SourceStalled() if not self._parked:
                source = running.source(event.source)
                return None if source is None else Stalled(source.site, event.silent_ms)
        return None

    def _rejected(self, running: Collection, number: int, reason: str) -> Rejected | None:
        source = running.source(number)
        if source is None:
            return None
        running.reject(source)
        # While it is parked nothing follows: found again once it is decided who takes part.
        return None if self._parked else Rejected(source.site, reason)
