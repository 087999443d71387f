"""What all sites of a run must have alike: the adapter's configuration and what they send fingerprints of.

Tensors of the same names and shapes can still mean different things: an adapter of another scale, or token ids of
another tokenizer. Their average would be of no use, and nothing else would tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from fedcore import protocol

__all__ = ["Agreement"]

_CONFIG: Final = "adapter_config.json"
# Where a site's base model lies and what wrote the file say nothing of what the tensors mean.
_FREE: Final = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
)
_SHOWN: Final = 60
_DEEPEST: Final = 20


class Agreement:
    """Remembers what each site declared last; ``files`` gives what describes the run's model once there is one."""

    def __init__(self, files: Callable[[], Mapping[str, str]]) -> None:
        self._files = files
        self._configs: dict[str, dict[str, Any]] = {}
        self._fingerprints: dict[str, dict[str, str]] = {}

    def difference(self, site: str, declare: protocol.Declare) -> str | None:
        """Return how a site differs from the others, in words that name both; None if it does not: it is noted."""
        config = _config(declare.files)
        for other, known in [*self._configs.items(), ("", _config(self._files()))]:
            key = None if other == site else _differs(config, known)
            if key is not None:
                named = repr(protocol.shown(key, _SHOWN))
                there = f"site {other!r}" if other else "the run's initial model"
                return (
                    f"the PEFT config of site {site!r} differs from that of {there} in {named}: "
                    f"{_short(config.get(key))} at site {site!r}, {_short(known.get(key))} at {there}; give all "
                    "sites the same config"
                )
        for other, prints in self._fingerprints.items():
            for name in sorted(prints.keys() & declare.fingerprints.keys()):
                here, there = declare.fingerprints[name], prints[name]
                if other != site and here != there:
                    return (
                        f"the {name} of site {site!r} (sha256 {here[:12]}) is not that of site {other!r} (sha256 "
                        f"{there[:12]}); give all sites the same {name}"
                    )
        self._configs[site] = config
        self._fingerprints[site] = dict(declare.fingerprints)
        return None

    def forget(self, site: str) -> None:
        """Compare nobody with a site any more, as it must keep nobody out when its key is revoked."""
        self._configs.pop(site, None)
        self._fingerprints.pop(site, None)


def _config(files: Mapping[str, str]) -> dict[str, Any]:
    try:
        values = json.loads(files.get(_CONFIG, "{}"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) and _is_shallow(values) else {}


def _is_shallow(value: Any) -> bool:
    """Whether a value is nested no deeper than any that means something: comparing it takes the stack, too."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return not level


def _differs(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return the first entry that differs; an entry that only one version of PEFT writes is no difference."""
    for key in sorted(one.keys() & other.keys() - _FREE):
        if _unordered(one[key]) != _unordered(other[key]):
            return key
    return None


def _unordered(value: Any) -> Any:
    """PEFT keeps names of modules in sets, which it writes in any order."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return sorted(value)
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
