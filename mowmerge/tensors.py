"""Tensors as files describe them: the one dtype table, TensorSpec, and the reader protocol.

`torch` here is imported at its first use, so that a recipe is checked, a method is described and
a merge is planned without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _LazyTorch:
        """Stands for the torch module and imports it when an attribute is first asked for."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(import_module("torch"), name)
            self.__dict__[name] = value
            return value

    torch = _LazyTorch()
    Tensor = Any

__all__ = [
    "DTYPES",
    "Dtype",
    "Tensor",
    "TensorHandle",
    "TensorReader",
    "TensorSpec",
    "dtype_named",
    "torch",
]


@dataclass(frozen=True)
class Dtype:
    """One element type: its safetensors code, its torch name, its bits, and its kind."""

    code: str
    torch_name: str
    bits: int
    kind: str  # float (can be merged) | integer (copied) | packed (fp8 and smaller: refused)

    @property
    def torch(self) -> Any:
        """The torch.dtype."""
        return getattr(torch, self.torch_name)


DTYPES: Mapping[str, Dtype] = {
    code: Dtype(code, name, bits, kind)
    for code, name, bits, kind in (
        ("F64", "float64", 64, "float"),
        ("F32", "float32", 32, "float"),
        ("F16", "float16", 16, "float"),
        ("BF16", "bfloat16", 16, "float"),
        ("C64", "complex64", 64, "integer"),
        ("I64", "int64", 64, "integer"),
        ("U64", "uint64", 64, "integer"),
        ("I32", "int32", 32, "integer"),
        ("U32", "uint32", 32, "integer"),
        ("I16", "int16", 16, "integer"),
        ("U16", "uint16", 16, "integer"),
        ("I8", "int8", 8, "integer"),
        ("U8", "uint8", 8, "integer"),
        ("BOOL", "bool", 8, "integer"),
        ("F8_E4M3", "float8_e4m3fn", 8, "packed"),
        ("F8_E5M2", "float8_e5m2", 8, "packed"),
        ("F8_E8M0", "float8_e8m0fnu", 8, "packed"),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz", 8, "packed"),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz", 8, "packed"),
        ("F6_E2M3", "uint8", 6, "packed"),
        ("F6_E3M2", "uint8", 6, "packed"),
        ("F4", "float4_e2m1fn_x2", 4, "packed"),
    )
}


def dtype_named(torch_name: str) -> Dtype:
    """The table's row for a torch name such as `bfloat16`."""
    return next(d for d in DTYPES.values() if d.torch_name == torch_name)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values: name, safetensors dtype code, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def numel(self) -> int:
        """The number of elements (1 for a 0-d tensor)."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes an element; for types below a byte see `nbytes`."""
        return DTYPES[self.dtype].bits // 8

    @cached_property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * DTYPES[self.dtype].bits // 8

    @property
    def kind(self) -> str:
        """float | integer | packed."""
        return DTYPES[self.dtype].kind


class TensorHandle(Protocol):
    """One tensor opened for reading by one thread."""

    def read(self, start: int, stop: int, out: memoryview) -> None:
        """Fills `out` with elements start..stop (flat, row-major) in the tensor's own dtype."""
        ...

    def advise(self, start: int, stop: int) -> None:
        """Says that these elements will be read soon; may do nothing."""
        ...

    def close(self) -> None:
        """Gives back the file and the memory."""
        ...


class TensorReader(Protocol):
    """A checkpoint as the engine sees it: specs by name, and handles to read from.

    Everything that happens before a merge (an adapter, an alignment, a nested recipe) is another
    TensorReader over this one.
    """

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, in file order."""
        ...

    def open(self, name: str) -> TensorHandle:
        """A handle on one tensor."""
        ...
