"""Adapters applied as a model is read: base + scale * B A, a run of whole rows at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from threading import Lock
from typing import Any

from mowmerge.checkpoint.reader import StoredReader
from mowmerge.plan import RUN, Adapted, Patch, Source
from mowmerge.tensors import DTYPES, Tensor, TensorHandle, TensorReader, TensorSpec, torch

WIDE = 2 * RUN  # elements in a run of rows, one row at least: fixed, so that no block changes bytes


class AdaptedReader:
    """A model with its adapters on it; what no adapter touches is the model's own bytes.

    Per tensor W and adapter, in fp32 (fp64 where W is), rounded once to W's dtype (not at all
    where the plan asks for fp32):
    low rank    W + weight * scale * B A, transposed where W is stored [in, out]
    magnitude   m * V / |V| by output row, V = W0 + scale * B A, |V| without earlier adapters
    value       the adapter's own tensor; W + weight * (value - W) for another weight than 1
    rows        the same for the rows of single tokens
    """

    def __init__(self, model: TensorReader, adapted: Adapted) -> None:
        self._model, self._adapted = model, adapted
        self.adapters = [StoredReader(stored) for stored in adapted.adapters]
        self._norms: dict[tuple[str, int], Tensor] = {}
        self._lock = Lock()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The model's tensors, then those that only an adapter has."""
        return self._adapted.specs

    def open(self, name: str) -> TensorHandle:
        """A handle that adapts what is read from it."""
        patches = self._adapted.patches.get(name, ())
        model, below = self._model, name
        if name in self._adapted.added:
            whole = next(p for p in reversed(patches) if not p.rows)
            model, below = self.adapters[whole.adapter], whole.parts["value"]
            patches = tuple(patch for patch in patches if patch.rows)
        if not patches:
            return model.open(below)
        stored = model.specs[below].dtype
        return _AdaptedHandle(model.open(below), self.specs[name], stored, patches, self)

    def updates(self, name: str) -> list[tuple[Tensor, Tensor]] | None:
        """(B [E, out, r], A [E, r, in]) of each adapter on a tensor, which is one matrix (E is 1)
        or a stack, in fp32 with the scale in one of them; None where they do more than to add."""
        patches = self._adapted.patches.get(name, ())
        if any(patch.parts.keys() != {"a", "b"} for patch in patches):
            return None
        found = [_low_rank(self.adapters[p.adapter], p, torch.float32) for p in patches]
        return [(p.right.mT, p.left.mT) if p.across else (p.left, p.right) for p in found]

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """L [m, r] and R [r, n], in fp32, whose product the adapters add to a matrix as it is
        stored; None where they do more."""
        found = self._products(name)
        if not found:
            rows, columns = self.specs[name].shape
            empty = torch.zeros(rows, 0), torch.zeros(0, columns)
            return empty if found is not None else None
        return torch.cat([p.left[0] for p in found], 1), torch.cat([p.right[0] for p in found])

    def across(self, name: str) -> bool:
        """Whether a tensor is stored [in, out], as its adapters say."""
        return any(patch.across for patch in self._adapted.patches.get(name, ()))

    def _products(self, name: str) -> list[_LowRank] | None:
        """What the adapters add to a tensor; None where they do more than to add products."""
        patches = self._adapted.patches.get(name, ())
        if any(patch.parts.keys() != {"a", "b"} or patch.stack > 1 for patch in patches):
            return None
        return [_low_rank(self.adapters[p.adapter], p, torch.float32) for p in patches]

    def norms(self, handle: _AdaptedHandle, name: str, number: int) -> Tensor:
        """|V| by column of a tensor that is stored [in, out]: a pass over it, made once."""
        with self._lock:
            if (name, number) not in self._norms:
                self._norms[name, number] = handle.column_norms(number)
            return self._norms[name, number]


@dataclass(frozen=True)
class _LowRank:
    """Factors of one patch: left [E, m, r] with the scale in it, right [E, r, n], magnitude."""

    left: Tensor
    right: Tensor
    magnitude: Tensor | None
    weight: float
    across: bool


@dataclass(frozen=True)
class _Rows:
    """Rows of single tokens: their numbers [n], rising, and values [n, C]; the patch's weight."""

    numbers: Tensor
    values: Tensor
    weight: float


class _AdaptedHandle:
    """Adapts one run of rows at a time; keeps the last, since what is read next continues it."""

    def __init__(
        self, model: TensorHandle, spec: TensorSpec, stored: str, patches: Sequence[Patch],
        reader: AdaptedReader,
    ) -> None:  # fmt: skip
        self._spec, self._reader = spec, reader
        self._stack, self._rows, self._columns = matrices(spec, patches)
        self._step = min(self._rows, max(1, WIDE // max(1, self._columns)))
        self._dtype = DTYPES[spec.dtype].torch
        self._wide = torch.float64 if spec.dtype == "F64" else torch.float32
        length = self._step * self._columns
        self._raw = torch.empty(length, dtype=DTYPES[stored].torch)
        self._values = torch.empty(length, dtype=self._wide)
        self._first, self._last = 0, 0
        with ExitStack() as stack:
            self._model = stack.enter_context(closing(model))
            self._patches: list[_LowRank | _Rows | tuple[TensorHandle, TensorSpec, float]] = []
            for patch in patches:
                adapter = reader.adapters[patch.adapter]
                if patch.rows:
                    self._patches.append(_rows(adapter, patch, self._wide))
                elif "value" in patch.parts:
                    name = patch.parts["value"]
                    value = stack.enter_context(closing(adapter.open(name)))
                    self._patches.append((value, adapter.specs[name], patch.weight))
                else:
                    self._patches.append(_low_rank(adapter, patch, self._wide))
            self._closing = stack.pop_all()
        self._dora = any(isinstance(p, _LowRank) and p.magnitude is not None for p in self._patches)

    def read(self, start: int, stop: int, out: memoryview) -> None:
        size, at = self._spec.itemsize, start
        while at < stop:
            if not self._first <= at < self._last:
                self._adapt(at)
            end = min(stop, self._last)
            piece = out[(at - start) * size : (end - start) * size]
            value = self._values[at - self._first : end - self._first]
            torch.frombuffer(piece, dtype=self._dtype).copy_(value)
            at = end

    def advise(self, start: int, stop: int) -> None:
        self._model.advise(start, stop)

    def close(self) -> None:
        self._closing.close()

    def _run(self, at: int) -> tuple[int, int, int]:
        """The matrix and the rows of the run that holds element `at`."""
        matrix, inside = divmod(at // self._columns, self._rows)
        first = inside // self._step * self._step
        return matrix, first, min(first + self._step, self._rows)

    def _adapt(self, at: int) -> None:
        """Puts the adapted run that holds element `at` in place."""
        matrix, first, last = self._run(at)
        value = before = self._original(matrix, first, last)
        for number, patch in enumerate(self._patches):  # values come first
            if not isinstance(patch, _LowRank):
                self._replace(value, patch, matrix, first)
                continue
            if self._dora and before is value:
                before = value.clone()
            if patch.magnitude is None:
                value.addmm_(patch.left[matrix, first:last], patch.right[matrix])
            else:
                self._stretch(value, before, number, patch, first, last)
        self._first = (matrix * self._rows + first) * self._columns
        self._last = self._first + value.numel()

    def _original(self, matrix: int, first: int, last: int) -> Tensor:
        """The model's own rows in the wide dtype."""
        length = (last - first) * self._columns
        start = (matrix * self._rows + first) * self._columns
        raw = self._raw[:length]
        self._model.read(start, start + length, raw.view(torch.uint8).numpy().data)
        return self._values[:length].copy_(raw).view(-1, self._columns)

    def _replace(
        self, value: Tensor, patch: _Rows | tuple[TensorHandle, TensorSpec, float], matrix: int,
        first: int,
    ) -> None:  # fmt: skip
        if isinstance(patch, _Rows):
            inside = (patch.numbers >= first) & (patch.numbers < first + len(value))
            at, theirs = patch.numbers[inside] - first, patch.values[inside]
            moved = value[at] + patch.weight * (theirs - value[at])
            value[at] = theirs if patch.weight == 1 else moved
            return
        handle, spec, weight = patch
        start = (matrix * self._rows + first) * self._columns
        raw = torch.empty(value.numel(), dtype=DTYPES[spec.dtype].torch)
        handle.read(start, start + value.numel(), raw.view(torch.uint8).numpy().data)
        theirs = raw.to(self._wide).view_as(value)
        value.copy_(theirs if weight == 1 else value + weight * (theirs - value))

    def _stretch(
        self, value: Tensor, before: Tensor, number: int, patch: _LowRank, first: int, last: int
    ) -> None:
        """DoRA: m * (value + delta) / |before + delta|."""
        assert patch.magnitude is not None
        delta = patch.left[0, first:last] @ patch.right[0]
        if patch.across:
            ratio = patch.magnitude / self._reader.norms(self, self._spec.name, number)
        else:
            norm = torch.linalg.vector_norm(before + delta, dim=1, dtype=torch.float64)
            ratio = (patch.magnitude[first:last] / norm.to(self._wide)).unsqueeze(1)
        moved = (value + delta).mul_(ratio)
        value.copy_(moved if patch.weight == 1 else value + patch.weight * (moved - value))

    def column_norms(self, number: int) -> Tensor:
        """|W0 + delta| by column, W0 with values in place and no other delta on it."""
        patch, total = self._patches[number], torch.zeros(self._columns, dtype=torch.float64)
        assert isinstance(patch, _LowRank)
        for first in range(0, self._rows, self._step):
            last = min(first + self._step, self._rows)
            value = torch.empty((last - first) * self._columns, dtype=self._raw.dtype)
            at = first * self._columns
            self._model.read(at, at + len(value), value.view(torch.uint8).numpy().data)
            before = value.to(self._wide).view(-1, self._columns)
            for earlier in self._patches:
                if not isinstance(earlier, _LowRank):
                    self._replace(before, earlier, 0, first)
            total += (before + patch.left[0, first:last] @ patch.right[0]).double().square().sum(0)
        return total.sqrt().to(self._wide)


def _low_rank(stored: StoredReader, patch: Patch, wide: Any) -> _LowRank:
    """The factors of a patch, read whole."""
    a, b = (_whole(stored, patch.parts[part], wide) for part in ("a", "b"))
    a = a.flatten(1).view(patch.stack, -1, a[0].numel())
    b = b.flatten(1).view(len(b), -1, patch.stack).permute(2, 0, 1)
    left, right = (a.mT, b.mT) if patch.across else (b, a)
    magnitude = _whole(stored, patch.parts["m"], wide).view(-1) if "m" in patch.parts else None
    scale = patch.scale * (patch.weight if magnitude is None else 1.0)
    return _LowRank(
        (left * scale).contiguous(), right.contiguous(), magnitude, patch.weight, patch.across
    )


def _rows(stored: StoredReader, patch: Patch, wide: Any) -> _Rows:
    """The rows of a patch, read whole."""
    return _Rows(torch.tensor(patch.rows), _whole(stored, patch.parts["value"], wide), patch.weight)


def _whole(stored: StoredReader, name: str, wide: Any) -> Tensor:
    """A tensor of the adapter in the wide dtype."""
    spec = stored.specs[name]
    value = torch.empty(spec.numel, dtype=DTYPES[spec.dtype].torch)
    with closing(stored.open(name)) as handle:
        handle.read(0, spec.numel, value.view(torch.uint8).numpy().data)
    return value.to(wide).view(spec.shape)


def rank(adapted: Source, base: Source | None, name: str) -> int | None:
    """Of the product that a model adds to the base's matrix, 0 where it adds nothing; None where it
    is no such product, as far as headers say."""
    if adapted == base:
        return 0
    if not isinstance(adapted, Adapted) or adapted.model != base or name in adapted.added:
        return None
    patches = adapted.patches.get(name, ())
    if any(patch.parts.keys() != {"a", "b"} or patch.stack > 1 for patch in patches):
        return None
    return sum(adapted.adapters[p.adapter].specs[p.parts["a"]].shape[0] for p in patches)


def matrices(spec: TensorSpec, patches: Sequence[Patch]) -> tuple[int, int, int]:
    """The stack, rows and columns as which a tensor is adapted; a vector is a column."""
    stack = max(patch.stack for patch in patches)
    shape = spec.shape[1:] if stack > 1 else spec.shape
    return stack, shape[0] if shape else 1, math.prod(shape[1:])


def held_bytes(adapted: Source, name: str) -> int:
    """Bytes that an open handle on a tensor takes: the factors, and its run of rows; none where no
    adapter is on it."""
    patches = adapted.patches.get(name, ()) if isinstance(adapted, Adapted) else ()
    if isinstance(adapted, Adapted) and name in adapted.added:
        patches = tuple(patch for patch in patches if patch.rows)
    if not isinstance(adapted, Adapted) or not patches:
        return 0
    spec = adapted.specs[name]
    wide = 8 if spec.dtype == "F64" else 4
    _, rows, columns = matrices(spec, patches)
    run = columns * min(rows, max(1, WIDE // max(1, columns)))
    parts = [
        adapted.adapters[patch.adapter].specs[part].numel
        for patch in patches
        for key, part in patch.parts.items()
        if key != "value" or patch.rows
    ]
    temporary = 4 if any("m" in p.parts or "value" in p.parts for p in patches) else 0
    return run * (spec.itemsize + wide * (1 + temporary)) + sum(parts) * wide
