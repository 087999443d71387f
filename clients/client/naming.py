"""Names under which tensors travel: without the wrappers around a module.

A wrapper is a module that only holds another one, as `torch.compile`, `DistributedDataParallel` and Opacus make
them. Its part of a name (``_orig_mod``, ``module``, ``_module``) says how a site trains and not what, so it is
left out at every depth: the names are those of the plain class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from fedcore.errors import LayoutError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["in_state_dict", "inner_module", "own_names", "plain_names"]

_HIDDEN: Final = frozenset({"_checkpoint_wrapped_module"})  # a state_dict leaves these parts out
_PARALLEL: Final = frozenset({"DistributedDataParallel", "DataParallel"})


def inner_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper; None if ``module`` is no wrapper."""
    part = _wrapped_as(module)
    return None if part is None else module._modules[part]


def in_state_dict(name: str) -> str:
    """Return the name that a ``state_dict`` has for what has this one in a module."""
    return ".".join(part for part in name.split(".") if part not in _HIDDEN)


def _wrapped_as(module: nn.Module) -> str | None:
    """Return the name under which a wrapper holds its one module; None if this is no wrapper."""
    if len(module._modules) != 1:
        return None
    (part, inner), *_ = module._modules.items()
    if inner is None:
        return None
    if part == "module" and _PARALLEL & {cls.__name__ for cls in type(module).__mro__}:
        return part
    bare = not (module._parameters or module._buffers)
    return part if bare and part in ("_orig_mod", "_module") else None


def plain_names(
    model: nn.Module, names: Iterable[str], *, strict: bool = True
) -> Mapping[str, str]:
    """Return the plain name of each of ``names``, which are those of the module's ``state_dict``.

    Raises:
        LayoutError: two tensors have one plain name, and ``strict`` is set.
    """
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        plain = ".".join(_plain_parts(model, name.split(".")))
        if plain in taken and strict:
            raise LayoutError(
                f"the tensors {taken[plain]!r} and {name!r} have one name, {plain!r}, without their wrappers; "
                "rename one of them"
            )
        taken[plain], found[name] = name, plain
    return found


def _plain_parts(module: nn.Module | None, parts: list[str]) -> list[str]:
    kept: list[str] = []
    for at, part in enumerate(parts):
        module = _seen_through(module, part)
        if module is None or part not in module._modules:
            return kept + parts[at:]
        if _wrapped_as(module) != part:
            kept.append(part)
        module = module._modules[part]
    return kept


def _seen_through(module: nn.Module | None, part: str) -> nn.Module | None:
    """Return the module that has ``part``, inside wrappers whose own part a ``state_dict`` leaves out."""
    while module is not None and part not in module._modules and len(module._modules) == 1:
        (hidden, inner), *_ = module._modules.items()
        if hidden not in _HIDDEN:
            break
        module = inner
    return module


def own_names(model: nn.Module, root: nn.Module) -> dict[str, str]:
    """Return the travelling name of each tensor that has another one in the ``state_dict`` of ``model``.

    Args:
        model: what a script works with.
        root: the module in it whose tensors travel, under their plain names.
    """
    path = next(name for name, module in model.named_modules() if module is root)
    start = "".join(f"{part}." for part in _plain_parts(model, path.split(".") if path else []))
    state = model.state_dict(keep_vars=True)
    return {
        name: plain.removeprefix(start)
        for name, plain in plain_names(model, state, strict=False).items()
        if plain.startswith(start) and plain.removeprefix(start) != name
    }
