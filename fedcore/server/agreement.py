"""What all sites of a run should have alike: the adapter's configuration, the tokenizer, the roles of tensors, and
the frozen base.

Tensors of the same names and shapes can still mean different things: an adapter of another scale, token ids of
another tokenizer, an adapter over another base. Their average would be of no use, and nothing else would tell.
What each site declared last is kept in the journal: a site which comes after a restart is compared as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from fedcore import protocol
from fedcore.files.frozen import FrozenGroup, compare_frozen, model_config
from fedcore.roles import Buffers, buffers_of, compare_buffers

from .adapter_config import RANKS, changed_base, compare_configs, describe_model, read_config

__all__ = ["Agreement", "Found", "Memory"]

_ADAPTER: Final = "adapter_config.json"
_MODEL: Final = "config.json"
_SHOWN: Final = 6
_SITES: Final = 3


class Memory(Protocol):
    """Where it is kept what sites have declared; see `fedcore.server.storage.store.Store`."""

    def declared(self) -> dict[str, str]:
        """Return the text that is kept for each site."""

    def keep_declared(self, site: str, text: str | None) -> None:
        """Keep a site's text instead of an earlier one; None: keep none. Equal texts are kept once."""


@dataclass(frozen=True)
class Found:
    """What a comparison found, in words for people.

    Attributes:
        refusal: why the site can't take part; None if it can.
        warnings: what differs and may spoil the result.
        notes: what differs and is harmless, or could not be compared.
    """

    refusal: str | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Described:
    """What is compared of a site, or of the run's model."""

    adapter: dict[str, Any]
    model: dict[str, Any]
    prints: dict[str, str]
    frozen: tuple[FrozenGroup, ...]
    buffers: Buffers = None

    @property
    def kind(self) -> str:
        """What travels: an adapter, a whole model, or neither is known."""
        return "adapter" if self.adapter else "whole" if self.model else ""


_Others = Sequence[tuple[list[str], _Described]]
"""What other sites declared, with the names of those that declared it."""


class Agreement:
    """Remembers what each site declared last, and compares others with it.

    Args:
        files: gives what describes the run's model once there is one.
        strict: refuse a site whose base differs, instead of a warning.
        memory: where it is kept; None keeps it in this process only.
        owner: says whose model the global one is; empty while there is none.
        ranks: adapters of sites may differ in rank and scale.
    """

    def __init__(
        self,
        files: Callable[[], Mapping[str, str]],
        *,
        strict: bool = False,
        memory: Memory | None = None,
        owner: Callable[[], str] = str,
        ranks: bool = False,
    ) -> None:
        self._free = RANKS if ranks else frozenset[str]()
        self._files = files
        self._strict = strict
        self._memory = memory
        self._owner = owner
        self._texts: dict[str, str] = {}
        self._alike: dict[
            str, dict[str, None]
        ] = {}  # by text: the sites, in the order in which they came
        self._described: dict[
            str, _Described
        ] = {}  # by text: a thousand sites mostly declare the same
        for site, text in (memory.declared() if memory is not None else {}).items():
            described = _read(text)
            if described is not None:
                self._described.setdefault(text, described)
                self._add(site, text)

    def sites(self) -> list[str]:
        """Return whose declarations are remembered."""
        return list(self._texts)

    @property
    def buffers(self) -> Buffers:
        """The buffers of the model, as the sites declared that know its roles."""
        return next((d.buffers for d in self._described.values() if d.buffers is not None), None)

    def compare(
        self, site: str, declare: protocol.Declare, *, all_say_roles: bool = False
    ) -> Found:
        """Compare a site with the others and with the run's model; nothing is remembered yet.

        Args:
            site: whose declaration it is.
            declare: what it declares.
            all_say_roles: a site that says no roles agrees with no site that names buffers.

        Raises:
            LayoutError: it says a role that a tensor can't have.
        """
        mine = _described(declare)
        others = self._others(site)
        refusal = (
            self._other_adapter(site, mine, others)
            or _other_prints(site, mine, others)
            or _other_roles(site, mine, others, all_say_roles)
        )
        if refusal is not None:
            return Found(refusal)
        found = Found(notes=self._harmless(site, mine, others))
        for unlike, skipped in (_other_config(site, mine, others), _other_base(site, mine, others)):
            found.warnings.extend([unlike] if unlike else [])
            found.notes.extend([skipped] if skipped else [])
        if found.warnings and self._strict:
            return Found(f"{found.warnings[0]}; [model] same_base is 'strict'")
        found.warnings.extend(changed_base(mine.adapter))
        return found

    def note(self, site: str, declare: protocol.Declare) -> None:
        """Remember what a site declared, instead of what it declared before."""
        described = _described(declare)
        text = _write(described)
        if self._texts.get(site) == text:
            return
        self.forget(site, keep=True)
        self._described.setdefault(text, described)
        self._add(site, text)
        if self._memory is not None:
            self._memory.keep_declared(site, text)

    def forget(self, site: str, *, keep: bool = False) -> None:
        """Compare nobody with a site any more, as it must keep nobody out when its key is revoked.

        ``keep``: but for what is kept of it, which is about to be written over.
        """
        text = self._texts.pop(site, None)
        if text is None:
            return
        del self._alike[text][site]
        if not self._alike[text]:
            del self._alike[text], self._described[text]
        if self._memory is not None and not keep:
            self._memory.keep_declared(site, None)

    def _add(self, site: str, text: str) -> None:
        """Remember a site's text, of which one copy is held."""
        alike = self._alike.setdefault(text, {})
        self._texts[site] = self._texts[next(iter(alike))] if alike else text
        alike[site] = None

    def _others(self, site: str) -> _Others:
        found = []
        for text, alike in self._alike.items():
            names = [other for other in alike if other != site]
            if names:
                found.append((names, self._described[text]))
        return found

    def _references(self, others: _Others) -> Iterator[tuple[str, str, _Described]]:
        """Yield what a site is compared with: its name in a sentence, in a list, and what is known of it."""
        for names, seen in others:
            yield f"site {names[0]!r}", names[0], seen
        yield "the run's initial model", "the initial model", _describe(self._files(), {}, ())

    def _other_adapter(self, site: str, mine: _Described, others: _Others) -> str | None:
        for there, short, theirs in self._references(others):
            if {mine.kind, theirs.kind} == {"adapter", "whole"}:
                return (
                    f"site {site!r} shows {describe_model(mine.adapter, mine.model)}, but {there} "
                    f"{describe_model(theirs.adapter, theirs.model)}; give all sites the same kind of model"
                    f"{self._whose()}"
                )
            differs, _ = compare_configs(theirs.adapter, mine.adapter, short, site, self._free)
            if differs:
                return (
                    f"the adapter of site {site!r} is not that of {there}: {'; '.join(differs)}; give all sites "
                    f"the same adapter config{self._whose()}"
                )
        return None

    def _harmless(self, site: str, mine: _Described, others: _Others) -> list[str]:
        for _, short, theirs in self._references(others):
            _, free = compare_configs(theirs.adapter, mine.adapter, short, site, self._free)
            if free:
                return [f"the adapters' configs differ where it does no harm: {'; '.join(free)}"]
        return []

    def _whose(self) -> str:
        owner = self._owner()
        return f"; {owner}" if owner else ""


def _other_prints(site: str, mine: _Described, others: _Others) -> str | None:
    for (other, *_), theirs in others:
        for kind in sorted(theirs.prints.keys() & mine.prints.keys()):
            here, there = mine.prints[kind], theirs.prints[kind]
            if here != there:
                return (
                    f"the {kind} of site {site!r} (sha256 {here[:12]}) is not that of site {other!r} (sha256 "
                    f"{there[:12]}); give all sites the same {kind}"
                )
    return None


def _other_roles(site: str, mine: _Described, others: _Others, all_say_roles: bool) -> str | None:
    for (other, *_), theirs in others:
        buffers = mine.buffers or theirs.buffers
        if all_say_roles and buffers and not (mine.buffers and theirs.buffers):
            knows, other_one = (site, other) if mine.buffers else (other, site)
            return (
                f"the roles of tensors differ: tensor {buffers[0]!r} is a buffer at site {knows!r}, and site "
                f"{other_one!r} names no buffers; with a rule that is not the mean, all sites have to say the same"
            )
        unlike = compare_buffers(mine.buffers, theirs.buffers, f"site {site!r}", f"site {other!r}")
        if unlike is not None:
            return f"the roles of tensors differ: {unlike}; give all sites the same model"
    return None


def _other_config(site: str, mine: _Described, others: _Others) -> tuple[str, str]:
    """Compare the configurations of models that are trained whole."""
    for (other, *_), theirs in others:
        if "whole" == mine.kind == theirs.kind:
            one, two = model_config(theirs.model), model_config(mine.model)
            differs, _ = compare_configs(one, two, other, site)
            if differs:
                return (
                    f"the model's config at site {site!r} is not that of site {other!r}: {'; '.join(differs)}; "
                    "give all sites the same config",
                    "",
                )
    return "", ""


def _other_base(site: str, mine: _Described, others: _Others) -> tuple[str, str]:
    """Compare what is frozen with that of other sites; returns a warning and a note, empty if there is none."""
    alike: dict[tuple[FrozenGroup, ...], list[str]] = {}
    for names, theirs in others:
        if theirs.frozen and theirs.frozen != mine.frozen and mine.frozen:
            alike.setdefault(theirs.frozen, []).extend(names)
    note = ""
    for frozen, names in alike.items():
        found, named = compare_frozen(mine.frozen, frozen), _sites(names)
        if found.differs:
            text = (
                f"the base of site {site!r} is not that of {named}: {len(found.differs)} of {found.groups} groups "
                f"of what is frozen differ: {_few(found.differs)}; adapters over bases that differ have no useful "
                "average: give all sites the same files of one revision (where tokens were added, or the base was "
                "changed at the start, one saved copy for all)"
            )
            return text, ""
        if found.skipped and not note:
            note = (
                f"the base of site {site!r} could not be compared throughout with that of {named}: "
                f"{_few(found.skipped)}"
            )
    return "", note


def _sites(names: list[str]) -> str:
    more = f" and {len(names) - _SITES} more" if len(names) > _SITES else ""
    unit = "site" if len(names) == 1 else "sites"
    return f"{unit} {', '.join(map(repr, names[:_SITES]))}{more}"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(protocol.shown(name, 200) for name in names[:_SHOWN]) + more


def _described(declare: protocol.Declare) -> _Described:
    found = _describe(declare.files, declare.fingerprints, declare.frozen)
    return replace(found, buffers=buffers_of(declare))


def _describe(
    files: Mapping[str, str], prints: Mapping[str, str], frozen: Sequence[FrozenGroup]
) -> _Described:
    return _Described(
        read_config(files, _ADAPTER),
        read_config(files, _MODEL),
        dict(prints),
        tuple((name, form, count, digest) for name, form, count, digest in frozen),
    )


def _write(described: _Described) -> str:
    of = {
        "adapter": described.adapter, "model": described.model, "prints": described.prints,
        "frozen": described.frozen,
    }  # fmt: skip
    if described.buffers is not None:
        of["buffers"] = described.buffers
    return json.dumps(of, sort_keys=True)


def _read(text: str) -> _Described | None:
    """Return what was kept; None if another version kept it otherwise."""
    try:
        kept = json.loads(text)
        frozen = tuple((str(n), str(f), int(c), str(d)) for n, f, c, d in kept["frozen"])
        buffers = kept.get("buffers")
        return _Described(
            dict(kept["adapter"]), dict(kept["model"]), dict(kept["prints"]), frozen,
            None if buffers is None else tuple(map(str, buffers)),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
