"""Linear layers with weights that differ from sample to sample, forwards and backwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .codecs import bands, inner, lead, mixed, slot, stacked
from .context import Context, Mix
from .format import Code
from .mixable import Mixable
from .routers import keep_top, projections

BUDGET = 16 << 20  # bytes of mixed weights at a time: a band that stays in the caches
SAMPLES = 32  # mixed at a time: more would leave each too few rows for a fast GEMM


class MixedLinear(Mixable):
    """y_b = x_b W_b^T + b_b. `transposed` says that the weight is stored [in,out] (Conv1D)."""

    def __init__(
        self, inner: nn.Module, codes: Mapping[str, Code], context: Context, owner: Any = None
    ) -> None:
        super().__init__(inner, codes, context)
        self.transposed = not isinstance(inner, nn.Linear)
        self.weight: Tensor
        self.bias: Tensor | None = getattr(inner, "bias", None)
        out, into = self.weight.shape[::-1] if self.transposed else self.weight.shape
        self.in_features, self.out_features = int(into), int(out)
        self._owner = (owner if owner is not None else self,)  # whose codes the weight has

    def forward(self, x: Tensor) -> Tensor:
        """[B,...,in] -> [B,...,out]."""
        code, context = self._owner[0].codes.get("weight"), self.context
        lead = code or self.codes.get("bias")
        if lead is None or not context.mixing():
            return self._plain(x, self.bias)
        tokens = context.samples(x)
        if code is not None and context.gates[code.gate].scope == "module":
            return self._by_token(tokens, code).reshape(*x.shape[:-1], self.out_features)
        mix = context.mix(code.gate, tokens) if code else None
        bias = self.mixed("bias", tokens)
        own = None if bias is self.bias else bias  # [B,out], to be added sample by sample
        static = self.bias if own is None else None
        if code is None or mix is None:
            y = self._plain(tokens, static)
        elif code.codec == "low_rank":
            y = self._factored(self._plain(tokens, static), tokens, code, mix.c)
        else:
            y = self._held(code).times(tokens, mix)
            y = y if static is None else y.add_(static)
        if own is not None:
            y = y + own.unsqueeze(1).to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight.T if self.transposed else self.weight
        return nn.functional.linear(x, weight, bias)

    def _held(self, code: Code) -> Held:
        parts = self._owner[0].parts("weight")
        return Held(self.weight, code, parts, self.transposed, self.context)

    def _factored(self, y: Tensor, x: Tensor, code: Code, c: Tensor) -> Tensor:
        """y + ((x V^T) * c[slot]) U^T: one pair of GEMMs for all samples. c is [B,S] or [B,T,S]."""
        parts = self._owner[0].parts("weight")
        into, out = (parts["u"].T, parts["v"]) if self.transposed else (parts["v"], parts["u"].T)
        each = c.to(x.device).index_select(-1, parts["slot"].long())
        each = each.unsqueeze(1) if each.dim() == 2 else each
        inside = nn.functional.linear(x, into.to(x.dtype))
        scaled = (inside * each.to(inside.dtype)).flatten(0, 1)
        flat, out = y.flatten(0, 1), out.to(y.dtype)
        if torch.is_grad_enabled():
            return torch.addmm(flat, scaled, out).view_as(y)
        return flat.addmm_(scaled, out).view_as(y)

    def _by_token(self, x: Tensor, code: Code) -> Tensor:
        """Each token mixed by its own projection on the slots' gates."""
        y = self._plain(x, self.bias)
        c = self._scores(x, code)
        if code.codec == "low_rank":
            y = self._factored(y, x, code, c)
        else:
            for s in range(code.slots):
                chosen = c[..., s] != 0
                if not chosen.any():
                    continue
                delta = slot(code, self._owner[0].parts("weight"), s, self.weight)
                z = nn.functional.linear(x[chosen], delta.T if self.transposed else delta)
                y = y.index_put((chosen,), c[..., s][chosen].unsqueeze(-1) * z, accumulate=True)
        if "bias" in self.codes and self.bias is not None:
            one, parts = self.codes["bias"], self.parts("bias")
            deltas = [slot(one, parts, s, self.bias) for s in range(one.slots)]
            y = y + c @ torch.stack(deltas).to(c.dtype)
        return y

    def _scores(self, x: Tensor, code: Code) -> Tensor:
        """Each token's coefficients [B,T,S], in x's dtype: forced, or by projection, top-k."""
        if self.context.forced is not None:
            forced = self.context.forced.to(x).repeat_interleave(
                code.slots // self.context.forced.shape[1], 1
            )
            return forced.unsqueeze(1).expand(-1, x.shape[1], -1)
        parts = self._owner[0].parts("weight")
        router = self.context.routers[self.context.gates[code.gate].router]
        score = projections(x, parts["gate"], code.slots) / router.temperature
        return keep_top(score.softmax(-1), router.router.top_k or code.slots).to(x.dtype)


@dataclass(frozen=True)
class Held:
    """A weight with its code: what samples multiply. Rows are outputs, or inputs if transposed."""

    anchor: Tensor
    code: Code
    parts: Mapping[str, Tensor]
    transposed: bool
    context: Context

    @property
    def out_features(self) -> int:
        """Of a product."""
        return self.code.matrix[1 if self.transposed else 0]

    def times(self, x: Tensor, mix: Mix) -> Tensor:
        """x_b W_b^T [B,T,out]: once for samples that share it, else some samples at a time."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        factor = self.parts.get("factor")
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (
            x, mix.c, factor)):  # fmt: skip
            held, c = self._only(mix)
            y: Tensor = MixedProduct.apply(x, c, held.parts.get("factor"), held)  # type: ignore[no-untyped-call]
            return y
        together = stacked(self.code, self.parts)
        with torch.autocast(kind, enabled=False):
            if x.shape[1] == 1 and together is not None and together.dtype == x.dtype:
                return self._by_output(x, mix.c, together)
            few = len(mix.groups) == 1 or 2 * len(mix.groups) <= len(mix.c)
            hot = all(slot is not None for _, _, slot in mix.groups)
            return self._grouped(x, mix) if few or hot else self._mixing(x, mix)

    def _by_output(self, x: Tensor, c: Tensor, together: Tensor) -> Tensor:
        """One token a sample: A x + sum_s c_s D_s x reads each code once for all samples."""
        used = c.any(0).nonzero().flatten().tolist()
        some = slice(used[0], used[-1] + 1)
        slots = together[some].view(-1, *self.code.matrix)
        own, each = c.to(x), x.transpose(0, 1)
        z = torch.matmul(each, slots if self.transposed else slots.transpose(1, 2))
        y = nn.functional.linear(x, self._as_linear(self.anchor))
        y = y * lead(self.code, own).unsqueeze(1)
        return y + torch.einsum("sbo,bs->bo", z, own[:, some]).unsqueeze(1)

    def _grouped(self, x: Tensor, mix: Mix) -> Tensor:
        """Each distinct row of coefficients once, for all the samples that have it."""
        y = x.new_empty(*x.shape[:2], self.out_features)
        for row, samples, hot in mix.groups:
            mine = x if samples is None else x[samples]
            if hot is not None and self.code.codec == "full_abs":
                weight = self.parts["abs"][hot].to(x.dtype)
                found = nn.functional.linear(mine, self._as_linear(weight))
            else:
                flat = mine.reshape(1, -1, mine.shape[-1])
                found = self._mixing(flat, row).view(*mine.shape[:2], -1)
            if samples is None:
                return found
            y[samples] = found
        return y

    def _mixing(self, x: Tensor, mix: Mix) -> Tensor:
        """`batched`, of the slots that are used."""
        held, c = self._only(mix)
        return held.batched(x, c)

    def _only(self, mix: Mix) -> tuple[Held, Tensor]:
        code, parts, c = mix.only(self.code, self.parts)
        return replace(self, code=code, parts=parts), c

    def _as_linear(self, weight: Tensor) -> Tensor:
        weight = weight.view(self.code.matrix)
        return weight.T if self.transposed else weight

    def batched(self, x: Tensor, c: Tensor) -> Tensor:
        """x_b W_b^T [B,T,out]: a band of rows of some samples' weights at a time, in reused
        memory."""
        y = x.new_zeros(*x.shape[:2], self.out_features)
        for band, some, weight, _ in self._bands(x, c):
            if self.transposed:
                y[some].baddbmm_(x[some, :, band], weight)
            elif band.stop - band.start == self.out_features:
                torch.bmm(x[some], weight.transpose(1, 2), out=y[some])
            else:
                y[some, :, band] = torch.bmm(x[some], weight.transpose(1, 2))
        return y

    def backward(self, x: Tensor, c: Tensor, g: Tensor, *, dc: bool) -> tuple[Tensor, Tensor]:
        """dL/dx [B,T,in], and dL/dc [B,S] if asked for, of `batched` for g = dL/dy."""
        dx, found = torch.zeros_like(x), torch.zeros_like(c)
        for band, some, weight, own in self._bands(x, c):
            if self.transposed:
                dx[some, :, band] = torch.bmm(g[some], weight.transpose(1, 2))
            else:
                dx[some].baddbmm_(g[some, :, band], weight)
            if dc:
                left, right = (x[some, :, band], g[some]) if self.transposed else (
                    g[some, :, band], x[some])  # fmt: skip
                dw = torch.bmm(left.transpose(1, 2), right, out=weight)
                found[some] += inner(own.code, own.parts, own.anchor, dw.to(own.anchor.dtype))
        return dx, found

    def _bands(self, x: Tensor, c: Tensor) -> Any:
        """Bands of rows, some samples, their mixed weights there [n,rows,columns] in x's dtype
        (the caller may overwrite them), and the weight held there."""
        anchor, columns = self.anchor, self.code.matrix[1]
        n, stack = min(len(c), SAMPLES), self.code.slots + 1
        height = max(BUDGET // ((n + stack) * columns * anchor.element_size()), 1)
        height = min(height - height % 16 or height, self.code.matrix[0])
        room = self.context.scratch((n + stack) * height * columns, anchor)
        for band, code, parts in bands(self.code, self.parts, height):
            size = (band.stop - band.start) * columns
            own = Held(anchor[band], code, parts, self.transposed, self.context)
            for first in range(0, len(c), n):
                some = slice(first, min(first + n, len(c)))
                out = room[: (some.stop - first) * size].view(-1, size)
                rest = room[n * height * columns :][: stack * size].view(stack, size)
                weight = mixed(code, parts, own.anchor, c[some], out, rest)
                yield band, some, weight.flatten(2).to(x.dtype), own


class MixedProduct(torch.autograd.Function):
    """x_b W_b^T that keeps no mixed weight: they are mixed again backwards, the coefficients'
    gradient is dc = <dL/dW_b, D_s>, and that of the scales' factors f, which D has in it,
    sum_b c_b dc_b / f. Anchor and codes get none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, factor: Tensor | None, held: Held) -> Tensor:
        """[B,T,in], [B,S], [S] or None -> [B,T,out]."""
        ctx.save_for_backward(x, c)
        ctx.held = held
        with torch.autocast(x.device.type, enabled=False):
            return held.batched(x, c.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, of c and of the factors."""
        x, c = ctx.saved_tensors
        wants_x, wants_c, wants_f = ctx.needs_input_grad[:3]
        with torch.autocast(x.device.type, enabled=False):
            dx, dc = ctx.held.backward(x, c, grads[0], dc=wants_c or wants_f)
        df = (c * dc).sum(0) / ctx.held.parts["factor"].detach() if wants_f else None
        return dx if wants_x else None, dc if wants_c else None, df, None
