"""The JSON files that describe a model: its configuration, and whether its library opens what travels of it."""

from __future__ import annotations

import copy
import json
import re
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fedcore.files.opening import CARD, Card
from fedcore.layout import TensorSpec

from .extras import active_adapter
from .naming import plain_names

__all__ = ["adapter_files", "frozen_by_class", "model_files"]

_SENTENCE: Final = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
"""The classes of sentence-transformers, which make up what a folder lacks."""
_CHANGES: Final = ("pissa_niter", "corda", "lora_ga")
"""What PEFT's ways to draw first values begin with that change the base, and another time in another way."""
_REPOSITORY: Final = re.compile(r"models--([^/]+?)--([^/]+)")


def adapter_files(
    root: Any, given: nn.Module, specs: Sequence[TensorSpec], names: Iterable[str]
) -> dict[str, str]:
    """Return the files of a model with an adapter.

    Args:
        root: the model that has the adapter.
        given: what the script works with.
        specs: what travels.
        names: all tensors of the adapter.
    """
    config = root.peft_config[active_adapter(root)]
    sentence = _sentence(given)
    closed = _kept(specs, list(names)) or _why(sentence) or _changed(config)
    notes = [_TIED] if _is_tied(root) else []
    notes += _resized(root, config, [spec[0] for spec in specs])
    files = {"adapter_config.json": _adapter_config(config)}
    if closed or notes:
        base = _base_name(getattr(config, "base_model_name_or_path", None))
        library = "sentence_transformers" if sentence else "peft"
        files[CARD] = Card(
            library, sentence or _class_name(root), base, closed, tuple(notes)
        ).text()
    return files


def model_files(
    root: Any, given: nn.Module, specs: Sequence[TensorSpec], *, pretrained: bool
) -> dict[str, str]:
    """Return the files of a model without an adapter; see `adapter_files`."""
    sentence = _sentence(given)
    if not pretrained:
        if sentence is None:
            return {}
        return {CARD: Card("sentence_transformers", sentence, None, _why(sentence)).text()}
    files = _configs(root)
    reference = _built_anew(root)
    closed = _incomplete(root, reference, specs) or _why(sentence)
    notes = _dtype_notes(root, reference)
    if closed or notes:
        base = _base_name(getattr(root, "name_or_path", None))
        library = "sentence_transformers" if sentence else "transformers"
        kind = sentence or _class_name(root)
        files[CARD] = Card(library, kind, base, closed, tuple(notes)).text()
    return files


def _class_name(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")


def _sentence(given: nn.Module) -> str | None:
    """Return the name of the class of sentence-transformers, if the model is of one."""
    names = (cls.__name__ for module in given.modules() for cls in type(module).__mro__)
    return next((name for name in names if name in _SENTENCE), None)


def _why(sentence: str | None) -> str | None:
    """Say why a model of sentence-transformers does not open."""
    return sentence and (
        f"its tokenizer, its pooling and the order of its modules are not here, and {sentence} would make up "
        "its own"
    )


def _kept(specs: Sequence[TensorSpec], names: Sequence[str]) -> str | None:
    left = len(names) - len({spec[0] for spec in specs}.intersection(names))
    return f"{left} of its {len(names)} tensors did not travel" if left else None


def _changed(config: Any) -> str | None:
    """Say why PEFT would put the adapter on another base: the one it was trained on can't be made again."""
    how = str(getattr(config, "init_lora_weights", ""))
    if not how.lower().startswith(_CHANGES):
        return None
    return (
        f"init_lora_weights={how!r} has changed the base by random numbers or by a site's data, and "
        "PeftModel.from_pretrained would change it in another way"
    )


def _incomplete(root: Any, reference: nn.Module | None, specs: Sequence[TensorSpec]) -> str | None:
    """Say why ``from_pretrained`` would open another model than the one that is scored; None if it would not."""
    found = {name: list(shape) for name, _, shape in specs}
    model = root if reference is None else reference
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if hasattr(t, "shape")}
    plain = plain_names(model, state, strict=False)
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(plain[name])
    ignored = _patterns(root, "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save")
    missing = [
        names[0]
        for names in groups.values()
        if not found.keys() & set(names)
        and not any(re.search(p, n) for p in ignored for n in names)
    ]
    if missing:
        return (
            f"{len(missing)} of the {len(groups)} tensors of {_class_name(root)} did not travel, such as "
            f"{missing[0]}, and from_pretrained would fill them with random values"
        )
    if reference is None:
        return None
    shapes = {plain[name]: list(tensor.shape) for name, tensor in state.items()}
    odd = [name for name, shape in found.items() if shapes.get(name) != shape]
    if odd:
        return (
            f"{_class_name(root)} as its config.json describes it does not have {len(odd)} of the tensors, such "
            f"as {odd[0]}: the training script changed its layers"
        )
    return None


_frozen: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()


def frozen_by_class(root: nn.Module) -> frozenset[str]:
    """Return the parameters that a transformers model's class freezes itself, such as sinusoidal positions."""
    if root not in _frozen:
        made = _built_anew(root)
        frozen = () if made is None else made.named_parameters()
        _frozen[root] = frozenset(name for name, p in frozen if not p.requires_grad)
    return _frozen[root]


def _built_anew(root: Any) -> nn.Module | None:
    """Return the model that the class makes of the configuration alone, without values; None if it can't."""
    if getattr(root, "hf_quantizer", None) is not None:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made: nn.Module = type(root)(copy.deepcopy(root.config))
    except Exception:  # classes of anybody's making may want more than a configuration
        return None
    return made


def _patterns(root: Any, *attributes: str) -> list[str]:
    return [
        p for name in attributes for p in (getattr(root, name, None) or ()) if isinstance(p, str)
    ]


def _resized(root: Any, config: Any, names: Sequence[str]) -> list[str]:
    """Say so if the base's embeddings have other rows than the base that the adapter's configuration names."""
    find = getattr(root, "get_input_embeddings", None)
    table = None if find is None else getattr(find(), "weight", None)
    before = _vocabulary(getattr(config, "base_model_name_or_path", None))
    if table is None or before is None or before == len(table):
        return []
    if any("embed" in name and "lora" not in name for name in names):
        return []
    return [
        f"The base's vocabulary was resized from {before:,} to {len(table):,} tokens, and its embeddings are not "
        "here: resize yours before you put the adapter on it. Rows that were drawn at random for new tokens will "
        "differ; modules_to_save or trainable_token_indices would let them travel."
    ]


def _vocabulary(path: str | None) -> int | None:
    """Return how many tokens a base model has, if its configuration is on this machine."""
    if not path:
        return None
    file = Path(path) / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(path, "config.json")
        except HFValidationError:  # it is no name at the Hub
            return None
        if not isinstance(found, str):
            return None
        file = Path(found)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        size = values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


_TIED: Final = (
    "The adapter changes weights that the base model ties to each other (input embeddings and head). Use it as an "
    "adapter: merge_and_unload() merges into both ends and gives another model than the one that was scored."
)


def _is_tied(model: nn.Module) -> bool:
    """Whether an adapter lies on a weight that another module shares."""
    users: dict[int, int] = {}
    adapted: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and parameter.numel() and not parameter.is_meta:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
        base = getattr(module, "base_layer", None)
        weight = getattr(base, "weight", None)
        if isinstance(base, nn.Module) and isinstance(weight, torch.Tensor):
            adapted.add(id(weight))
    return any(users.get(place, 0) > 1 for place in adapted)


def _adapter_config(config: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        values = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    values["inference_mode"] = True
    if values.get("peft_type") == "ADALORA":
        values["rank_pattern"] = None  # all ranks travel
    modules = values.get("modules_to_save")
    if isinstance(modules, list):
        values["modules_to_save"] = list(dict.fromkeys(modules))
    path = values.get("base_model_name_or_path")
    if isinstance(path, str):
        values["base_model_name_or_path"] = _base_name(path)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _configs(model: Any) -> dict[str, str]:
    values = json.loads(model.config.to_json_string())
    values["architectures"] = [_class_name(model)]
    _set_dtype(values, model)
    path = values.get("_name_or_path")
    if isinstance(path, str):
        values["_name_or_path"] = _base_name(path)
    cards = {"config.json": json.dumps(values, indent=2, sort_keys=True) + "\n"}
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        cards["generation_config.json"] = generation.to_json_string()
    return cards


def _dtypes(model: Any) -> set[torch.dtype]:
    """Return the floating-point dtypes of the parameters, but for those that the class keeps in float32."""
    apart = _patterns(model, "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return {
        p.dtype
        for name, p in model.named_parameters()
        if p.is_floating_point() and not any(part in name for part in apart)
    }


def _dtype_notes(root: Any, reference: nn.Module | None) -> list[str]:
    notes = []
    if len(_dtypes(root)) > 1:
        notes.append(
            "The sites hold its parameters in several dtypes, and from_pretrained opens all in the widest: the "
            "values are the same, scores may differ a little."
        )
    ours = dict(root.named_buffers())
    rounded = [
        name
        for name, buffer in (() if reference is None else reference.named_buffers())
        if name in ours and buffer.is_floating_point() and ours[name].dtype != buffer.dtype
        if name not in root.state_dict()
    ]
    if rounded:
        notes.append(
            f"The sites cast the model, and with it {len(rounded)} buffers that from_pretrained makes anew (such "
            f"as {rounded[0]}): scores differ a little. Better load it with from_pretrained(..., dtype=...)."
        )
    return notes


def _set_dtype(values: dict[str, Any], model: Any) -> None:
    """Name the dtype that ``from_pretrained`` opens the model in: the widest one, so that no value is rounded."""
    found = _dtypes(model)
    if not found:
        return
    widest = max(found, key=lambda dtype: dtype.itemsize)
    if len({dtype for dtype in found if dtype.itemsize == widest.itemsize}) > 1:
        widest = torch.float32  # of fp16 and bf16 neither holds the other
    values["torch_dtype" if "torch_dtype" in values else "dtype"] = str(widest).partition(".")[2]


def _base_name(path: str | None) -> str | None:
    """Return a model's name; of a local path, which says where things lie at a site, its last part alone.

    A folder in the Hub's cache is called by a digest; its name at the Hub is in the path.
    """
    if not path or not (Path(path).is_absolute() or Path(path).exists()):
        return path
    cached = _REPOSITORY.search(path)
    return f"{cached[1]}/{cached[2]}" if cached else Path(path).name
