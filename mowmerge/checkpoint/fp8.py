"""fp8 weights with scales, as published: which scale belongs to which weight, and the two joined.

W = fp8 * scale, in fp32, rounded once to the dtype that config.json names. A scale is one number,
one for each output row, or one for each block of rows and columns (128 by 128 where nothing is
said). The names are `weight_scale_inv` (DeepSeek, Qwen; to multiply by, in spite of its name) and
`weight_scale` (compressed-tensors, FBGEMM).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from mowmerge.plan import Location, Scale
from mowmerge.tensors import DTYPES, Tensor, TensorHandle, TensorSpec, dtype_named, torch

BLOCK = (128, 128)
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALE = re.compile(r"^(?P<weight>.*)_scale(?:_inv)?$")
_OF_INPUTS = re.compile(r"\.(?:input_scale|input_scale_ub|activation_scale)$")


def understood(settings: Mapping[str, Any]) -> bool:
    """Whether a quantization_config describes fp8 weights with scales and nothing else."""
    method = settings.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return True
    groups = settings.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, Mapping) or not groups:
        return False
    weights = [group.get("weights") or {} for group in groups.values() if isinstance(group, dict)]
    return all(w.get("type") == "float" and w.get("num_bits") == 8 for w in weights)


def paired(
    tensors: Mapping[str, Location], config: Mapping[str, Any]
) -> tuple[dict[str, Location], dict[str, Scale]]:
    """The tensors without those that are scales, and the scale of each fp8 weight that has one.

    Scales of activations are left out with their weights' scales: a de-quantised weight needs none.
    """
    found: dict[str, Scale] = {}
    settings = config.get("quantization_config") or {}
    block = settings.get("weight_block_size") or BLOCK
    named = config.get("dtype") or config.get("torch_dtype")
    wide = dtype_named(named).code if named in ("float32", "float16", "bfloat16") else "BF16"
    dropped = set()
    for name, location in tensors.items():
        match = _SCALE.match(name)
        weight = tensors.get(match["weight"]) if match else None
        if weight is None or weight.spec.dtype not in _FP8:
            continue
        fit = _blocks(weight.spec, location.spec, (int(block[0]), int(block[1])))
        if fit is not None:
            found[weight.spec.name] = Scale(location, fit, wide)
            dropped.add(name)
    if found:
        dropped |= {name for name in tensors if _OF_INPUTS.search(name)}
    return {n: location for n, location in tensors.items() if n not in dropped}, found


def _blocks(
    weight: TensorSpec, scale: TensorSpec, block: tuple[int, int]
) -> tuple[int, int] | None:
    """How many rows and columns share a number; None where the shapes do not go together."""
    if len(weight.shape) < 2 or not weight.numel or scale.dtype not in ("F32", "BF16", "F16"):
        return None
    *stack, rows, columns = weight.shape
    if scale.numel == 1:
        return math.prod(weight.shape[:-1]), columns
    if scale.numel == math.prod(stack) * rows and scale.shape[:1] == weight.shape[:1]:
        return 1, columns
    wanted = (*stack, -(-rows // block[0]), -(-columns // block[1]))
    if scale.shape == wanted:
        return block
    return None


def scaled(weight: TensorHandle, spec: TensorSpec, scale: Scale, numbers: TensorHandle) -> (
    TensorHandle
):  # fmt: skip
    """A handle on an fp8 weight times its scale; reads the scale's numbers and closes them."""
    with closing(numbers):
        raw = torch.empty(scale.location.spec.numel, dtype=DTYPES[scale.location.spec.dtype].torch)
        numbers.read(0, len(raw), raw.view(torch.uint8).numpy().data)
    return _ScaledHandle(weight, spec, scale, raw.float())


class _ScaledHandle:
    """Multiplies what is read; blocks may cut through rows."""

    def __init__(self, weight: TensorHandle, spec: TensorSpec, scale: Scale, table: Tensor) -> None:
        self._weight, self._scale = weight, scale
        self._rows, self._columns = spec.shape[-2:]
        self._fp8, self._wide = DTYPES[spec.dtype].torch, DTYPES[scale.dtype].torch
        down, across = scale.block
        self._one = table.numel() == 1
        self._down = -(-self._rows // down) if not self._one else 1
        self._across = -(-self._columns // across)
        self._table = table.reshape(-1, self._across)
        self._repeat = torch.arange(self._columns) // across

    def read(self, start: int, stop: int, out: memoryview) -> None:
        first, last = start // self._columns, -(-stop // self._columns)
        raw = torch.empty(stop - start, dtype=self._fp8)
        self._weight.read(start, stop, raw.view(torch.uint8).numpy().data)
        value = raw.float()
        if self._one:
            value.mul_(self._table.view(1))
        else:
            value.mul_(self._factors(first, last)[start - first * self._columns :][: len(value)])
        place = out[: (stop - start) * self._wide.itemsize]
        torch.frombuffer(place, dtype=self._wide).copy_(value)

    def _factors(self, first: int, last: int) -> Tensor:
        """The scale of every element of rows first..last, flat."""
        row = torch.arange(first, last)
        at = row // self._rows * self._down + row % self._rows // self._scale.block[0]
        return self._table.index_select(0, at).index_select(1, self._repeat).reshape(-1)

    def advise(self, start: int, stop: int) -> None:
        self._weight.advise(start, stop)

    def close(self) -> None:
        self._weight.close()
