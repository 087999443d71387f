"""What of a model a round's updates hold: all of it, one factor of each adapter, or factors of a site's rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedcore import protocol
from fedcore._core import Layout, LoraRule
from fedcore.adapters.cards import config_of_ranks
from fedcore.adapters.forms import Forms, ranks_of, version_form, with_ranks
from fedcore.adapters.groups import CONFIG, find_groups, module_of, parse_config, scale_of
from fedcore.adapters.refusals import check_adapter
from fedcore.adapters.report import Figure, Measured
from fedcore.config import AggregationSection
from fedcore.errors import ConfigError, LayoutError
from fedcore.layout import TensorSpec, layout_hash, table
from fedcore.roles import Pairs, compare_pairs, pairs_of
from fedcore.server.storage.store import Store

__all__ = ["Factors"]


class Factors:
    """The factors of a run's adapters. They decide bytes, and are kept in the journal.

    Args:
        section: how they are combined.
        store: the run folder.

    Attributes:
        pairs: the names of A and B of each adapted module; none while no site has said them.
        ranked: whether the products are combined, and each site has its own rank.
        measured: whether it is measured how far the mean of the factors lies from that of the products.
    """

    def __init__(self, section: AggregationSection, store: Store) -> None:
        self._method = method = section.lora
        self._store = store
        self.ranked = method == "exact"
        self.measured = method in ("factors", "exact")
        self._rule: LoraRule | None = None
        self._max_rank = section.max_rank or 0
        self._products = section.base == "zero"
        self._ranks: dict[str, tuple[int, ...]] = {}
        self._own: tuple[Layout | None, dict[tuple[int, ...], tuple[Layout, str]]] = None, {}
        self.pairs: Pairs = () if method is None else store.factors()
        self._forms = self.pairs, Forms(method, self.pairs)
        self._hashed: tuple[Layout, str] | None = None

    def unlike(self, site: str, declare: protocol.Declare, there: str, theirs: Pairs) -> str | None:
        """Say why a site's tensors are not those of adapters, or how they differ from ``theirs``; else None.

        Raises:
            LayoutError: the site names factors that are no factors of one product, or can't be combined.
            ConfigError: the file that describes its adapter is damaged.
        """
        if self._method is None:
            return None
        pairs = pairs_of(declare)
        if not pairs:
            return (
                f"site {site!r} names no factors of a LoRA adapter, which aggregation.lora = {self._method!r} "
                "combines: give it a PEFT model with a LoRA adapter, trained in one process"
            )
        self.model_form(declare)
        if self.ranked and CONFIG in declare.files:
            parse_config(declare.files[CONFIG], f"site {site!r}: {CONFIG}")
        differs = compare_pairs(pairs, theirs, f"site {site!r}", there) if theirs else None
        return differs and f"the adapters differ: {differs}; give all sites the same adapter"

    def other_rank(self, site: str, declare: protocol.Declare) -> str | None:
        """Say that a site comes back with another rank than it had in this run; None where it does not."""
        before = self.ranks(site)
        if not self.ranked or not before:
            return None
        now = tuple(ranks_of(declare.tensors, pairs_of(declare)))
        if before == now:
            return None
        place = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), 0)
        return (
            f"site {site!r} had an adapter of rank {before[place]} in this run, and now one of rank {now[place]}: "
            "start it with the rank that it had"
        )

    def say(self, declare: protocol.Declare) -> None:
        """Take up what a site says of the run's model, unless it is known."""
        if not self.pairs:
            self.take(declare)

    def take(self, declare: protocol.Declare) -> None:
        """Take up the factors of the site whose model becomes the run's."""
        if self._method is not None:
            self.take_pairs(pairs_of(declare))

    def take_pairs(self, pairs: Pairs) -> None:
        """Take up these factors as those of the run's model."""
        self.pairs = pairs
        self._store.keep_factors(pairs)

    # --- products, of factors in each site's own rank ---

    def take_file(
        self, tensors: Sequence[TensorSpec], cards: Mapping[str, str], path: str
    ) -> tuple[Layout, dict[str, float]]:
        """Take up the factors of an adapter's files as those of the run's model.

        Args:
            tensors: of the file.
            cards: what describes them, by name.
            path: names the files in messages.

        Returns the layout of the global model, and the scale of each product by the name of A.

        Raises:
            ConfigError, LayoutError: it is no adapter of LoRA, or one that can't be combined.
        """
        if CONFIG not in cards:
            raise ConfigError(
                f"model.initial: {path} holds no {CONFIG}: aggregation.lora = {self._method!r} needs the folder "
                "of an adapter"
            )
        config = parse_config(cards[CONFIG], f"model.initial: {path}")
        check_adapter(config, tensors, "exact", where=f"model.initial: {path}")
        groups, others = find_groups(tensors)
        for name, dtype, _ in tensors:
            if name in others and name.endswith(".lora_B.bias") and dtype != "F32":
                raise LayoutError(
                    f"model.initial: {path} has the bias {name!r} in {dtype}, which aggregation.lora = "
                    f"{self._method!r} multiplies by its scale: save the adapter in float32"
                )
        self.take_pairs(tuple(sorted((group.a, group.b) for group in groups)))
        names = {name for pair in self.pairs for name in pair}
        wide = [(n, "F32" if n in names else d, s) for n, d, s in tensors]
        form = version_form(wide, self.pairs, self._max_rank)
        layout = Layout([(n, d, list(s)) for n, d, s in form], self._store.chunk_bytes)
        return layout, {group.a: scale_of(config, group) for group in groups}

    def model_form(self, declare: protocol.Declare) -> Sequence[TensorSpec]:
        """Return the tensors of the global model, as far as this site's say them.

        Raises:
            LayoutError: a factor can't be combined; it is named.
        """
        if not self.ranked:
            return declare.tensors
        return version_form(declare.tensors, pairs_of(declare), self._max_rank)

    def model_layout(self, layout: Layout, pairs: Pairs | None = None) -> Layout:
        """Return the layout of the global model that a first model is brought into; the same object elsewhere.

        ``pairs`` are those of the model, where they are not the run's yet.
        """
        if not self.ranked:
            return layout
        form = version_form(table(layout), self.pairs if pairs is None else pairs, self._max_rank)
        return Layout([(n, d, list(s)) for n, d, s in form], layout.chunk_bytes)

    def cards(self, files: Mapping[str, str], model: Layout) -> dict[str, str]:
        """Return the files that describe a first model as they describe the global one.

        Args:
            files: by name, of the site whose model it was.
            model: the layout of the global model.
        """
        found = dict(files)
        if self.ranked and CONFIG in found:
            shapes = {name: shape for name, _, shape in table(model)}
            ranks = {module_of(a): shapes[a][0] for a, _ in self.pairs}
            found[CONFIG] = config_of_ranks(found[CONFIG], ranks)
        return found

    def keep_ranks(self, site: str, declare: protocol.Declare) -> None:
        """Keep which ranks a site has, also for the process that goes on after this one."""
        ranks = tuple(ranks_of(declare.tensors, pairs_of(declare)))
        if self.ranked and ranks != self.ranks(site):
            self._store.keep_ranks(site, ranks)
            self._ranks[site] = ranks

    @property
    def known(self) -> list[str]:
        """The sites that have said their ranks to this process."""
        return [site for site, ranks in self._ranks.items() if ranks]

    def ranks(self, site: str) -> tuple[int, ...]:
        """Return the rank of each pair at a site; nothing if it has not said them."""
        if site not in self._ranks:
            self._ranks[site] = self._store.ranks(site)
        ranks = self._ranks[site]
        # Before the run had a model, the site may have said them of an adapter of other modules.
        return ranks if len(ranks) == len(self.pairs) or not self.pairs else ()

    def own_layout(self, model: Layout, site: str) -> Layout:
        """Return the layout of a site's updates."""
        return self._own_of(model, site)[0]

    def own_hash(self, model: Layout, site: str) -> str | None:
        """Return its hash; None while the site has not said which ranks it has."""
        return self._own_of(model, site)[1] if self.ranks(site) else None

    def _own_of(self, model: Layout, site: str) -> tuple[Layout, str]:
        if self._own[0] is not model:
            self._own = model, {}
        made, ranks = self._own[1], self.ranks(site)
        if ranks not in made:
            layout = self.ranked_layout(model, self.pairs, ranks)
            made[ranks] = layout, layout_hash(layout)
        return made[ranks]

    @staticmethod
    def ranked_layout(model: Layout, pairs: Pairs, ranks: Sequence[int]) -> Layout:
        """Return the layout of updates of these ranks."""
        tensors = with_ranks(table(model), pairs, ranks)
        return Layout([(n, d, list(s)) for n, d, s in tensors], model.chunk_bytes)

    def rule(self, model: Layout, threads: int, pairs: Pairs) -> LoraRule:
        """Return what combines the factors of a round, or their products."""
        groups = [(b, a) for a, b in pairs]
        if not self.ranked:
            rank = max(ranks_of(table(model), pairs), default=1)
            return LoraRule("factors", model, groups, rank, threads=threads)
        method = "products" if self._products else "exact"
        return LoraRule(method, model, groups, self._max_rank, threads=threads)

    def start(self, model: Layout, threads: int) -> LoraRule:
        """Return what combines the updates of the round that begins; `measure` asks it at the end."""
        self._rule = self.rule(model, threads, self.pairs)
        return self._rule

    def measure(self) -> Measured | None:
        """Return how far the mean of the factors lay from that of the products, in the round that was combined.

        None where it is not measured, or where a killed server had combined all modules.
        """
        rule, self._rule = self._rule, None
        if rule is None:
            return None
        figures = [
            Figure(
                module_of(a), of["sum"], of["error"], of["change"], of["cut"],
                of["rank"] if self.ranked else None,
            )
            for (a, _), of in zip(self.pairs, rule.reports(), strict=True)
            if of is not None
        ]  # fmt: skip
        return Measured.of_figures(figures, len(self.pairs)) if figures else None

    @property
    def metadata(self) -> Mapping[str, str]:
        """What is said of it in the header of a version's file."""
        if self._method is None:
            return {}
        rank = f" {self._max_rank}{' zero' if self._products else ''}" if self.ranked else ""
        return {"fedcore.lora": f"{self._method}{rank}"}

    # --- one factor of each pair ---

    def layout(self, model: Layout, round_: int) -> Layout:
        """Return the layout of a round's updates; the model's own, the same object, where they hold all of it."""
        if self._forms[0] != self.pairs:
            self._forms = self.pairs, Forms(self._method, self.pairs)
        return self._forms[1].layout(model, round_)

    def hash(self, model: Layout, round_: int) -> str | None:
        """Return the hash of the layout of a round's updates; None where it is the model's own."""
        layout = self.layout(model, round_)
        if layout is model:
            return None
        if self._hashed is None or self._hashed[0] is not layout:
            self._hashed = layout, layout_hash(layout)
        return self._hashed[1]
