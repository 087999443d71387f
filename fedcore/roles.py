"""Roles of tensors: what a tensor is to its model, as the adapter says that knows the model.

- A *parameter* is trained, or could be. Server optimizers act on parameters.
- A *buffer* is what a model computes beside its training, such as a running variance. It keeps the plain mean.
- An *integer* has a dtype that is not averaged, such as a count of batches. It is that of the global model.
- The two *factors* A and B of a LoRA adapter are parameters that belong together.

Nothing is guessed from names. A site whose script gives arrays alone does not know the roles, and says none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import LayoutError
from .layout import FLOATS, TensorSpec
from .protocol import Declare, OfRole, Role

__all__ = [
    "Buffers",
    "Pairs",
    "buffers_of",
    "compare_buffers",
    "compare_pairs",
    "pairs_of",
    "roles_message",
]

Buffers = tuple[str, ...] | None
"""The names of a model's buffers in order; None: it is not known which tensors are some."""

Pairs = tuple[tuple[str, str], ...]
"""The names of the factors A and B of each module that LoRA adapts."""

_NAMED = 3


def roles_message(
    tensors: Sequence[TensorSpec], roles: Mapping[str, Role], pairs: Pairs = ()
) -> list[OfRole]:
    """Return the roles of these tensors as a `Declare` has them; ``roles`` may leave out parameters."""
    places: dict[Role, list[int]] = {}
    at: dict[str, int] = {}
    for place, (name, _, _) in enumerate(tensors):
        at[name] = place
        if (role := roles.get(name, "parameter")) != "parameter":
            places.setdefault(role, []).append(place)
    if pairs:
        places["lora-a"] = [at[a] for a, _ in pairs]
        places["lora-b"] = [at[b] for _, b in pairs]
    return [OfRole(role=role, tensors=found) for role, found in places.items()]


def pairs_of(declare: Declare) -> Pairs:
    """Return the factors that a site declared, by the names of A; nothing if it named none.

    Raises:
        LayoutError: they are no factors of one product.
    """
    factors: dict[Role, list[int]] = {"lora-a": [], "lora-b": []}
    for of_role in declare.roles or ():
        if of_role.role in factors:
            factors[of_role.role] += of_role.tensors
    if len(factors["lora-a"]) != len(factors["lora-b"]):
        raise LayoutError("each factor A of an adapter needs its B")
    found = []
    for of_a, of_b in zip(factors["lora-a"], factors["lora-b"], strict=True):
        (a, dtype, rows), (b, other, columns) = declare.tensors[of_a], declare.tensors[of_b]
        if not {dtype, other} <= FLOATS or len(rows) < 2 or len(columns) < 2:
            raise LayoutError(f"tensors {a!r} and {b!r} can't be factors of a product")
        if rows[0] != columns[1]:
            raise LayoutError(f"factors {a!r} and {b!r} have ranks {rows[0]} and {columns[1]}")
        found.append((a, b))
    return tuple(sorted(found))


def compare_pairs(mine: Pairs, theirs: Pairs, here: str, there: str) -> str | None:
    """Say how the factors of adapters differ at two places; None where they agree."""
    if mine == theirs:
        return None
    unlike = sorted(set(mine) ^ set(theirs))[0]
    at, other = (here, there) if unlike in mine else (there, here)
    return f"tensors {unlike[0]!r} and {unlike[1]!r} are the factors of an adapter at {at}, and not at {other}"


def buffers_of(declare: Declare) -> Buffers:
    """Return the names of the buffers that a site declared, in order; None if it said no roles.

    Raises:
        LayoutError: a tensor has a role that its dtype can't have.
    """
    if declare.roles is None:
        return None
    found: list[str] = []
    for of_role in declare.roles:
        for place in of_role.tensors:
            name, dtype, _ = declare.tensors[place]
            if (of_role.role == "integer") == (dtype in FLOATS):
                raise LayoutError(
                    f"tensor {name!r} of dtype {dtype} can't be of role {of_role.role!r}"
                )
            if of_role.role == "buffer":
                found.append(name)
    return tuple(sorted(found))


def compare_buffers(mine: Buffers, theirs: Buffers, here: str, there: str) -> str | None:
    """Say how the roles of the same tensors differ at two places; None where they agree or one is not known."""
    if mine is None or theirs is None or mine == theirs:
        return None
    unlike = sorted(set(mine) ^ set(theirs))
    said = [
        f"tensor {name!r} is a {'buffer' if name in mine else 'parameter'} at {here} and a "
        f"{'parameter' if name in mine else 'buffer'} at {there}"
        for name in unlike[:_NAMED]
    ]
    more = f"; and {len(unlike) - _NAMED} more" if len(unlike) > _NAMED else ""
    return "; ".join(said) + more
