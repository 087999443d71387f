"""What a site says of its model before it takes part: it is compared with the run and with the other sites."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from fedcore import protocol
from fedcore.config import RunConfig
from fedcore.errors import ConfigError, FedcoreError, LayoutError, StorageError
from fedcore.files.opening import CARD
from fedcore.layout import FLOATS, compare_layouts, layout_hash, table
from fedcore.roles import buffers_of, pairs_of
from fedcore.server.storage.store import Store
from fedcore.words import plural

from .access import Access
from .agreement import Agreement, Found
from .collecting import Collecting
from .peers import Peers
from .rule import rule_of
from .run_link import RunLink
from .versions import Versions, declared_layout

__all__ = ["Declaring"]

_TENSORS_NAMED: Final = 2


class Declaring:
    """Accepts or refuses what sites declare.

    Args:
        config: the run file.
        link, people: how sites are answered; who is there, and how a site is put out.
        files: the run's files and models, and the collection under way.
        report: reports a problem of a site, and its end with an empty text.

    Attributes:
        declared: what each site has declared while there was no model.
    """

    def __init__(
        self,
        config: RunConfig,
        link: RunLink,
        people: tuple[Peers, Callable[[bytes, str, str, str], None]],
        files: tuple[Store, Versions, Collecting],
        report: Callable[[str, str], None],
    ) -> None:
        self._config = config
        self._folds = rule_of(config).folds
        self._link = link
        self._peers, self._put_out = people
        self._store, self._versions, self._collecting = files
        self._report = report
        self.declared: dict[str, protocol.Declare] = {}
        self._agreement = Agreement(
            self._store.files,
            strict=config.model.same_base == "strict",
            memory=self._store,
            owner=self._whose_model,
            ranks=self._versions.factors.ranked,
        )
        self._versions.roles.say(self._agreement.buffers)

    def forget(self, site: str) -> None:
        """Compare nobody with a site any more: its key was revoked."""
        self._agreement.forget(site)
        self._versions.roles.say(self._agreement.buffers)

    def forget_revoked(self, access: Access) -> None:
        """Forget the sites whose keys were revoked while no server worked on the run."""
        for site in self._agreement.sites():
            if not access.knows(site):
                self.forget(site)

    def take(self, peer: bytes, site: str, declare: protocol.Declare) -> bool:
        """Accept or refuse what a site declares, and tell it so; returns whether it is accepted."""
        found = self._compared(peer, site, declare)
        if found is None:
            return False
        refusal = self._misfit(site, declare)
        if refusal is not None:
            self._put_out(peer, site, "layout", refusal)
            return False
        model, factors = self._versions.model, self._versions.factors
        layout = None
        if model is None or factors.ranked:
            layout = declared_layout(declare, self._store.chunk_bytes)
        if model is not None:
            factors.say(declare)
        elif layout is not None and not self._has_room(peer, site, self._first_bytes(declare)):
            return False
        factors.keep_ranks(site, declare)
        self._agreement.note(site, declare)
        self._versions.roles.say(self._agreement.buffers)
        for text in found.warnings:
            self._peers.replies.tell(site, "%s: %s", text)
        for text in found.notes:
            self._peers.replies.tell(site, "%s: %s", text, level=logging.INFO)
        if model is None:
            seen = next((d for d in self.declared.values() if d.tensors == declare.tensors), None)
            if seen is not None:  # a table that is kept once for all sites
                declare = declare.model_copy(
                    update={"tensors": seen.tensors, "packed": seen.packed}
                )
            self.declared[site] = declare
        elif CARD in declare.files:
            self._store.add_file(CARD, declare.files[CARD])
        hash_ = self._versions.layout_hash if layout is None else layout_hash(layout)
        warnings = [text[:4096] for text in found.warnings]
        self._link.send(peer, protocol.Accepted(layout_hash=hash_, warnings=warnings))
        return True

    def _misfit(self, site: str, declare: protocol.Declare) -> str | None:
        """Say why a site's tensors are not those of the run's model, or can't become it; else None."""
        model, factors = self._versions.model, self._versions.factors
        try:
            if model is not None:
                difference = compare_layouts(
                    factors.model_form(declare),
                    table(model.layout),
                    f"site {site}",
                    "the global model",
                    limit=_TENSORS_NAMED,
                )
                if difference is not None:
                    return f"the model's tensors differ: {difference}; {self._whose_model()}"
            else:
                if (unlike := self._unlike_declared(site, declare)) is not None:
                    return unlike
                self._store.check_possible(declared_layout(declare).total_bytes)
            return self._collecting.lack_of_memory(site, declare) or None
        except FedcoreError as error:
            return str(error)

    def _compared(self, peer: bytes, site: str, declare: protocol.Declare) -> Found | None:
        """Return what is unlike other sites and the run, and may be; None if the site was put out."""
        try:
            # Else one site of many could name buffers, and so take them from a robust rule.
            all_say = not self._folds and not self._versions.roles.settled
            found = self._agreement.compare(site, declare, all_say_roles=all_say)
            refusal = (
                found.refusal
                or self._wrong_roles(site, declare, found)
                or self._wrong_factors(site, declare)
            )
        except (ConfigError, LayoutError) as error:
            self._put_out(peer, site, "layout", str(error))
            return None
        if refusal is not None:
            self._put_out(peer, site, "unlike", refusal)
            return None
        return found

    def _wrong_roles(self, site: str, declare: protocol.Declare, found: Found) -> str | None:
        """Say what is wrong with a site's roles; where the run has none, warn of what that means."""
        roles, optimizer = self._versions.roles, self._versions.optimizer
        buffers = buffers_of(declare)
        unlike = roles.unlike(buffers, f"site {site!r}")
        if unlike is not None:
            return f"the roles of tensors differ: {unlike}; give all sites the same model"
        late = optimizer.acts_on(buffers or ())
        if late and not roles.settled:
            floats = [name for name, dtype, _ in declare.tensors if dtype in FLOATS]
            if len(late) == len(optimizer.acts_on(floats)):
                return (
                    f"site {site!r} says that all tensors on which the server optimizer would act are buffers, "
                    f"such as {late[0]!r}; take its section out of the run file, or train a model with parameters"
                )
        acting = ["the server optimizer"] if late else []
        if not self._folds and (late := optimizer.not_plain(buffers or ())):
            acting.insert(0, "the rule")
        if late and roles.settled and roles.buffers is None:
            found.warnings.append(
                f"{plural(len(late), 'buffer')} of the model, such as {late[0]!r}, are parameters to "
                f"{' and '.join(acting)}: no site had said the roles of tensors when the run began"
            )
        return None

    def _wrong_factors(self, site: str, declare: protocol.Declare) -> str | None:
        """Say how a site's adapters differ from those of the run, or while it has no model of another site."""
        factors, here = self._versions.factors, self._peers.addresses
        if self._versions.model is not None:
            unlike = factors.unlike(site, declare, "the run", factors.pairs)
            return unlike or factors.other_rank(site, declare)
        for other, seen in self.declared.items():
            if other != site and other in here:
                return factors.unlike(site, declare, f"site {other!r}", pairs_of(seen))
        return factors.unlike(site, declare, "", ())

    def _first_bytes(self, declare: protocol.Declare) -> int:
        """Return what a first model of a site takes on the disk, in the form of the global model, too."""
        own, factors = declared_layout(declare), self._versions.factors
        if not factors.ranked:
            return own.total_bytes
        return own.total_bytes + factors.model_layout(own, pairs_of(declare)).total_bytes

    def _has_room(self, peer: bytes, site: str, nbytes: int) -> bool:
        """Whether a first model fits on the disk. Until it does, its site declares it again and again."""
        known = self._peers.get(peer)
        assert known is not None
        try:
            self._store.check_space(nbytes)
        except StorageError as error:
            if not known.lacks_room:
                self._peers.replies.tell(
                    site, "the model of %s has to wait: %s; make some room", str(error)
                )
                self._report(site, "waits for room on the server's disk")
                text = (
                    f"the server's disk has no room for a model of {nbytes:,} bytes; waiting for it"
                )
                self._link.send(peer, protocol.Dropped(round=0, message=text))
            known.lacks_room = True
            return False
        if known.lacks_room:
            known.lacks_room = False
            self._report(site, "")
        return True

    def _unlike_declared(self, site: str, declare: protocol.Declare) -> str | None:
        """Say how a site's tensors differ from those of another that is there, while there is no model yet."""
        here = self._peers.addresses
        for other, seen in self.declared.items():
            if other != site and other in here:
                factors = self._versions.factors
                difference = compare_layouts(
                    factors.model_form(declare),
                    factors.model_form(seen),
                    f"site {site}",
                    f"site {other}",
                    limit=_TENSORS_NAMED,
                )
                return difference and f"the model's tensors differ: {difference}"
        return None

    def _whose_model(self) -> str:
        """Say where the global model came from; empty while there is none."""
        if self._versions.model is None:
            return ""
        if self._config.initial_path is not None:
            return "the global model began as [model] initial of the run file"
        owner = self._store.initial_site()
        return f"the global model began as that of site {owner!r}" if owner else ""
