"""What is trained at a site and does not travel, and so would be another at each site: refused, by name.

Whether a parameter travels is judged by where its values lie, never by its name: an adapter may be called as a
module of the model is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fedcore.errors import LayoutError

from .choice import stays
from .sharding import address

__all__ = [
    "active_adapter",
    "hidden_parameters",
    "refuse_beside",
    "refuse_extras",
    "refuse_missing",
]

_SHOWN = 8


def active_adapter(model: Any) -> str:
    """Return the name of the active adapter of a PEFT model, or of a transformers model that was given one."""
    several = getattr(model, "active_adapters", None)
    active = several() if callable(several) else model.active_adapter
    return str(active if isinstance(active, str) else active[0])


def refuse_extras(model: Any, sent: Mapping[str, torch.Tensor]) -> None:
    """Raise if a parameter of a PEFT model is trained that neither travels nor makes up what does.

    Raises:
        LayoutError: the parameters by name, and what can be done about their kind.
    """
    adapter = active_adapter(model)
    starts = {address(tensor) for tensor in sent.values()}
    # A prompt is computed from these, and travels as it was computed.
    encoder = getattr(model, "prompt_encoder", {})
    made_of = {id(p) for p in encoder[adapter].parameters()} if adapter in encoder else set()
    extras = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.numel() and id(parameter) not in made_of
        if address(parameter) not in starts
    }
    if extras:
        raise LayoutError(
            f"trained beside the adapter {adapter!r}, and so kept by each site for itself: "
            f"{_listed(list(extras))}; " + _advice(model, adapter, extras)
        )


def refuse_missing(model: torch.nn.Module, sent: Mapping[str, torch.Tensor]) -> None:
    """Raise if a module trains a parameter that its ``state_dict`` leaves out.

    Raises:
        LayoutError: the parameters by name.
    """
    starts = {address(tensor) for tensor in sent.values()}
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.numel() and address(parameter) not in starts
    ]
    if missing:
        raise LayoutError(
            f"trained, but not in the module's state_dict, and so kept by each site for itself: "
            f"{_listed(missing)}; have state_dict() return them, or freeze them with requires_grad_(False)"
        )


def hidden_parameters(owner: object, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return what may be trained and is no part of a model, by name: of a loss with weights of its own, say.

    Looked through are the attributes of ``owner`` (a trainer, or a module that does not know all of its parts),
    and lists and dicts in them.
    """
    inside = {id(parameter) for parameter in model.parameters()}
    found: dict[str, torch.nn.Parameter] = {}

    def look(name: str, value: Any, depth: int) -> None:
        if isinstance(value, torch.nn.Parameter):
            if value.requires_grad and id(value) not in inside:
                found.setdefault(name, value)
        elif isinstance(value, torch.nn.Module):
            for inside_name, parameter in value.named_parameters():
                look(f"{name}.{inside_name}", parameter, depth)
        elif depth and isinstance(value, Mapping | list | tuple):
            parts = value.items() if isinstance(value, Mapping) else enumerate(value)
            for part, inner in parts:
                look(f"{name}.{part}", inner, depth - 1)

    for name, value in vars(owner).items():
        if not name.startswith("_"):
            look(name, value, 2)
    return found


def refuse_beside(
    model: torch.nn.Module, optimizers: Iterable[Any], named: Mapping[str, torch.nn.Parameter]
) -> None:
    """Raise if an optimiser holds what is no part of the model, and so would be trained at each site for itself.

    Args:
        model: what is trained, all of which travels or was refused.
        optimizers: those that train it; wrapped ones, too.
        named: `hidden_parameters`, whose names stand in the error.

    Raises:
        LayoutError: the parameters by name, and what can be done.
    """
    inside = {id(parameter) for parameter in model.parameters()}
    names = {id(parameter): name for name, parameter in named.items()}
    extras = [
        names.get(id(p), f"a parameter of shape {list(p.shape)} in group {number} of the optimiser")
        for optimizer in optimizers
        for number, group in enumerate(getattr(optimizer, "param_groups", ()))
        for p in group["params"]
        if p.requires_grad and p.numel() and id(p) not in inside
        if not (id(p) in names and stays(names[id(p)]))
    ]
    if extras:
        starts = sorted(
            {name.partition(".")[0] for name in extras if not name.startswith("a param")}
        )
        choice = (
            f", or leave them to each site by choice with exclude={starts[0] + '.*'!r}"
            if starts
            else ""
        )
        raise LayoutError(
            f"the optimiser trains what is no part of the model, and so would be kept by each site for itself: "
            f"{_listed(extras)}; make them part of the model, freeze them with requires_grad_(False){choice}"
        )


def _advice(model: Any, adapter: str, extras: Mapping[str, torch.nn.Parameter]) -> str:
    owners = _owners(model)
    others = sorted({owners.get(id(p), adapter) for p in extras.values()} - {adapter})
    if others:
        return (
            f"they belong to {_listed(map(repr, others))}, and one adapter travels: train one at a time, "
            f"model.set_adapter({adapter!r})"
        )
    paths = [name.split(".") for name in extras]
    rest = set(model.peft_config) - {
        adapter
    }  # PEFT leaves out what has one of their names in its path
    clashes = sorted(name for name in rest if any(name in path for path in paths))
    if clashes and any(id(p) in owners for p in extras.values()):
        return (
            f"PEFT does not save them, as {_listed(map(repr, clashes))} is the name of another adapter and of a "
            "module: give that adapter a name that no module has"
        )
    if clashes:  # X-LoRA numbers its adapters, and a classifier's layers are numbered as well
        kind = model.peft_config[adapter].peft_type
        name = getattr(kind, "value", kind)
        return f"PEFT does not save them for {name}, so it can't take part: train one adapter"
    modules = sorted({path[-2] for path in paths if len(path) > 1 and "base_layer" not in path})
    return (
        f"let their modules travel with modules_to_save={modules[:_SHOWN] or ['...']} in the adapter's config, or "
        "freeze them with requires_grad_(False)"
    )


def _owners(model: Any) -> dict[int, str]:
    """Return the adapter of each parameter that belongs to one, by the parameter's id."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[int, str] = {}
    for module in model.modules():
        places: Iterable[str] = ()
        if isinstance(module, BaseTunerLayer):
            places = module.adapter_layer_names
        elif isinstance(module, AuxiliaryTrainingWrapper):
            places = [name for name, _ in module.named_children() if name != "original_module"]
        for place in places:
            values = getattr(module, place, None)
            if not isinstance(values, torch.nn.ModuleDict | torch.nn.ParameterDict):
                continue
            for adapter, value in values.items():
                inside = [value] if isinstance(value, torch.nn.Parameter) else value.parameters()
                found.update((id(parameter), adapter) for parameter in inside)
    return found


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
