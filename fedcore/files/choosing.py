"""Which of some model files a rule such as Krum chooses, by the squared distances of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedcore._core import pair_distances
from fedcore.errors import NonFiniteError
from fedcore.rules.deciding import Decision, SeveralPasses

from .weights import Weights

__all__ = ["choose_files", "square_distances"]


def choose_files(
    models: Sequence[Weights],
    rule: SeveralPasses,
    settings: Mapping[str, float],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Decision:
    """Return what a rule decides of files of the same tensors, in canonical order, which weigh the same.

    Raises:
        ConfigError: they are too few for the rule and its settings.
        NonFiniteError: a file holds NaN or infinity; file and tensor are named.
    """
    squares = square_distances(models, threads=threads, progress=progress)
    return rule.decide(squares, [1] * len(models), settings)


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
