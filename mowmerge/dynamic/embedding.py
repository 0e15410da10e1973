"""Tables with other rows for other samples; only the rows asked for are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .codecs import rows, slot
from .context import Context
from .format import Code
from .mixable import Mixable


class MixedEmbedding(Mixable):
    """e_b[i] = A[i] + sum_s c_bs D_s[i]. `owner` has the codes, where the table is tied to one."""

    def __init__(
        self, inner: nn.Module, codes: Mapping[str, Code], context: Context, owner: Any = None
    ) -> None:
        super().__init__(inner, codes, context)
        self._owner = (owner if owner is not None else self,)
        self.weight: Tensor
        self.num_embeddings, self.embedding_dim = self.weight.shape
        self.scale = scale_of(inner)
        self.padding_idx = getattr(inner, "padding_idx", None)

    def forward(self, ids: Tensor) -> Tensor:
        """[B,...] -> [B,...,d]; ids that are the same for all samples may come with one row.

        Raises:
            ValueError: ids of another number of samples.
        """
        base, owner, batch = nn.functional.embedding(ids, self.weight), self._owner[0], 0
        table = owner.codes.get("weight")
        mix = self.context.mix(table.gate, base) if table else None
        if mix is not None:
            batch = self.context.batch
            shared = ids.dim() == 1 or (len(ids) == 1 and batch > 1)
            if not shared and len(ids) != batch:
                raise ValueError(f"a table was asked for {len(ids)} rows for {batch} samples")
            each = ids.reshape(1, -1).expand(batch, -1) if shared else ids.flatten(1)
            assert table is not None
            code, parts, c = mix.only(table, owner.parts("weight"))
            found: Tensor = MixedRows.apply(c, each, self.weight, code, parts)  # type: ignore[no-untyped-call]
            base = found.view(batch, *ids.shape[1 if ids.dim() > 1 else 0 :], found.shape[-1])
        return base if self.scale == 1 else base * torch.tensor(self.scale).to(base)


def scale_of(inner: nn.Module) -> float:
    """What a table multiplies its rows by: a number, as buffers have no values on meta."""
    held = getattr(inner, "scalar_embed_scale", getattr(inner, "embed_scale", 1.0))
    return float(held)


class MixedRows(torch.autograd.Function):
    """Rows of a mixed table, decoded again backwards; the coefficients' gradient is <g_b, D_s>."""

    @staticmethod
    def forward(
        ctx: Any, c: Tensor, ids: Tensor, anchor: Tensor, code: Code, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """[B,S], [B,T] -> [B,T,d]."""
        ctx.save_for_backward(c, ids)
        ctx.held = anchor, code, parts
        total = nn.functional.embedding(ids, anchor)
        own = c.to(total)
        for s, delta in enumerate(_deltas(ids, anchor, code, parts)):
            total += own[:, s].view(-1, 1, 1) * delta
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of c."""
        c, ids = ctx.saved_tensors
        each = [(grads[0] * delta).flatten(1).sum(1) for delta in _deltas(ids, *ctx.held)]
        return torch.stack(each, 1).to(c), None, None, None, None


def _deltas(ids: Tensor, anchor: Tensor, code: Code, parts: Mapping[str, Tensor]) -> Any:
    """Each slot's rows for these ids [B,T,d], one after another."""
    index, place = torch.unique(ids, return_inverse=True)
    some, own = rows(code, parts, index)
    for s in range(code.slots):
        yield slot(some, own, s, anchor[index])[place]
