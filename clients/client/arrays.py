"""Named arrays of any framework as raw bytes, by DLPack or NumPy's protocol, and back as NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fedcore.errors import LayoutError
from fedcore.layout import TensorSpec, check_names

if TYPE_CHECKING:
    from fedcore.files.frozen import FrozenGroup

__all__ = ["Arrays", "to_numpy"]

_NUMPY: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "bfloat16": "BF16",  # of ml_dtypes, which JAX brings along
}  # fmt: skip
_TO_NUMPY: Final = {name: dtype for dtype, name in _NUMPY.items()}


class Arrays:
    """A set of named arrays: torch tensors, or whatever NumPy can read.

    Attributes:
        specs: names, dtypes and shapes, in the order of the mapping.
        files: nothing; what a script has beside its arrays is not known.

    Raises:
        LayoutError: there is none, or one has a name or a dtype that no model file has.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        if not values:
            raise LayoutError("there is no tensor to send")
        check_names(values)
        self._values = {name: _plain(name, value) for name, value in values.items()}
        self.specs: list[TensorSpec] = [
            (name, _dtype(name, value), list(value.shape)) for name, value in self._values.items()
        ]
        self.files: dict[str, str] = {}

    @property
    def of_torch(self) -> bool:
        """Whether any of them is a torch tensor."""
        return any(map(_is_torch, self._values.values()))

    def frozen(self) -> list[FrozenGroup]:
        """Return nothing: what a script has beside its arrays is not known."""
        return []

    def read(self, name: str) -> memoryview:
        """Return the raw bytes of an array; a copy only if it is not contiguous."""
        value = self._values[name]
        if _is_torch(value):
            from .parameters import raw_bytes

            return raw_bytes(value)
        import numpy as np

        return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _is_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def _plain(name: str, value: Any) -> Any:
    if _is_torch(value):
        return value.detach()
    import numpy as np

    array = np.from_dlpack(value) if _only_dlpack(value) else np.asarray(value)
    if str(array.dtype) not in _NUMPY:
        raise LayoutError(
            f"tensor {name!r} has dtype {array.dtype}; expected one of {', '.join(_NUMPY)}"
        )
    return array


def _only_dlpack(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not hasattr(value, "__array__")


def _dtype(name: str, value: Any) -> str:
    if _is_torch(value):
        from .parameters import dtype_name

        return dtype_name(name, value)
    return _NUMPY[str(value.dtype)]


def to_numpy(view: memoryview, spec: TensorSpec) -> Any:
    """Return a NumPy array that is a copy of the raw bytes of a tensor.

    Raises:
        LayoutError: NumPy has no such dtype here.
    """
    import numpy as np

    name, dtype, shape = spec
    if dtype == "BF16":
        try:
            from ml_dtypes import bfloat16
        except ImportError:
            raise LayoutError(
                f"tensor {name!r} is {dtype}, which NumPy can't hold without the package ml_dtypes; install it, "
                "or pass a torch module to fl.init"
            ) from None
        return np.frombuffer(view, np.uint16).view(bfloat16).reshape(list(shape)).copy()
    return np.frombuffer(view, _TO_NUMPY[dtype]).reshape(list(shape)).copy()
