"""Tables with other rows for other samples; only the rows asked for are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .codecs import lead, rows, slot
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
    """Rows of a mixed table, decoded again backwards; the coefficients' gradient is <g_b, D_s>.

    With full_abs they are (1 - sum_s c_s) A + sum_s c_s W_s: a one-hot gate gives W_s's own.
    """

    @staticmethod
    def forward(
        ctx: Any, c: Tensor, ids: Tensor, anchor: Tensor, code: Code, parts: Mapping[str, Tensor]
    ) -> Tensor:
        """[B,S], [B,T] -> [B,T,d]."""
        ctx.save_for_backward(c, ids)
        ctx.held = anchor, code, parts
        own = c.to(torch.promote_types(anchor.dtype, torch.float32))
        total = lead(code, own).unsqueeze(1) * nn.functional.embedding(ids, anchor)
        for s, held in enumerate(_held(ids, anchor, code, parts)):
            total += own[:, s].view(-1, 1, 1) * held
        return total.to(anchor.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of c."""
        c, ids = ctx.saved_tensors
        anchor, code, _ = ctx.held
        each = [(grads[0] * held).flatten(1).sum(1) for held in _held(ids, *ctx.held)]
        found = torch.stack(each, 1)
        if code.codec == "full_abs":
            own = nn.functional.embedding(ids, anchor)
            found -= (grads[0] * own).flatten(1).sum(1, keepdim=True)
        return found.to(c), None, None, None, None


def _held(ids: Tensor, anchor: Tensor, code: Code, parts: Mapping[str, Tensor]) -> Any:
    """Each slot's rows for these ids [B,T,d], one after another: of D_s, with full_abs of W_s."""
    index, place = torch.unique(ids, return_inverse=True)
    some, own = rows(code, parts, index)
    base = anchor[index]
    for s in range(code.slots):
        found = own["abs"][s].to(base) if code.codec == "full_abs" else slot(some, own, s, base)
        yield found[place]
