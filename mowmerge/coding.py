"""The parts of a code as bytes in their places, a block of whole rows after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
    anchor: memoryview | None,
    also: Mapping[str, Any],
) -> dict[str, Tensor]:
    """What a dynamic method makes of a block of whole rows: its code's parts, and the anchor, which
    is the one whose bytes are given where they are."""
    shape = (-1, *job.output.shape[1:]) if len(job.output.shape) > 1 else (-1,)
    given: dict[str, Any] = {**job.parameters, **also, "code": job.code}
    if base is not None:
        given["base"] = base.view(shape)
    if anchor is not None:
        stored = torch.frombuffer(anchor, dtype=DTYPES[job.output.dtype].torch)
        given["anchor"] = stored.to(values).view(shape)
    taken = {k: v for k, v in given.items() if k in spec.inputs or k in spec.parameters}
    parts: dict[str, Tensor] = spec.function(values.view(len(values), *shape), **taken)
    return parts if anchor is None else {**parts, "anchor": given["anchor"]}


class Parts:
    """One tensor's code while it is written; blocks come in order."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self._given = [0] * code.slots  # rows of each slot that earlier blocks had

    def pieces(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Iterator[Piece]:
        """What a method made of elements start..stop.

        Raises:
            CheckpointError: a value that its dtype cannot hold, or rows that were not counted.
        """
        if self.code.codec == "row_sparse":
            yield from self._rows(parts, start, stop)
        else:
            yield from self._slices(parts, start)

    def _slices(self, parts: Mapping[str, Tensor], start: int) -> Iterator[Piece]:
        """Each part, slot by slot; what has no rows comes whole with the first block."""
        code = self.code
        rows, columns = code.matrix
        for name, part in code.parts.items():
            if part.axis is None and start:
                continue
            value = self._stored(name, parts[name])
            axis = part.axis or 0
            wanted = (*part.shape[:axis], value.shape[axis], *part.shape[axis + 1 :]) if (
                part.axis is not None) else part.shape  # fmt: skip
            if tuple(value.shape) != tuple(wanted):
                raise ValueError(
                    f"part '{name}' of '{code.name}' is {tuple(value.shape)}, planned"
                    f" {tuple(wanted)}"
                )
            row = math.prod(part.shape[axis + 1 :]) * DTYPES[part.dtype].bits // 8
            for s, piece in enumerate(value if axis else [value]):
                at = 0 if part.axis is None else (s * rows + start // columns) * row
                yield from self._piece(name, at, piece)

    def _rows(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Iterator[Piece]:
        """The rows that a block changes, each slot's behind those of earlier blocks."""
        code = self.code
        index = parts["rowidx"] + start // code.matrix[1]
        values = self._stored("rowval", parts["rowval"])
        for s, (first, last) in enumerate(pairwise(parts["ptr"].tolist())):
            at = sum(code.each[:s]) + self._given[s]
            self._given[s] += last - first
            if self._given[s] > code.each[s]:
                raise self._recounted()
            for name, value in (("rowidx", index[first:last]), ("rowval", values[first:last])):
                yield from self._piece(name, at * value[:1].nbytes, value)
        if not start:
            yield from self._piece("ptr", 0, torch.tensor([0, *code.each]).cumsum(0))
        if stop == math.prod(code.shape) and self._given != list(code.each):
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
            f"the rows of '{self.code.name}' that differ from the base's are not those counted"
            " before",
            hint="an input was changed meanwhile: run it again",
        )
