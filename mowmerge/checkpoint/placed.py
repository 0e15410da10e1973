"""Vocabulary rows placed as a model is read: row i of the output's tokens, from whoever has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from mowmerge.checkpoint import adapter
from mowmerge.placement import MEAN, NONE, Placed, Rows
from mowmerge.plan import RUN, Source, unplaced
from mowmerge.tensors import DTYPES, Tensor, TensorHandle, TensorReader, TensorSpec, torch

if TYPE_CHECKING:
    from numpy import int32
    from numpy.typing import NDArray

WIDE = 2 * RUN  # elements in the rows that are placed at a time, one row at least


class PlacedReader:
    """A model whose vocabulary rows stand where the output has them; the rest is its own bytes.

    A row from one place is that row, rounded to the tensor's dtype; several are averaged in fp32
    (fp64 where any is), and rounded once.
    """

    def __init__(self, lenders: Sequence[TensorReader], placed: Placed) -> None:
        """`lenders` are readers of `placed.lenders`; the first is the model's own."""
        self._lenders, self._placed = lenders, placed

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The model's tensors, those with a row for each token as tall as the output's."""
        return self._placed.specs

    def open(self, name: str) -> TensorHandle:
        """A handle that places what is read from it."""
        rows = self._placed.rows.get(name)
        return _PlacedHandle(self._lenders, rows) if rows else self._lenders[0].open(name)


class _PlacedHandle:
    """Places some rows at a time; keeps the last, since what is read next continues them."""

    def __init__(self, lenders: Sequence[TensorReader], rows: Rows) -> None:
        self._rows, self._columns = rows, rows.columns
        self._specs = [lenders[number].specs[name] for number, name in rows.inputs]
        self._dtype = DTYPES[rows.spec.dtype].torch
        wide = "F64" in (rows.spec.dtype, *(spec.dtype for spec in self._specs))
        self._wide = torch.float64 if wide else torch.float32
        self._step = step(rows)
        self._first, self._data = 0, memoryview(b"")
        self._average: Tensor | None = None
        with ExitStack() as stack:
            self._handles = [
                stack.enter_context(closing(lenders[number].open(name)))
                for number, name in rows.inputs
            ]
            self._closing = stack.pop_all()

    def read(self, start: int, stop: int, out: memoryview) -> None:
        if (shift := self._shift(start, stop)) is not None:
            self._handles[0].read(start + shift, stop + shift, out)
            return
        size = self._rows.spec.itemsize
        at, end, length = start * size, stop * size, self._columns * size
        while at < end:
            if not self._first <= at < self._first + len(self._data):
                first = at // length // self._step * self._step
                last = min(first + self._step, len(self._rows.index[0]))
                value = self._made(first, last).contiguous()
                self._first = first * length
                self._data = value.view(-1).view(torch.uint8).numpy().data
            piece = self._data[at - self._first : end - self._first]
            out[at - start * size : at - start * size + len(piece)] = piece
            at += len(piece)

    def advise(self, start: int, stop: int) -> None:
        if (shift := self._shift(start, stop)) is not None:
            self._handles[0].advise(start + shift, stop + shift)

    def close(self) -> None:
        self._closing.close()

    def _shift(self, start: int, stop: int) -> int | None:
        """How far on these elements lie in the model's own tensor, where they do in one piece."""
        first, last = start // self._columns, -(-stop // self._columns)
        own, others = self._rows.index[0, first:last], self._rows.index[1:, first:last]
        whole = len(own) and own[0] >= 0 and bool((own[1:] - own[:-1] == 1).all())
        if not whole or self._specs[0].dtype != self._rows.spec.dtype or (others >= 0).any():
            return None
        return int(own[0] - first) * self._columns

    def _made(self, first: int, last: int) -> Tensor:
        """Rows first..last [R, C] in the tensor's dtype."""
        index = torch.from_numpy(self._rows.index[:, first:last])
        taken = index > NONE
        count = taken.sum(0)
        value = torch.zeros(last - first, self._columns, dtype=self._wide)
        for number, line in enumerate(taken):
            at = line.nonzero().view(-1)
            if not len(at):
                continue
            rows = self._gathered(number, self._rows.index[number, first:last][line.numpy()])
            alone = count[at] == 1  # copied, not added to zero: -0.0 stays what it is
            value[at[alone]] = rows[alone].to(self._wide)
            value.index_add_(0, at[~alone], rows[~alone].to(self._wide))
        shared = count > 1
        value[shared] /= count[shared].unsqueeze(1)
        lacking = index[0] == MEAN
        if bool(lacking.any()):
            value[lacking] = self._mean()
        return value.to(self._dtype)

    def _gathered(self, number: int, wanted: NDArray[int32]) -> Tensor:
        """Those rows of an input: by one call where they lie in a file, else those that are
        neighbours together, and none twice."""
        import numpy

        gather = getattr(self._handles[number], "gather", None)
        if gather:
            found = gather(wanted.astype(numpy.int64), self._columns)
            return torch.from_numpy(found).view(self._type(number))
        each, back = numpy.unique(wanted, return_inverse=True)
        value = torch.empty(len(each), self._columns, dtype=self._type(number))
        starts = numpy.flatnonzero(numpy.diff(each, prepend=NONE - 1) != 1)
        for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(each)], strict=True):
            self._fill(number, int(each[begin]), value[begin:end])
        return value[torch.from_numpy(back)]

    def _fill(self, number: int, row: int, value: Tensor) -> None:
        """Reads rows of an input from one on."""
        start = row * self._columns
        data = value.reshape(-1).view(torch.uint8).numpy().data
        self._handles[number].read(start, start + value.numel(), data)

    def _mean(self) -> Tensor:
        """The mean of all rows of the model's own tensor: a pass over it, made once."""
        if self._average is None:
            rows = self._specs[0].numel // self._columns
            total = torch.zeros(self._columns, dtype=torch.float64)
            for first in range(0, rows, self._step):
                count = min(self._step, rows - first)
                value = torch.empty(count, self._columns, dtype=self._type(0))
                self._fill(0, first, value)
                total += value.double().sum(0)
            self._average = (total / rows).to(self._wide)
        return self._average

    def _type(self, number: int) -> torch.dtype:
        kind: torch.dtype = DTYPES[self._specs[number].dtype].torch
        return kind


def step(rows: Rows) -> int:
    """Rows that are placed at a time."""
    return max(1, WIDE // max(1, rows.columns))


def held_bytes(source: Source, name: str) -> int:
    """Bytes that an open handle on a tensor takes; where it is placed the index, a run of rows as
    read, summed and given, and what the lenders' handles take."""
    rows = source.rows.get(name) if isinstance(source, Placed) else None
    if not isinstance(source, Placed) or rows is None:
        return adapter.held_bytes(unplaced(source), name)
    each = [held_bytes(source.lenders[number], tensor) for number, tensor in rows.inputs]
    run, wide = min(step(rows), len(rows.index[0])) * rows.columns, 8
    own = run * (4 * wide + rows.spec.itemsize) + 2 * wide * rows.columns
    return sum(each) + int(rows.index.nbytes) + own
