"""fp8 weights with scales, as published: which scale belongs to which weight, and the two joined.

W = fp8 * scale, in fp32, rounded once to the dtype that config.json names. A scale is one number,
one for each output row, or one for each block of rows and columns (128 by 128 where nothing is
said). The names are `weight_scale_inv` (DeepSeek, Qwen; to multiply by, in spite of its name) and
`weight_scale` (compressed-tensors, FBGEMM).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from mowmerge.checkpoint import naming
from mowmerge.errors import CheckpointError
from mowmerge.plan import Location, Packing, Plan, Scale, Stored, config_source
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
    block = _said(settings.get("weight_block_size"))
    named = config.get("dtype") or config.get("torch_dtype")
    wide = dtype_named(named).code if named in ("float32", "float16", "bfloat16") else "BF16"
    dropped = set()
    for name, location in tensors.items():
        match = _SCALE.match(name)
        weight = tensors.get(match["weight"]) if match else None
        if weight is None or weight.spec.dtype not in _FP8:
            continue
        fit = _blocks(weight.spec, location.spec, block)
        if fit is not None:
            found[weight.spec.name] = Scale(location, fit, wide)
            dropped.add(name)
    if found:
        dropped |= {name for name in tensors if _OF_INPUTS.search(name)}
    return {n: location for n, location in tensors.items() if n not in dropped}, found


def _said(block: Any) -> tuple[int, int]:
    """A block of rows and columns as config.json says, where it says one."""
    match block:
        case [int(rows), int(columns)] if min(rows, columns) > 0:
            return rows, columns
    return BLOCK


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


def packings(
    specs: Mapping[str, TensorSpec], donor: Stored, config: Mapping[str, Any]
) -> dict[str, Packing]:
    """How each tensor that goes to fp8 is stored: as the donor has it where that is in fp8, or its
    like in another layer where layers are stacked beyond the donor's; else the matrices of
    attention and mlp in e4m3 with scales for blocks of 128 by 128.

    Raises:
        CheckpointError: the donor's activations have fixed scales, measured on it alone.
    """
    if donor.scales:
        scheme = (config.get("quantization_config") or {}).get("activation_scheme")
        if scheme == "static":
            raise CheckpointError(
                "its activations have fixed scales, which do not hold for a merge",
                where=donor.origin, hint="write bfloat16, and calibrate the result",
            )  # fmt: skip
        likes = {naming.kind(name): name for name in donor.scales}
        told = {n: n if n in donor.tensors else likes.get(naming.kind(n), "") for n in specs}
        return {
            name: _like(name, donor, like)
            for name, like in told.items()
            if like in donor.scales and donor.tensors[like].spec.shape == specs[name].shape
        }
    found = {}
    for name, spec in specs.items():
        matrix = len(spec.shape) == 2 and spec.kind == "float" and name.endswith(".weight")
        if matrix and naming.role(name) in ("attention", "mlp"):
            grid = tuple(-(-n // b) for n, b in zip(spec.shape, BLOCK, strict=True))
            weight, scale = (TensorSpec(name, "F8_E4M3", spec.shape),
                             TensorSpec(f"{name}_scale_inv", "F32", grid))  # fmt: skip
            found[name] = Packing(weight, scale, BLOCK)
    return found


def _like(name: str, donor: Stored, like: str) -> Packing:
    """A tensor stored as the donor stores one that may have another number."""
    scale = donor.scales[like]
    numbers = replace(scale.location.spec, name=name + scale.location.spec.name[len(like) :])
    return Packing(replace(donor.tensors[like].spec, name=name), numbers, scale.block)


def quantization_config(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says of the fp8 tensors that a plan writes; None without any. `config` is
    the donor's."""
    packed = plan.packings
    if not packed:
        return None
    own = config.get("quantization_config")
    if config_source(plan.sources[plan.donor]).scales and isinstance(own, dict):
        return dict(own)
    others = [
        name.removesuffix(".weight")
        for name, spec in plan.specs.items()
        if name not in packed and len(spec.shape) == 2 and name.endswith(".weight")
        and naming.role(name) != "embedding"
    ]  # fmt: skip
    return {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK), "modules_to_not_convert": others or ["lm_head"],
    }  # fmt: skip


class Packer:
    """One tensor on its way to fp8: rows wait until all that share a scale are there.

    scale = max |W| over the block / the largest fp8 number, rounded to the scale's dtype; 1 where
    the block is zero. W / scale is rounded to the nearest fp8 number.
    """

    def __init__(self, how: Packing) -> None:
        self._how, self._columns = how, how.weight.shape[-1]
        rows = math.prod(how.weight.shape[:-1])
        self._matrix = rows if how.scale.numel == 1 else how.weight.shape[-2]
        self._waiting: list[Tensor] = []
        self._row, self._scaled = 0, 0

    def packed(self, start: int, data: memoryview) -> Iterator[tuple[str, int, memoryview]]:
        """The pieces of weight and scale that fp32 bytes from `start` on complete."""
        if not start:
            self._waiting, self._row, self._scaled = [], 0, 0
        self._waiting.append(torch.frombuffer(data, dtype=torch.float32).clone())
        held = sum(len(piece) for piece in self._waiting)
        while held >= (length := self._group() * self._columns) > 0:
            flat = torch.cat(self._waiting)
            self._waiting, held = [flat[length:]], held - length
            yield from self._pack(flat[:length].view(-1, self._columns))

    def _group(self) -> int:
        """Rows that share the next scales; 0 after the last."""
        if self._row == math.prod(self._how.weight.shape[:-1]):
            return 0
        return min(self._how.block[0], self._matrix - self._row % self._matrix)

    def _pack(self, value: Tensor) -> Iterator[tuple[str, int, memoryview]]:
        weight, scale = self._how.weight, self._how.scale
        across = self._how.block[1]
        dtype, narrow = DTYPES[weight.dtype].torch, DTYPES[scale.dtype].torch
        most = torch.finfo(dtype).max
        padded = torch.nn.functional.pad(value, (0, -self._columns % across))
        blocks = padded.view(len(value), -1, across)
        numbers = blocks.abs().amax(dim=(0, 2)).div_(most).to(narrow).float()
        numbers[numbers == 0] = 1.0
        small = (blocks / numbers[:, None]).clamp_(-most, most).to(dtype)
        held = small.view(len(value), -1)[:, : self._columns].contiguous()
        kept = numbers.to(narrow)
        size = weight.itemsize
        yield weight.name, self._row * self._columns * size, _bytes(held)
        yield scale.name, self._scaled * scale.itemsize, _bytes(kept)
        self._row, self._scaled = self._row + len(value), self._scaled + len(kept)


def _bytes(value: Tensor) -> memoryview:
    data: memoryview = value.reshape(-1).view(torch.uint8).numpy().data
    return data
