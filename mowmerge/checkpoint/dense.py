"""A dynamic checkpoint with its gates fixed, as a TensorReader: one dense model, mixed as it is
read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from math import prod

from mowmerge.checkpoint.dynamic import DynamicCheckpoint
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.dynamic import codecs
from mowmerge.dynamic.codecs import EACH
from mowmerge.dynamic.format import Code
from mowmerge.tensors import DTYPES, Tensor, TensorHandle, TensorSpec, torch


class DenseReader:
    """A(c) = A + sum_s (c_s - o_s) D_s under the anchor's names, worked out in fp64 and rounded
    once. With full_abs and one slot at 1 it is that slot's own bytes.

    coefficients: of each gate, a number a slot.
    """

    def __init__(
        self, held: DynamicCheckpoint, coefficients: Mapping[str, Sequence[float]]
    ) -> None:
        self._held, self._stored = held, StoredReader(held.stored)
        self._codes = {code.name: code for code in held.manifest.codes}
        self._shares = {
            name: [c - held.manifest.gates[name].offset for c in given]
            for name, given in coefficients.items()
        }

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor of the anchor."""
        return {name: replace(spec, name=name) for name, spec in self._held.anchor.items()}

    def open(self, name: str) -> TensorHandle:
        """A handle that mixes what is read from it; an uncoded tensor is the anchor's."""
        code, spec = self._codes.get(name), self._held.specs[name]
        if code is None:
            return self._stored.open(spec.name)
        return _MixedHandle(self._stored, self._held.specs, code, self._shares[code.gate])


class _MixedHandle:
    """Mixes whole rows; keeps the last ones, since what is read next mostly continues them."""

    def __init__(
        self, stored: StoredReader, specs: Mapping[str, TensorSpec], code: Code,
        shares: Sequence[float],
    ) -> None:  # fmt: skip
        self.code, self._spec = code, specs[code.name]
        self._shares = {s: share for s, share in enumerate(shares) if share}
        self._specs = {part: specs[code.part_name(part)] for part in code.parts if part != "gate"}
        self._at, self._data = 0, memoryview(b"")
        self._whole: dict[str, Tensor] = {}
        self._filled: dict[int, tuple[int, int]] = {}
        with ExitStack() as stack:
            self._handles = {
                part: stack.enter_context(closing(stored.open(spec.name)))
                for part, spec in {"": self._spec, **self._specs}.items()
            }
            self._closing = stack.pop_all()

    def read(self, start: int, stop: int, out: memoryview) -> None:
        row, size = self.code.matrix[1] * self._spec.itemsize, self._spec.itemsize
        at, end = start * size, stop * size
        while at < end:
            if not self._at <= at < self._at + len(self._data):
                first, last = at // row, -(-end // row)
                value = self._rows(first, last).to(DTYPES[self._spec.dtype].torch).contiguous()
                self._at, self._data = first * row, value.view(-1).view(torch.uint8).numpy().data
            piece = self._data[at - self._at : end - self._at]
            out[at - start * size : at - start * size + len(piece)] = piece
            at += len(piece)

    def advise(self, start: int, stop: int) -> None:
        pass

    def close(self) -> None:
        self._closing.close()

    def _rows(self, first: int, last: int) -> Tensor:
        """Rows first..last of the mixed tensor, flat."""
        columns, absolute = self.code.matrix[1], self.code.codec == "full_abs"
        own = 1 - sum(self._shares.values()) if absolute else 1.0
        if absolute and list(self._shares.values()) == [1.0]:
            return self._part("abs", next(iter(self._shares)), first, last)[0]
        anchor = self._read("", first * columns, last * columns).double()
        total = anchor * own
        for s, share in self._shares.items():
            if absolute:
                delta = self._part("abs", s, first, last).double()
            else:
                code, parts = self._slot(s, first, last)
                delta = codecs.slot(code, parts, 0, anchor)
            total.add_(delta.reshape(-1), alpha=share)
        return total

    def _slot(self, s: int, first: int, last: int) -> tuple[Code, dict[str, Tensor]]:
        """Rows first..last of slot s alone, as a code of one slot."""
        whole = self.code
        shape = (last - first, *whole.shape[1:]) if len(whole.shape) > 1 else whole.shape
        code = replace(whole, slots=1, shape=shape, gate_rank=0)
        if whole.codec == "basis":
            held = {part: self._all(part) for part in self._specs}
            for part in ("left_mean", "left_basis", "left_share"):
                held[part] = held[part][first:last]
            whole = replace(whole, shape=shape)
            code, picked = codecs.pick(whole, held, [s])
            held = dict(picked)
        elif whole.codec == "low_rank":
            mine = self._all("slot") == s
            u = self._read("u", first * len(mine), last * len(mine)).view(-1, len(mine))
            held = {
                "u": u[:, mine],
                "v": self._all("v")[mine],
                "slot": torch.zeros(int(mine.sum())),
            }
        elif whole.codec == "sparse":
            held = self._sparse(s, first, last)
        elif whole.codec == "row_sparse":
            held = self._row_sparse(s, first, last)
        else:
            held = {part: self._part(part, s, first, last) for part in self._specs}
        return code, held

    def _sparse(self, s: int, first: int, last: int) -> dict[str, Tensor]:
        occ = self._part("occ", s, first, last)
        begin = int(self._all("ptr")[s]) + self._before(s, first)
        count = self._bits(occ)
        self._filled[s] = last, begin - int(self._all("ptr")[s]) + count
        value = self._read("val", begin, begin + count)
        return {"occ": occ, "val": value, "ptr": torch.tensor([0, count])}

    def _before(self, s: int, row: int) -> int:
        """How many values slot s has in the rows before this one."""
        known, count = self._filled.get(s, (0, 0))
        if known > row:
            known, count = 0, 0
        return count + (self._bits(self._part("occ", s, known, row)) if known < row else 0)

    def _bits(self, packed: Tensor) -> int:
        return int(codecs.unpack(packed, self.code.matrix[1]).sum())

    def _row_sparse(self, s: int, first: int, last: int) -> dict[str, Tensor]:
        start, stop = self._all("ptr")[s : s + 2].tolist()
        index, columns = self._all("rowidx")[start:stop], self.code.matrix[1]
        value = self._read("rowval", start * columns, stop * columns).view(-1, columns)
        mine = (index >= first) & (index < last)
        ptr = torch.tensor([0, int(mine.sum())])
        return {"rowidx": index[mine] - first, "rowval": value[mine], "ptr": ptr}

    def _part(self, part: str, s: int, first: int, last: int) -> Tensor:
        """Rows first..last of a part; of slot s, with a first axis of 1, where it has slots."""
        given, axis = self._specs[part].shape, self.code.parts[part].axis
        shape = given[1:] if part in EACH else given
        base = s * prod(shape) if part in EACH else 0
        if axis is not None:
            row = prod(shape[1:])
            base, shape = base + first * row, (last - first, *shape[1:])
        value = self._read(part, base, base + prod(shape))
        return value.view(1, *shape) if part in EACH else value.view(shape)

    def _all(self, part: str) -> Tensor:
        """A part that has no rows, whole; read once."""
        if part not in self._whole:
            spec = self._specs[part]
            self._whole[part] = self._read(part, 0, spec.numel).view(spec.shape)
        return self._whole[part]

    def _read(self, part: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of a part, of the anchor for ""."""
        dtype = DTYPES[(self._specs[part] if part else self._spec).dtype].torch
        value = torch.empty(stop - start, dtype=dtype)
        if len(value):
            self._handles[part].read(start, stop, value.view(torch.uint8).numpy().data)
        return value
