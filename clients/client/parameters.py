"""Which tensors of a torch model travel, under which names, and how their bytes get in and out.

The rules:

- A PEFT model sends its active adapter, under the names of PEFT's own file format, so that what comes out of a run
  opens with ``PeftModel.from_pretrained``. The frozen base never leaves the disk. Parameters outside the adapter
  that are trained all the same are refused, since each site would keep its own.
- A model that is trained whole sends its ``state_dict``, persistent buffers included. Tied tensors travel
  once, under their first name.
- A partly frozen model sends its trainable parameters, and the persistent buffers of modules that own one. So do
  the buffers of a module without parameters, such as a batch norm that learns none, beside a trainable one.
- A wrapper (a LightningModule, DistributedDataParallel, a compiled module) is looked through where one model
  inside it, from PEFT or transformers, holds everything that is trained.
- Names are those of the plain class: wrappers inside a model leave no part in them (see `naming`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.nn.modules.loss import _Loss

from fedcore.errors import LayoutError
from fedcore.files.frozen import FrozenGroup
from fedcore.layout import FLOATS, TensorSpec, check_names, compare_layouts
from fedcore.protocol import LoraMethod, Role
from fedcore.roles import Pairs
from fedcore.site.received import Received
from fedcore.site.session import GlobalModel

from .base import frozen_groups, frozen_tensors
from .cards import adapter_files, frozen_by_class, model_files
from .choice import travelling
from .extras import active_adapter, refuse_extras, refuse_missing
from .factors import Held, lora_pairs
from .naming import in_state_dict, inner_module, own_names, plain_names
from .prompts import is_computed, load_prompt
from .sharding import address, is_sharded, local, put, whole

__all__ = [
    "AllTensors",
    "ModelParameters",
    "dtype_name",
    "from_view",
    "is_known",
    "raw_bytes",
    "to_dtype",
    "unwrap",
]

_DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME: Final = {name: dtype for dtype, name in _DTYPES.items()}


def dtype_name(name: str, tensor: torch.Tensor) -> str:
    """Return the safetensors name of a tensor's dtype; LayoutError names the tensor if it has none here."""
    try:
        return _DTYPES[tensor.dtype]
    except KeyError:
        raise LayoutError(
            f"tensor {name!r} has dtype {tensor.dtype}, which can't be averaged; freeze it or train it in "
            "another dtype"
        ) from None


def to_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name."""
    return _BY_NAME[name]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order; a copy only if it is not contiguous or not in main memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def from_view(view: memoryview, spec: TensorSpec) -> torch.Tensor:
    """Return a tensor over raw bytes, without a copy; it is read-only if the view is."""
    _, dtype, shape = spec
    if len(view) == 0:
        return torch.empty(list(shape), dtype=_BY_NAME[dtype])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(view, dtype=_BY_NAME[dtype]).reshape(list(shape))


class Joined(NamedTuple):
    """What travelled when a site joined: the given module, the one inside it that holds all, and the names."""

    given: nn.Module
    root: nn.Module
    names: tuple[str, ...]


class ModelParameters:
    """The travelling tensors of one model.

    Args:
        model: a module, wrapped or not.
        joined: see `joined`; what travelled when the site joined travels still, frozen or not.

    Attributes:
        specs: name, dtype and shape of each.
        sharded: whether several processes hold parts of them; `read` and `load` are collective calls then.

    Raises:
        LayoutError: the model has nothing to train, trains parameters beside its PEFT adapter, or holds tensors on
            the meta device or ones of a dtype that can't be averaged.
    """

    def __init__(self, model: nn.Module, joined: Joined | None = None) -> None:
        _refuse_flat(model)
        if joined is not None and unwrap(joined.given) is not unwrap(model):
            joined = None
        root = _find_root(unwrap(model)) if joined is None else joined.root
        if not any(p.requires_grad for p in root.parameters()):
            raise LayoutError("the model has no trainable tensor, so there is nothing to send")
        self._root = root
        self._prompt = False
        if _is_peft(root):
            self._tensors = _peft_tensors(root)
            self._prompt = _computes(root, self._tensors)
        else:
            self._tensors = _own_tensors(root)
            if joined is not None:
                self._tensors = _with(root, self._tensors, joined.names)
        check_names(self._tensors)
        for name, tensor in self._tensors.items():
            _check(name, tensor)
        (refuse_extras if _is_peft(root) else refuse_missing)(root, self._tensors)
        self.specs: list[TensorSpec] = [
            (name, dtype_name(name, self._tensors[name]), list(self._tensors[name].shape))
            for name in travelling(list(self._tensors))
        ]
        self._given = model
        self.sharded = any(is_sharded(tensor) for tensor in self._tensors.values())

    @property
    def files(self) -> dict[str, str]:
        """JSON files that describe the model, by name, without local paths; see `cards`."""
        if _is_peft(self._root):
            return adapter_files(self._root, self._given, self.specs, self._tensors)
        return model_files(
            self._root, self._given, self.specs, pretrained=_is_pretrained(self._root)
        )

    @property
    def roles(self) -> dict[str, Role]:
        """What each tensor is to the model, but for its parameters; see `fedcore.roles`.

        A tensor that is tied to a parameter, or that is computed from some, is a parameter.
        """
        buffers = {_place(b) for b in self._root.buffers() if b.numel()}
        buffers -= {_place(p) for p in self._root.parameters()}
        found: dict[str, Role] = {}
        for name, dtype, _ in self.specs:
            if dtype not in FLOATS:
                found[name] = "integer"
            elif _place(self._tensors[name]) in buffers:
                found[name] = "buffer"
        return found

    def pairs(self, method: LoraMethod | None) -> Pairs:
        """Return the names of the factors of each module that the adapter changes.

        None where there is no adapter, or ``method`` is None: each tensor is combined for itself.

        Raises:
            ConfigError: the method refuses what the adapter has; the message says why, and what works.
            LayoutError: the adapter has no factors of LoRA, or half of a module's travel.
        """
        if method is None or not _is_peft(self._root):
            return ()
        return lora_pairs(self.files["adapter_config.json"], self.specs, method)

    @property
    def model_specs(self) -> Sequence[TensorSpec]:
        """Name, dtype and shape of what the global model holds."""
        return self.specs

    def begin(self, task: GlobalModel, folder: Path | None) -> None:
        """Note which task the model is loaded for.

        Args:
            task: of the site.
            folder: outlives the process; None: nothing does.
        """

    def keep(self, task: GlobalModel, folder: Path | None) -> None:
        """Keep what training has made and does not travel; arguments as `begin` has them."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor by the name under which it travels."""
        return self._tensors[name]

    def hold(self, held: Held, names: Iterable[str]) -> None:
        """Have the tensors of these names stay as they are in training, and no others."""
        held.hold(self._root, [self._tensors[name] for name in names])

    @property
    def names(self) -> list[str]:
        """The names under which tensors travel."""
        return [spec[0] for spec in self.specs]

    def joined(self) -> Joined:
        """Return what travels, without the tensors."""
        return Joined(self._given, self._root, tuple(self._tensors))

    def frozen(self) -> list[FrozenGroup]:
        """Return digests of what the model has and does not travel; a collective call where it is sharded."""
        return frozen_groups(self._given, self._tensors, self._root)

    def frozen_tensors(self) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
        """Yield name, owning module and tensor of what neither travels nor is trained."""
        return frozen_tensors(self._given, self._tensors, self._root)

    def own_names(self) -> dict[str, str]:
        """Return the travelling name of each tensor that the given module's ``state_dict`` names otherwise.

        Empty for a PEFT model, whose tensors travel under the names of PEFT's file format.
        """
        return {} if _is_peft(self._root) else own_names(self._given, self._root)

    def read(self, name: str) -> memoryview:
        """Return the raw bytes of a tensor; a copy only if it is not contiguous or not in main memory."""
        tensors = _peft_tensors(self._root) if self._prompt else self._tensors
        return raw_bytes(whole(tensors[name]))

    def parts(self) -> dict[str, torch.Tensor]:
        """Return this process's part of each tensor that a loaded model lies in, by name; they share its storage.

        Where a prompt is computed, these are the parameters of the network that computes it.
        """
        if self._prompt:
            return {n: p.detach() for n, p in self._root.named_parameters() if p.requires_grad}
        return {name: local(self._tensors[name]) for name in self.names}

    def load(self, specs: Sequence[TensorSpec], tensors: Mapping[str, memoryview]) -> None:
        """Copy a global model into the model in place.

        All names, dtypes and shapes are compared before a byte is changed.

        Raises:
            LayoutError: they differ; each tensor that does is named.
        """
        difference = compare_layouts(self.specs, specs, "this site", "the global model")
        if difference is not None:
            raise LayoutError(f"the global model does not fit this model: {difference}")
        self._fill(self.specs, tensors)
        if isinstance(tensors, Received):
            tensors.release()

    def _fill(self, specs: Sequence[TensorSpec], tensors: Mapping[str, memoryview]) -> None:
        with torch.no_grad():
            if self._prompt:
                from peft import set_peft_model_state_dict

                state = {s[0]: from_view(tensors[s[0]], s).clone() for s in specs}
                adapter = active_adapter(self._root)
                if is_computed(self._root, adapter):
                    load_prompt(self._root, adapter, state.pop("prompt_embeddings"))
                    for (
                        name,
                        tensor,
                    ) in state.items():  # modules_to_save, such as a classifier's head
                        put(self._tensors[name], tensor)
                else:
                    set_peft_model_state_dict(self._root, state, adapter)
                return
            for spec in specs:
                put(self._tensors[spec[0]], from_view(tensors[spec[0]], spec))


class AllTensors(ModelParameters):
    """Every tensor of a model or of its adapter, trained or not; `load` takes a part of them."""

    def __init__(self, model: nn.Module) -> None:
        self._given = self._root = model
        peft = _is_peft(model)
        self._tensors = _peft_tensors(model) if peft else _own_tensors(model, whole=True)
        self._prompt = peft and _computes(model, self._tensors)
        self.sharded = False
        self.specs = [
            (name, _DTYPES.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape))
            for name, tensor in self._tensors.items()
        ]

    def load(self, specs: Sequence[TensorSpec], tensors: Mapping[str, memoryview]) -> None:
        """Copy these tensors, which the caller has compared with `specs`, into the model."""
        self._fill(specs, tensors)


def _refuse_flat(model: nn.Module) -> None:
    """FSDP1 and DeepSpeed's ZeRO keep values that what is loaded into the module would not reach."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise LayoutError(
            "the model is sharded by FullyShardedDataParallel (FSDP1), whose flat parameters can't be exchanged; "
            "use FSDP2 (fully_shard; Lightning's ModelParallelStrategy; fsdp_version 2 in transformers)"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise LayoutError(
            "the model is partitioned by DeepSpeed, which is not supported; use FSDP2"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside all wrappers around it."""
    while (inner := inner_module(model)) is not None:
        model = inner
    return model


def _is_peft(module: nn.Module) -> bool:
    """Whether this is a PEFT model, or a transformers model with an adapter of its own (``add_adapter``)."""
    return any(c.__name__ == "PeftModel" for c in type(module).__mro__) or (
        _is_pretrained(module) and vars(module).get("_hf_peft_config_loaded", False)
    )


def _is_pretrained(module: nn.Module) -> bool:
    return any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__)


def is_known(module: nn.Module) -> bool:
    """Whether a model of this kind travels alone, if it holds all that a larger one trains."""
    return _is_peft(module) or _is_pretrained(module)


def _find_root(model: nn.Module) -> nn.Module:
    """Return the PEFT or transformers model that holds all that is trained, or the model itself."""
    if _is_peft(model) or _is_pretrained(model):
        return model
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    for test in (_is_peft, _is_pretrained):
        for module in model.modules():
            if test(module) and trained <= {id(p) for p in module.parameters()}:
                return module
    return model


def _peft_tensors(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    adapter = active_adapter(model)
    config = model.peft_config[adapter]
    # AdaLoRA's ranks differ from site to site once it prunes; without the pattern all travel, zeros included.
    pattern = getattr(config, "rank_pattern", None)
    pruned = getattr(config.peft_type, "value", config.peft_type) == "ADALORA" and pattern
    try:
        if pruned:
            config.rank_pattern = None
        found: dict[str, torch.Tensor] = get_peft_model_state_dict(
            model, adapter_name=adapter, save_embedding_layers=False
        )
    finally:
        if pruned:
            config.rank_pattern = pattern
    plain = plain_names(model, found)
    # Files of PEFT's format name tensors from a PeftModel down, whatever holds the adapter.
    start = "base_model.model." if _is_pretrained(model) else ""
    return {start + plain[name]: tensor.detach() for name, tensor in found.items()}


def _own_tensors(model: nn.Module, *, whole: bool = False) -> dict[str, torch.Tensor]:
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    frozen = {in_state_dict(name) for name, p in model.named_parameters() if id(p) not in trained}
    # What the class itself freezes is a part of a model that is trained whole, and its loader expects it.
    whole = whole or not frozen or (_is_pretrained(model) and frozen <= frozen_by_class(model))
    keep: set[str] | None = None
    if not whole:
        keep = set()
        parents = {child: module for module in model.modules() for child in module.children()}
        for prefix, module in model.named_modules():
            own = [name for name, p in module.named_parameters(recurse=False) if id(p) in trained]
            if own or _moves_with(module, parents.get(module, module)):
                own += [name for name, _ in module.named_buffers(recurse=False)]
            keep.update(in_state_dict(f"{prefix}.{name}" if prefix else name) for name in own)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or (keep is not None and name not in keep):
            continue
        if not tensor.is_meta and tensor.numel():
            # Where a rank's part of a tensor lies says nothing if it is empty.
            place: object = id(tensor) if is_sharded(tensor) else tensor.data_ptr()
            key = (place, tuple(tensor.shape), tuple(tensor.stride()))
            if key in seen:
                continue
            seen.add(key)
        tensors[name] = tensor.detach()
    plain = plain_names(model, tensors)
    return {plain[name]: tensor for name, tensor in tensors.items()}


def _with(
    model: nn.Module, tensors: dict[str, torch.Tensor], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Return ``tensors`` and those of ``names`` besides, in the order of the model's ``state_dict``."""
    wanted = {*tensors, *names}
    if wanted == tensors.keys():
        return tensors
    found = _own_tensors(model, whole=True)
    return {name: tensor for name, tensor in found.items() if name in wanted}


def _moves_with(module: nn.Module, parent: nn.Module) -> bool:
    """Whether a module without parameters has buffers that move as what is trained around it does."""
    buffers = list(module.buffers(recurse=False))
    return (
        not any(True for _ in module.parameters())
        and any(buffer.is_floating_point() for buffer in buffers)
        and not isinstance(module, _Loss)
        and any(p.requires_grad for p in parent.parameters())
    )


def _computes(root: Any, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors are computed each time they are asked for, as a prompt is.

    Raises:
        LayoutError: they are and are no prompt, so that nothing could be loaded into them.
    """
    shared = {address(tensor) for tensor in root.state_dict().values() if hasattr(tensor, "shape")}
    if all(address(tensor) in shared for tensor in tensors.values()):
        return False
    if hasattr(root, "prompt_encoder"):
        return True
    again = _peft_tensors(root)
    moved = [name for name, tensor in tensors.items() if address(tensor) != address(again[name])]
    if not moved:
        return False
    config = root.peft_config[active_adapter(root)]
    chosen = getattr(
        config, "save_only_topk_weights", False
    )  # VB-LoRA's files then hold a choice of its weights
    raise LayoutError(
        f"the tensor {moved[0]!r} of {getattr(config.peft_type, 'value', config.peft_type)} is computed anew each "
        "time it is asked for, so nothing can be loaded into it; "
        + ("set save_only_topk_weights=False" if chosen else "take another PEFT method")
    )


def _place(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, address(tensor)


def _check(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise LayoutError(
            f"tensor {name!r} is on the meta device and holds no values; load the model's weights first"
        )
