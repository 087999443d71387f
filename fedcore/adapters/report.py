"""How wrong the mean of factors is, module by module and in all: for people and for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from fedcore.protocol import FactorsStatus, shown
from fedcore.words import plural

__all__ = ["Figure", "Measured", "Report", "total_of"]

_WORST: Final = 5


@dataclass(frozen=True, slots=True)
class Figure:
    """Norms (Frobenius) of one module, or of all together.

    Attributes:
        module: its name.
        norm: of the mean of the sites' products, each scaled and weighted.
        error: of the difference between that and the product of the mean factors.
        change: of the difference between the result and the base; None without a base.
        cut: at most what the truncation to a rank took away.
        rank: the numerical rank of what was written; None where it was not computed.
        width: columns of B in what was written.
    """

    module: str
    norm: float
    error: float
    change: float | None = None
    cut: float = 0.0
    rank: int | None = None
    width: int = 0

    @property
    def of_norm(self) -> float | None:
        """The error as a part of the mean of the products; None where that is 0."""
        return self.error / self.norm if self.norm else None

    @property
    def of_change(self) -> float | None:
        """The error as a part of the change; None without a base, or where nothing changed."""
        return self.error / self.change if self.change else None


def total_of(figures: Sequence[Figure]) -> Figure:
    """Return the figure of all modules together: the root of the sum of squares."""

    def root(values: Sequence[float]) -> float:
        return math.hypot(*values)

    changes = [figure.change for figure in figures if figure.change is not None]
    ranks = [figure.rank for figure in figures if figure.rank is not None]
    return Figure(
        "all",
        root([figure.norm for figure in figures]),
        root([figure.error for figure in figures]),
        root(changes) if changes else None,
        root([figure.cut for figure in figures]),
        max(ranks, default=None),
        max((figure.width for figure in figures), default=0),
    )


@dataclass(frozen=True)
class Report:
    """What the combining of adapters did.

    Attributes:
        method: how they were combined.
        sites: how many.
        mixed: whether their ranks differ in some module.
        figures: of each module; empty where no products were combined.
        notes: what a reader has to know, a sentence each.
    """

    method: str
    sites: int
    mixed: bool
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Return it for programs, as JSON values."""
        return {
            "method": self.method,
            "sites": self.sites,
            "mixed_ranks": self.mixed,
            "total": _values(total_of(self.figures)) if self.figures else None,
            "modules": [_values(figure) for figure in self.figures],
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """Yield the lines of a text for people: the worst modules, all together, and the notes."""
        if self.figures:
            worst = sorted(self.figures, key=lambda f: (-(f.of_norm or 0.0), f.module))[:_WORST]
            rows = [_HEAD, *(_cells(figure) for figure in (*worst, total_of(self.figures)))]
            widths = [max(len(row[place]) for row in rows) for place in range(len(_HEAD))]
            what = (
                "the mean of the factors, filled up with zeros,"
                if self.mixed
                else "the mean of the factors"
            )
            yield (
                f"how wrong {what} is: {plural(len(worst), 'module')} of {len(self.figures):,}, the worst first"
            )
            for first, *rest in rows:
                numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
                yield "  ".join((first.ljust(widths[0]), *numbers))
        yield from self.notes


_HEAD: Final = ("module", "norm", "error", "of norm", "of change", "rank", "cut")


def _cells(figure: Figure) -> tuple[str, ...]:
    rank = "-" if figure.rank is None else str(figure.rank)
    return (
        shown(figure.module, 200), f"{figure.norm:.4g}", f"{figure.error:.4g}", _percent(figure.of_norm),
        _percent(figure.of_change), rank, f"{figure.cut:.3g}",
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


def _values(figure: Figure) -> dict[str, Any]:
    """Return a figure as JSON values: a number beyond all floats is None."""
    of = {**asdict(figure), "of_norm": figure.of_norm, "of_change": figure.of_change}
    return {
        name: _finite(value) if isinstance(value, float) else value for name, value in of.items()
    }


def _finite(value: float | None) -> float | None:
    """Return a number, or None where it is none that JSON has."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Measured:
    """How far the mean of the factors lay from the mean of the products in one round of a run.

    Attributes:
        modules: how many modules it is of. After a server was killed in the round, these are fewer than all.
        of: how many modules the adapter has.
        total: of these modules together.
        worst: of them, those with the greatest error for their norm.
    """

    modules: int
    of: int
    total: Figure
    worst: tuple[Figure, ...]

    @classmethod
    def of_figures(cls, figures: Sequence[Figure], of: int) -> Measured:
        """Return what these figures come to; at least one."""
        worst = sorted(figures, key=lambda f: (-(f.of_norm or 0.0), f.module))[:_WORST]
        return cls(len(figures), of, total_of(figures), tuple(worst))

    def values(self) -> dict[str, Any]:
        """Return it for programs, as JSON values."""
        return {
            "modules": self.modules,
            "of": self.of,
            "total": _values(self.total),
            "worst": [_values(figure) for figure in self.worst],
        }

    @property
    def status(self) -> FactorsStatus:
        """What a status shows of it."""
        total, worst = self.total, self.worst[0]
        return FactorsStatus(
            modules=self.modules,
            of=self.of,
            of_norm=_finite(total.of_norm),
            of_change=_finite(total.of_change),
            cut=_finite(total.cut / total.norm if total.norm else 0.0),
            rank=total.rank,
            worst=worst.module[:200],
            worst_of_norm=_finite(worst.of_norm),
        )

    @property
    def text(self) -> str:
        """What a journal keeps."""
        return json.dumps(self.values())

    @classmethod
    def of_text(cls, text: str) -> Measured:
        """Return what was kept.

        Raises:
            ValueError: it is damaged.
        """
        try:
            kept = json.loads(text)
            worst = tuple(_figure(values) for values in kept["worst"])
            return cls(int(kept["modules"]), int(kept["of"]), _figure(kept["total"]), worst)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no figure of adapters: {error!r}") from None


def _figure(values: dict[str, Any]) -> Figure:
    def number(name: str) -> float:
        return math.inf if values[name] is None else float(values[name])

    change = values["change"]
    return Figure(
        str(values["module"]), number("norm"), number("error"), None if change is None else float(change),
        number("cut"), values["rank"], int(values["width"]),
    )  # fmt: skip
