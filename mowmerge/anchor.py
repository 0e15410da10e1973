"""The anchor of a dynamic tensor, from the static job that makes it, wherever it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from mowmerge import staging
from mowmerge.plan import TensorJob
from mowmerge.tensors import DTYPES, Tensor, torch

Give = Callable[[], memoryview]


class Anchor:
    """Any span of a merged tensor, as it is stored, from what gives its blocks; the last one is
    kept. A longer one is put together, so that the static job needs no more memory for it. What is
    made by rows is asked for in whole rows; what is made at once, all of it, once."""

    def __init__(self, give: Callable[[int, int], Give], job: TensorJob, block: int) -> None:
        self._give, self._block, self._numel = give, block, job.output.numel
        self._dtype, shape = DTYPES[job.output.dtype], job.output.shape
        row = self._numel // shape[0] if len(shape) > 1 else self._numel
        self._unit = row if job.scope == "row" else 1
        self._unit = self._numel if block >= self._numel else self._unit
        self._span, self._made = (0, 0), memoryview(b"")

    def data(self, start: int, stop: int) -> memoryview:
        """The bytes of elements start..stop, till others are asked for."""
        unit, size = self._unit, self._dtype.bits // 8
        first, last = start // unit * unit, min(-(-stop // unit) * unit, self._numel)
        if (first, last) != self._span:
            self._span, self._made = (first, last), self._spanning(first, last)
        return self._made[(start - first) * size : (stop - first) * size]

    def of(self, data: memoryview, like: Tensor) -> Tensor:
        """The values [B] of these bytes, in another tensor's dtype and where that lies."""
        return self._stored(data).to(like)

    def beside(self, values: Tensor, start: int) -> Tensor:
        """The values [B] that lie beside those of models [N,B] from element `start` on."""
        return self.of(self.data(start, start + values.shape[1]), values)

    def _spanning(self, start: int, stop: int) -> memoryview:
        if stop - start <= self._block:
            return self._give(start, stop)()
        out = torch.empty(stop - start, dtype=self._dtype.torch)
        for first in range(start, stop, self._block):
            last = min(first + self._block, stop)
            out[first - start : last - start] = self._stored(self._give(first, last)())
        return staging.data(out)

    def _stored(self, data: memoryview) -> Tensor:
        return torch.frombuffer(data, dtype=self._dtype.torch)
