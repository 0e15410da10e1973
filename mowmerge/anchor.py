"""The anchor of a dynamic tensor, from the static job that makes it, wherever it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from mowmerge import staging
from mowmerge.tensors import DTYPES, Tensor, torch

Give = Callable[[], memoryview]


class Anchor:
    """Any span of a merged tensor, as it is stored in `dtype`: one that is longer than `block` is
    put together from blocks of that length, so that the static job needs no more memory for it."""

    def __init__(self, give: Callable[[int, int], Give], block: int, dtype: str) -> None:
        self._give, self._block, self._dtype = give, block, DTYPES[dtype]

    def data(self, start: int, stop: int) -> memoryview:
        """The bytes of elements start..stop, till the next are asked for."""
        if stop - start <= self._block:
            return self._give(start, stop)()
        out = torch.empty(stop - start, dtype=self._dtype.torch)
        for first in range(start, stop, self._block):
            last = min(first + self._block, stop)
            out[first - start : last - start] = self._stored(self._give(first, last)())
        return staging.data(out)

    def beside(self, values: Tensor, start: int) -> Tensor:
        """The values [B] that lie beside those of models [N,B] from element `start` on."""
        return self.of(self.data(start, start + values.shape[1]), values)

    def of(self, data: memoryview, like: Tensor) -> Tensor:
        """The values [B] of these bytes, in another tensor's dtype and where that lies."""
        return self._stored(data).to(like)

    def _stored(self, data: memoryview) -> Tensor:
        return torch.frombuffer(data, dtype=self._dtype.torch)
