"""Roles of tensors: what a tensor is to its model, as the adapter says that knows the model.

- A *parameter* is trained, or could be. Server optimizers act on parameters.
- A *buffer* is what a model computes beside its training, such as a running variance. It keeps the plain mean.
- An *integer* has a dtype that is not averaged, such as a count of batches. It is that of the global model.

Nothing is guessed from names. A site whose script gives arrays alone does not know the roles, and says none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import LayoutError
from .layout import FLOATS, TensorSpec
from .protocol import Declare, OfRole, Role

__all__ = ["Buffers", "buffers_of", "compare_buffers", "roles_message"]

Buffers = tuple[str, ...] | None
"""The names of a model's buffers in order; None: it is not known which tensors are some."""

_NAMED = 3


def roles_message(tensors: Sequence[TensorSpec], roles: Mapping[str, Role]) -> list[OfRole]:
    """Return the roles of these tensors as a `Declare` has them; ``roles`` may leave out parameters."""
    places: dict[Role, list[int]] = {}
    for place, (name, _, _) in enumerate(tensors):
        if (role := roles.get(name, "parameter")) != "parameter":
            places.setdefault(role, []).append(place)
    return [OfRole(role=role, tensors=found) for role, found in places.items()]


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
