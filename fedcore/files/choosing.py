"""What model files weigh by a rule such as Krum, which goes by the squared distances of all pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedcore._core import pair_distances
from fedcore.errors import ConfigError, NonFiniteError
from fedcore.rules.deciding import Decision, SeveralPasses
from fedcore.rules.squares import TooFar
from fedcore.weighing import Weighing

from .weights import Weights

__all__ = ["Choosing", "square_distances"]


@dataclass(frozen=True, slots=True)
class Choosing:
    """A rule of several passes over files.

    Attributes:
        rule: the rule.
        settings: a number for each of its options.
        weighing: what makes the weights of files, where they count.
    """

    rule: SeveralPasses
    settings: Mapping[str, float]
    weighing: Weighing

    def decide(
        self,
        models: Sequence[Weights],
        weights: Sequence[int],
        base: Weights | None,
        *,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Decision:
        """Decide what files of the same tensors weigh.

        Args:
            models: the files, in canonical order.
            weights: one for each.
            base: the model that they were trained from, if the rule needs it.
            threads: of the pass over the files.
            progress: called with the bytes done and the bytes in all.

        Raises:
            ConfigError: they are too few for the rule and its settings, or too far apart; those are named.
            NonFiniteError: a file holds NaN or infinity; file and tensor are named.
        """
        points = [*models, *([] if base is None else [base])]
        squares = square_distances(points, threads=threads, progress=progress)
        try:
            return self.rule.decide(squares, self.weighing.of(weights), self.settings)
        except TooFar as error:
            far = ", ".join(str(points[source].path) for source in error.sources)
            raise ConfigError(f"{error}: {far}") from None

    def record(self, models: Sequence[Weights], decision: Decision) -> dict[str, str]:
        """Return what the header of the result has: the rule, and the weights and scores as JSON."""
        files = [
            {"file": model.path.name, "weight": weight, "score": score.hex()}
            for model, weight, score in zip(models, decision.weights, decision.scores, strict=True)
        ]
        of = {"measure": decision.measure, "base": decision.base, "files": files}
        return {
            "fedcore.rule": self.rule.recorded(self.settings),
            "fedcore.decision": json.dumps(of),
        }

    @staticmethod
    def weighed(
        models: Sequence[Weights], base: Weights | None, decision: Decision
    ) -> tuple[list[int], list[Weights]]:
        """Return the weights above 0, and the files that have them; the base comes last."""
        pairs = list(zip(decision.weights, models, strict=True))
        if base is not None:
            pairs.append((decision.base, base))
        kept = [(weight, model) for weight, model in pairs if weight]
        return [weight for weight, _ in kept], [model for _, model in kept]


def square_distances(
    models: Sequence[Weights],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Return the squared distances of all pairs of files, over their elements of float dtypes.

    The matrix is symmetric to the bit, and does not depend on the number of threads. Equal files have 0.

    Raises:
        NonFiniteError: a file holds NaN or infinity; file and tensor are named.
    """
    layout = models[0].layout
    groups: dict[tuple[int, ...], list[tuple[str, str, int]]] = {}  # tensors in the same files
    for name, dtype, _, _, nbytes in layout.tensors:
        files = tuple(id(model.where[name]) for model in models)
        groups.setdefault(files, []).append((name, dtype, nbytes))
    squares = [[0.0] * len(models) for _ in models]
    before = 0
    for tensors in groups.values():
        inputs = [model.where[tensors[0][0]].file for model in models]
        places = [(d, nbytes, [m.offset(name) for m in models]) for name, d, nbytes in tensors]

        def report(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, layout.total_bytes)

        found, bad = pair_distances(inputs, places, threads, report)
        if bad is not None:
            source, tensor, element = bad
            name = tensors[tensor][0]
            raise NonFiniteError(
                f"{models[source].where[name].path}: NaN or infinity in tensor {name!r}, element {element}"
            )
        pairs = iter(found)
        for one in range(len(models)):
            for other in range(one + 1, len(models)):
                squares[one][other] += next(pairs)
                squares[other][one] = squares[one][other]
        before += sum(nbytes for _, _, nbytes in tensors)
    return squares
