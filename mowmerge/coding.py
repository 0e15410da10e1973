"""The parts of a code as bytes in their places, a block of whole rows after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mowmerge.dynamic.format import Code
from mowmerge.errors import CheckpointError
from mowmerge.methods.registry import MethodSpec
from mowmerge.plan import TensorJob
from mowmerge.tensors import DTYPES, Tensor, torch

Piece = tuple[str, int, memoryview]  # a tensor's name, the byte there from which on it lies, bytes


def made(
    job: TensorJob,
    spec: MethodSpec,
    base: Tensor | None,
    values: Tensor,
    anchor: Tensor | None,
    also: Mapping[str, Any],
) -> dict[str, Tensor]:
    """What a dynamic method makes of a block of whole rows: its code's parts, and the anchor, which
    is the one given where there is one."""
    shape = (-1, *job.output.shape[1:]) if len(job.output.shape) > 1 else (-1,)
    given: dict[str, Any] = {**job.parameters, **also, "code": job.code}
    for word, value in (("base", base), ("anchor", anchor)):
        if value is not None:
            given[word] = value.view(shape)
    taken = {k: v for k, v in given.items() if k in spec.inputs or k in spec.parameters}
    parts: dict[str, Tensor] = spec.function(values.view(len(values), *shape), **taken)
    return parts if anchor is None else {**parts, "anchor": given["anchor"]}


class Parts:
    """One tensor's code while it is written; blocks come in order."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self._given = [0] * code.slots  # of each slot, what earlier blocks had

    def pieces(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Iterator[Piece]:
        """What a method made of elements start..stop.

        Raises:
            CheckpointError: a value that its dtype cannot hold, or rows that were not counted.
        """
        ragged = [name for name, part in self.code.parts.items() if part.ragged]
        if ragged:
            yield from self._ragged(ragged, parts, start, stop)
        for name in self.code.parts:
            if name not in (*ragged, "ptr"):
                yield from self._slices(name, parts[name], start)

    def _slices(self, name: str, value: Tensor, start: int) -> Iterator[Piece]:
        """A part, slot by slot; what has no rows comes whole with the first block."""
        part = self.code.parts[name]
        if part.axis is None and start:
            return
        rows, columns = self.code.matrix
        value, axis = self._stored(name, value), part.axis or 0
        wanted = (*part.shape[:axis], value.shape[axis], *part.shape[axis + 1 :]) if (
            part.axis is not None) else part.shape  # fmt: skip
        if tuple(value.shape) != tuple(wanted):
            raise ValueError(
                f"part '{name}' of '{self.code.name}' is {tuple(value.shape)}, planned"
                f" {tuple(wanted)}"
            )
        row = math.prod(part.shape[axis + 1 :]) * DTYPES[part.dtype].bits // 8
        for s, piece in enumerate(value if axis else [value]):
            at = 0 if part.axis is None else (s * rows + start // columns) * row
            yield from self._piece(name, at, piece)

    def _ragged(
        self, names: Sequence[str], parts: Mapping[str, Tensor], start: int, stop: int
    ) -> Iterator[Piece]:
        """What a block has of the parts with some values a row, each slot's behind those of earlier
        blocks."""
        code = self.code
        each = code.each or (code.kept,) * code.slots
        values = {name: self._stored(name, parts[name]) for name in names}
        if "rowidx" in values:
            values["rowidx"] = values["rowidx"] + start // code.matrix[1]
        for s, (first, last) in enumerate(pairwise(parts["ptr"].tolist())):
            at = sum(each[:s]) + self._given[s]
            self._given[s] += last - first
            if self._given[s] > each[s]:
                raise self._recounted()
            for name, value in values.items():
                yield from self._piece(name, at * value[:1].nbytes, value[first:last])
        if not start:
            yield from self._piece("ptr", 0, torch.tensor([0, *each]).cumsum(0))
        if stop == math.prod(code.shape) and self._given != list(each):
            raise self._recounted()

    def _piece(self, name: str, at: int, value: Tensor) -> Iterator[Piece]:
        if value.numel():
            data = value.reshape(-1).view(torch.uint8).numpy().data
            yield self.code.part_name(name), at, data

    def _stored(self, name: str, value: Tensor) -> Tensor:
        """A part in the dtype that it is stored in."""
        part = self.code.parts[name]
        dtype = DTYPES[part.dtype]
        value = value.to(dtype.torch).contiguous().cpu()
        if dtype.kind == "float" and not value.sum(dtype=torch.float64).isfinite():
            raise CheckpointError(
                f"a delta of '{self.code.name}' overflows {part.dtype}",
                hint="set output.dtype to a wider type",
            )
        return value

    def _recounted(self) -> CheckpointError:
        return CheckpointError(
            f"'{self.code.name}' has not as many values to keep as were counted before",
            hint="an input was changed meanwhile: run it again",
        )
