"""The digests by which the server tells whether all sites have the same base: what is frozen and never travels.

A tensor of at most a million elements is digested whole. Of a larger one 64 blocks of 2,048 elements are, spread
evenly from its beginning to its end; of an embedding or an output head also the last 8 million elements, where the
rows of added tokens lie. Values are rounded to bfloat16 first, so that it does not matter in which dtype a site
loads one and the same file. What a quantiser holds is digested as it is, and named after the quantiser.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.loss import _Loss

from fedcore.files.frozen import FLOAT, HALF, MAX_GROUPS, FrozenGroup, config_groups

from .naming import plain_names
from .sharding import address, is_sharded, whole

__all__ = ["frozen_groups", "frozen_tensors"]

_WHOLE: Final = 1 << 20
_BLOCKS: Final = 64
_BLOCK: Final = 2048
_ROWS: Final = 8 << 20
_PIECE: Final = 1 << 15
"""Elements that are rounded and digested at a time: a copy of all of them would stay in the process's memory."""
_DIGITS: Final = 32
_NAME: Final = 200
_FLOATS: Final = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_ADAPTED: Final = re.compile(r"(^|\.)(base_layer|original_module)(?=\.|$)")


def frozen_groups(
    model: nn.Module, sent: Mapping[str, torch.Tensor], root: nn.Module
) -> list[FrozenGroup]:
    """Describe what of a model is frozen, as `fedcore.files.frozen` compares it; collective where it is sharded.

    Args:
        model: all that a site trains with.
        sent: the tensors that travel or that the site keeps for itself by choice.
        root: the model in it whose tensors travel; names are relative to it.

    Returns nothing where all tensors travel.
    """
    # Counters say nothing of what a model computes.
    tensors = {
        name: (module, tensor)
        for name, module, tensor in frozen_tensors(model, sent, root)
        if tensor.ndim or isinstance(tensor, nn.Parameter)
    }
    if not tensors:
        return []
    rows = _embeddings(root)
    digests = {
        name: (_form(module, tensor), _digest(tensor, module in rows))
        for name, (module, tensor) in sorted(tensors.items())
    }
    write = getattr(getattr(root, "config", None), "to_json_string", None)
    values = {} if write is None else json.loads(write())
    settings = config_groups(values)
    for depth in (None, 3, 2, 1, 0):
        found = _grouped(digests, depth)
        if len(found) + len(settings) <= MAX_GROUPS:
            break
    return found + settings


def _grouped(digests: Mapping[str, tuple[str, str]], depth: int | None) -> list[FrozenGroup]:
    """Put together the tensors whose names are alike but for numbers, or in their first ``depth`` parts."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, (form, digest) in digests.items():
        parts = name.split(".")
        kind = ".".join("*" if part.isdigit() else part for part in parts[:depth])
        label = kind if depth is None else f"{kind}.*".lstrip(".")
        groups.setdefault((label[-_NAME:], form), []).append((name, digest))
    return [
        (
            members[0][0][-_NAME:] if len(members) == 1 else label,
            form,
            len(members),
            _joined(members),
        )
        for (label, form), members in sorted(groups.items())
    ]


def _joined(members: list[tuple[str, str]]) -> str:
    if not all(digest for _, digest in members):
        return ""
    return hashlib.sha256(json.dumps(members).encode()).hexdigest()[:_DIGITS]


def frozen_tensors(
    model: nn.Module, sent: Mapping[str, torch.Tensor], root: nn.Module
) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Yield what neither travels nor is trained: its name in the plain model, the module that owns it, and itself.

    Of what lies outside of ``root``, parameters alone count. Arguments are those of `frozen_groups`.
    """
    starts = {address(tensor) for tensor in sent.values() if tensor.numel()}
    unused = _unused(root)
    inside = {id(module) for module in root.modules()}
    start = next(name for name, module in model.named_modules() if module is root)
    seen: set[int] = set()
    owners = [
        (f"{prefix}.{name}" if prefix else name, module, tensor)
        for prefix, module in model.named_modules()
        for name, tensor in _own(module)
    ]
    plain = plain_names(model, (name for name, _, _ in owners), strict=False)
    begin = plain_names(model, [f"{start}.x"], strict=False)[f"{start}.x"][:-1] if start else ""
    for name, module, tensor in owners:
        if id(tensor) in seen or id(tensor) in unused or not tensor.numel():
            continue
        seen.add(id(tensor))
        if tensor.requires_grad:
            continue
        # Where a rank's part lies says nothing if it is empty, and all ranks have to choose the same tensors.
        if not (tensor.is_meta or is_sharded(tensor)) and address(tensor) in starts:
            continue
        short = plain[name]
        if id(module) not in inside and not isinstance(tensor, nn.Parameter):
            continue
        if id(module) in inside:
            short = _ADAPTED.sub("", short.removeprefix(begin).removeprefix(_base_of(root)))
        yield short.lstrip("."), module, tensor


def _base_of(root: Any) -> str:
    """Return where a PEFT model holds its base, as names begin; where it computes a prompt, right below it."""
    if not hasattr(root, "peft_config"):
        return ""
    return "base_model." if hasattr(root, "prompt_encoder") else "base_model.model."


def _own(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's own parameters, and those of its buffers that a file of the model has; of a loss, none."""
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set and not isinstance(module, _Loss):
            yield name, buffer


def _unused(root: Any) -> set[int]:
    """Return the ids of tensors that take no part: adapters that are not active, and what an adapter replaces."""
    if not hasattr(root, "peft_config"):
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    # Of a prompt, what is saved is computed from all of its parts.
    prompts = getattr(root, "prompt_encoder", {}).values()
    found = {id(tensor) for prompt in prompts for tensor in _tensors(prompt)}
    for module in root.modules():
        if isinstance(module, ModulesToSaveWrapper):
            active = {module.active_adapter} if isinstance(module.active_adapter, str) else set()
            active |= set(getattr(module, "active_adapters", ()))
            if active & set(module.modules_to_save):
                found.update(id(tensor) for tensor in _tensors(module.original_module))
            idle = [m for name, m in module.modules_to_save.items() if name not in active]
            found.update(id(tensor) for m in idle for tensor in _tensors(m))
        elif isinstance(module, BaseTunerLayer):
            for place in module.adapter_layer_names:
                values = getattr(module, place, None)
                if isinstance(values, nn.ModuleDict | nn.ParameterDict):
                    for name, value in values.items():
                        if name not in module.active_adapters:
                            found.update(id(tensor) for tensor in _tensors(value))
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    return [value]


def _embeddings(root: Any) -> set[nn.Module]:
    """Return the modules whose rows are tokens."""
    found: set[nn.Module] = {m for m in root.modules() if isinstance(m, nn.Embedding)}
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(root, name)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            found.update((module, getattr(module, "base_layer", module)))
    return found


def _form(module: nn.Module, tensor: Any) -> str:
    """Return how a tensor's values are held: as plain floats, or by which quantiser."""
    kind, package = type(tensor).__name__, type(module).__module__.partition(".")[0]
    plain = kind in ("Parameter", "Tensor", "DTensor", "Buffer")
    if plain and package != "bitsandbytes" and tensor.dtype in _FLOATS:
        return HALF if tensor.dtype == torch.float16 else FLOAT
    detail = [
        str(getattr(tensor, name)) for name in ("quant_type", "blocksize") if hasattr(tensor, name)
    ]
    dtype = str(tensor.dtype).removeprefix("torch.")
    if plain and package == "torch":
        return dtype
    return " ".join([package, kind, *detail, dtype, "on", tensor.device.type])[:64]


def _digest(tensor: torch.Tensor, rows: bool) -> str:
    """Return a digest of a tensor's values; empty where they can't be read."""
    if tensor.is_meta:
        return ""
    hasher = hashlib.sha256(json.dumps(list(tensor.shape)).encode())
    with torch.no_grad():
        parts = [whole(tensor) if is_sharded(tensor) else tensor]
        # Without the scales of its blocks a quantised tensor is not known.
        scales = (
            getattr(getattr(tensor, "quant_state", None), "absmax", None),
            getattr(tensor, "SCB", None),
        )
        parts += [scale for scale in scales if isinstance(scale, torch.Tensor)]
        for part in parts:
            try:
                flat = part.detach().reshape(-1)
                for piece in (
                    piece for run in _chosen(flat, rows) for piece in torch.split(run, _PIECE)
                ):
                    rounded = piece.to(torch.bfloat16) if piece.dtype in _FLOATS else piece
                    hasher.update(rounded.cpu().contiguous().view(torch.uint8).numpy().data)
            except (RuntimeError, NotImplementedError):  # a tensor of a kind of its own
                return ""
    return hasher.hexdigest()[:_DIGITS]


def _chosen(flat: torch.Tensor, rows: bool) -> list[torch.Tensor]:
    """Return the parts of a flat tensor that are digested, one after the other; they share its storage."""
    count = flat.numel()
    if count <= _WHOLE:
        return [flat]
    step = (count - _BLOCK) / (_BLOCKS - 1)
    starts = [round(place * step) for place in range(_BLOCKS)]
    blocks = [flat[start : start + _BLOCK] for start in starts]
    return [*blocks, flat[-_ROWS:]] if rows else blocks
