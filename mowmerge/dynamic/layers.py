"""Modules with weights that differ from sample to sample: a module's tensors and the codes beside.

`install` puts them in the place of a model's own modules. What they share in one forward pass, the
coefficients of each gate, is in the Context that the model renews at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from . import codecs
from .format import Code, Gate, Manifest
from .routers import RouterModule, keep_top, projections

BUDGET = 32 << 20  # bytes of mixed weights at a time
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


@dataclass
class Mix:
    """One gate's coefficients, offsets taken off: c [B,S]; and which samples share them."""

    c: Tensor
    _shared: tuple[Tensor, Tensor] | None = None
    _idle: bool | None = None

    @property
    def idle(self) -> bool:
        """Whether every coefficient is at its offset, so that the anchor answers."""
        if self._idle is None:
            self._idle = not (self.c.requires_grad or bool(self.c.any()))
        return self._idle

    @property
    def shared(self) -> tuple[Tensor, Tensor]:
        """The distinct rows [U,S] and, for each sample, which of them is its own [B]."""
        if self._shared is None:
            self._shared = torch.unique(self.c, dim=0, return_inverse=True)
        return self._shared


@dataclass
class Context:
    """What a forward pass knows: each gate's coefficients, which tokens count, how many samples.

    active: whether weights are mixed at all; without that the anchor answers. forced: one expert's
    coefficients [B,S] for the gates of scope module. routers: shared with the model. heads: whose
    head answers for each sample [B], where that is known beforehand.
    """

    gates: Mapping[str, Gate]
    slots: Mapping[str, int]
    routers: Mapping[str, RouterModule] = field(default_factory=dict)
    active: bool = False
    batch: int = 0
    masks: Sequence[Tensor] = ()
    mixes: dict[str, Mix] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)
    forced: Tensor | None = None
    heads: Tensor | None = None
    chosen: Tensor | None = None
    _scratch: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def begin(self, batch: int, masks: Sequence[Tensor] = (), *, active: bool = True) -> None:
        """Forgets the last pass."""
        self.batch, self.masks, self.active = batch, masks, active
        self.mixes, self.raw = {}, {}
        self.forced = self.heads = self.chosen = None

    def set(self, gate: str, c: Tensor) -> None:
        """Fixes a gate's coefficients c [B,S] for this pass."""
        self.mixes[gate] = Mix(c.float() - self.gates[gate].offset)
        self.raw[gate] = c

    def mix(self, gate: str, x: Tensor) -> Mix | None:
        """The gate's coefficients, None where the anchor answers; those of scope block come from
        the first input that asks."""
        if not self.active:
            return None
        if gate not in self.mixes:
            asked = self.gates[gate]
            router = self.routers[asked.router]
            tokens = x.reshape(self.batch, -1, x.shape[-1]) if len(x) != self.batch else x
            valid = next((m for m in self.masks if m.shape == tokens.shape[:2]), None)
            raw = router(tokens, valid, asked.index)
            self.set(gate, router.coefficients(raw))
        return None if self.mixes[gate].idle else self.mixes[gate]

    def choice(self, n: int) -> Tensor:
        """The expert, of n, whose head answers for each sample [B]: the one with the most weight
        over all gates."""
        if self.heads is not None:
            self.chosen = self.heads
        elif self.forced is not None:
            self.chosen = self.forced.argmax(1)
        else:
            each = [c.view(len(c), n, -1).sum(2) for c in self.raw.values()]
            if not each:
                raise ValueError("no gate says whose head is meant: pass task_ids or gates")
            self.chosen = torch.stack(each).sum(0).argmax(1)
        return self.chosen

    def scratch(self, numel: int, like: Tensor) -> Tensor:
        """Reused memory of one layer's mixed weights, for passes without gradients."""
        key = (like.dtype, like.device)
        if key not in self._scratch or self._scratch[key].numel() < numel:
            self._scratch[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return self._scratch[key][:numel]

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        from copy import deepcopy

        copied = Context(self.gates, self.slots, deepcopy(self.routers, memo))
        memo[id(self)] = copied
        return copied


class Mixable(nn.Module):
    """A module with codes for some of its tensors. Holds the tensors it took over under their own
    names, and each part of a code as a buffer beside."""

    def __init__(self, inner: nn.Module, codes: Mapping[str, Code], context: Context) -> None:
        super().__init__()
        self.codes, self.context = dict(codes), context
        for leaf, value in inner._parameters.items():
            self.register_parameter(leaf, value)
        for leaf, code in codes.items():
            add_parts(self, leaf, code)

    def parts(self, leaf: str) -> dict[str, Tensor]:
        """The stored parts of a tensor's code."""
        code = self.codes[leaf]
        return {name: getattr(self, attribute(leaf, name)) for name in code.parts}

    def mixed(self, leaf: str, x: Tensor) -> Tensor | None:
        """The tensor as each sample has it [B,*shape], or the anchor's own [*shape]."""
        value: Tensor | None = getattr(self, leaf)
        code = self.codes.get(leaf)
        mix = self.context.mix(code.gate, x) if code and value is not None else None
        if code is None or mix is None or value is None:
            return value
        return codecs.mixed(code, self.parts(leaf), value, mix.c)


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
        if not context.active or lead is None:
            return self._plain(x, self.bias)
        if len(x) % context.batch:
            raise ValueError(
                f"a layer was given {len(x)} rows for {context.batch} samples: its weights cannot"
                " differ from sample to sample"
            )
        tokens = x.reshape(context.batch, -1, x.shape[-1])
        if context.gates[lead.gate].scope == "module":
            return self._by_token(tokens, code).reshape(*x.shape[:-1], self.out_features)
        mix = context.mix(lead.gate, x)
        if mix is None:
            return self._plain(x, self.bias)
        if code is None:
            y = self._plain(tokens, None)
        elif code.codec == "low_rank":
            y = self._plain(tokens, None) + self._factored(tokens, code, mix.c)
        else:
            y = self._whole(tokens, code, self._owner[0].parts("weight"), mix)
        bias = self.mixed("bias", x)
        if bias is not None:
            y = y + (bias.unsqueeze(1) if bias.dim() > 1 else bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight.T if self.transposed else self.weight
        return nn.functional.linear(x, weight, bias)

    def _factored(self, x: Tensor, code: Code, c: Tensor) -> Tensor:
        """((x V^T) * c[slot]) U^T: one pair of GEMMs for all samples. c is [B,S] or [B,T,S]."""
        parts = self._owner[0].parts("weight")
        into, out = (parts["u"].T, parts["v"].T) if self.transposed else (parts["v"], parts["u"])
        each = c.index_select(-1, parts["slot"].long()).to(x.dtype)
        inside = nn.functional.linear(x, into.to(x.dtype))
        inside = inside * (each.unsqueeze(1) if each.dim() == 2 else each)
        return nn.functional.linear(inside, out.to(x.dtype))

    def _whole(self, x: Tensor, code: Code, parts: Mapping[str, Tensor], mix: Mix) -> Tensor:
        """x_b W_b^T with W_b mixed: once for samples that share it, else in micro-batches."""
        if torch.is_autocast_enabled(x.device.type):  # weights are mixed in their own dtype
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and (x.requires_grad or mix.c.requires_grad):
            return MixedProduct.apply(x, mix.c, self.weight, code, parts, self.transposed)
        distinct, which = mix.shared
        if len(distinct) == len(mix.c) and len(mix.c) > 1:
            return _product(x, mix.c, self.weight, code, parts, self.transposed, self.context)
        y = x.new_empty(*x.shape[:2], self.out_features)
        for i in range(len(distinct)):
            mine = which == i if len(distinct) > 1 else slice(None)
            weight = codecs.mixed(code, parts, self.weight, distinct[i : i + 1])[0].to(x.dtype)
            y[mine] = nn.functional.linear(x[mine], weight.T if self.transposed else weight)
        return y

    def _by_token(self, x: Tensor, code: Code | None) -> Tensor:
        """Each token mixed by its own projection on the slots' gates: low-rank codes, and biases."""
        context, y = self.context, self._plain(x, self.bias)
        lead = code or self.codes["bias"]
        parts = self._owner[0].parts("weight") if code else self.parts("bias")
        if context.forced is not None:
            c = context.forced.to(x.dtype).unsqueeze(1).expand(-1, x.shape[1], -1)
        else:
            score = torch.softmax(projections(x, parts["gate"], lead.slots), -1)
            c = keep_top(score, context.routers[context.gates[lead.gate].router].router.top_k)
        if code is not None and code.codec == "low_rank":
            y = y + self._factored(x, code, c)
        elif code is not None:
            for s in range(code.slots):
                delta = codecs.slot(code, parts, s, self.weight)
                y = y + c[..., s, None].to(x.dtype) * nn.functional.linear(
                    x, delta.T if self.transposed else delta
                )
        if "bias" in self.codes and self.bias is not None:
            deltas = [
                codecs.slot(self.codes["bias"], self.parts("bias"), s, self.bias)
                for s in range(lead.slots)
            ]
            y = y + c.to(x.dtype) @ torch.stack(deltas).to(x.dtype)
        return y


def _product(
    x: Tensor, c: Tensor, anchor: Tensor, code: Code, parts: Mapping[str, Tensor],
    transposed: bool, context: Context | None = None,
) -> Tensor:  # fmt: skip
    """x_b W_b^T [B,T,out], the weights mixed a few samples at a time in reused memory."""
    out = anchor.shape[1] if transposed else anchor.shape[0]
    y, step = x.new_empty(*x.shape[:2], out), _samples(anchor)
    for start in range(0, len(x), step):
        some = slice(start, min(start + step, len(x)))
        n = some.stop - start
        room = context.scratch(n * anchor.numel(), anchor).view(n, -1) if context else None
        weight = codecs.mixed(code, parts, anchor, c[some], room).to(x.dtype)
        torch.bmm(x[some], weight if transposed else weight.transpose(1, 2), out=y[some])
    return y


def _samples(anchor: Tensor) -> int:
    """How many samples' weights fit the budget."""
    return max(1, BUDGET // (anchor.numel() * anchor.element_size()))


class MixedProduct(torch.autograd.Function):
    """x_b W_b^T that keeps no mixed weight: they are mixed again backwards, and the coefficients'
    gradient is <dL/dW_b, D_s>. Anchor and codes get none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, c: Tensor, anchor: Tensor, code: Code, parts: Mapping[str, Tensor],
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, c, anchor)
        ctx.code, ctx.parts, ctx.transposed = code, parts, transposed
        return _product(x, c, anchor, code, parts, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, c, anchor), g = ctx.saved_tensors, grads[0]
        code, parts, transposed = ctx.code, ctx.parts, ctx.transposed
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dc = torch.empty_like(c) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x), _samples(anchor)):
            some = slice(start, min(start + _samples(anchor), len(x)))
            if dx is not None:
                weight = codecs.mixed(code, parts, anchor, c[some]).to(g.dtype)
                dx[some] = torch.bmm(g[some], weight.transpose(1, 2) if transposed else weight)
            if dc is not None:
                pair = (x[some], g[some]) if transposed else (g[some], x[some])
                dw = torch.bmm(pair[0].transpose(1, 2), pair[1]).to(anchor.dtype)
                dc[some] = codecs.inner(code, parts, anchor, dw).to(c.dtype)
        return dx, dc, None, None, None, None


class MixedConv(Mixable):
    """A convolution with one kernel a sample: all of them at once, as groups."""

    def __init__(self, inner: nn.Module, codes: Mapping[str, Code], context: Context) -> None:
        super().__init__(inner, codes, context)
        self._inner = (_emptied(inner),)  # no child: what it held is here now

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,*size] -> [B,out,*size]."""
        inner = self._inner[0]
        weight, bias = self.mixed("weight", x), self.mixed("bias", x)
        assert weight is not None
        dims = x.dim() - 2
        convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[dims]
        how = (inner.stride, inner.padding, inner.dilation)
        if weight.dim() == dims + 2:
            y = convolve(x, weight, None, *how, inner.groups)
        else:
            folded = convolve(
                x.flatten(0, 1).unsqueeze(0), weight.flatten(0, 1), None, *how,
                inner.groups * len(x),
            )  # fmt: skip
            y = folded.view(len(x), -1, *folded.shape[2:])
        if bias is None:
            return y
        return y + bias.view(-1, bias.shape[-1], *[1] * dims)


class MixedEmbedding(Mixable):
    """A table with other rows for other samples; only the rows asked for are decoded."""

    def __init__(
        self, inner: nn.Module, codes: Mapping[str, Code], context: Context, owner: Any = None
    ) -> None:
        super().__init__(inner, codes, context)
        self._owner = (owner if owner is not None else self,)
        self.weight: Tensor
        self.num_embeddings, self.embedding_dim = self.weight.shape
        self.register_buffer("scale", getattr(inner, "embed_scale", None), persistent=False)
        self.padding_idx = getattr(inner, "padding_idx", None)

    def forward(self, ids: Tensor) -> Tensor:
        """[B,...] -> [B,...,d]; ids that are the same for all samples may come with one row."""
        base, owner = nn.functional.embedding(ids, self.weight), self._owner[0]
        table = owner.codes.get("weight")
        mix = self.context.mix(table.gate, base) if table else None
        if mix is not None:
            batch = self.context.batch
            shared = ids.dim() == 1 or len(ids) != batch
            each = ids.reshape(1, -1).expand(batch, -1) if shared else ids.flatten(1)
            index, place = each.unique(return_inverse=True)
            code, parts = codecs.rows(table, owner.parts("weight"), index)
            anchor, total = self.weight[index], self.weight[each]
            for s in range(code.slots):
                delta = codecs.slot(code, parts, s, anchor)[place]
                total = total + mix.c[:, s].to(delta.dtype).view(-1, 1, 1) * delta
            base = total.view(batch, *ids.shape[1 if ids.dim() > 1 else 0 :], total.shape[-1])
        return base if self.scale is None else base * self.scale.to(base.dtype)


class MixedNorm(Mixable):
    """Any normalisation that is affine in its vectors: z(0) + (z(1) - z(0)) w_b + b_b, with z(w)
    what the module itself gives for weight w and bias 0."""

    def __init__(self, inner: nn.Module, codes: Mapping[str, Code], context: Context) -> None:
        super().__init__(inner, codes, context)
        self._inner = (_emptied(inner),)  # no child: what it held is here now

    def forward(self, x: Tensor) -> Tensor:
        """[B,...,d] -> [B,...,d]."""
        given = {n: p for n, p in self._parameters.items() if p is not None}
        inner = self._inner[0]
        if all(self.context.mix(code.gate, x) is None for code in self.codes.values()):
            return _called(inner, given, x)
        zero = {n: torch.zeros_like(p) for n, p in given.items()}
        low = _called(inner, zero, x)
        y = _called(inner, {**zero, "weight": torch.ones_like(given["weight"])}, x) - low
        weight, bias = self.mixed("weight", x), self.mixed("bias", x) if "bias" in given else None
        assert weight is not None
        y = low + y * _fitted(weight, x)
        return y if bias is None else y + _fitted(bias, x)


def _fitted(vector: Tensor, x: Tensor) -> Tensor:
    """A vector [d], or one a sample [B,d], so shaped that it multiplies x [B,...,d]."""
    if vector.dim() == 1:
        return vector.to(x.dtype)
    if len(x) != len(vector):
        vector = vector.repeat_interleave(len(x) // len(vector), 0)
    return vector.to(x.dtype).view(len(x), *[1] * (x.dim() - 2), -1)


def _called(module: nn.Module, given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The module's output with these tensors for its own."""
    for name, value in given.items():
        module.__dict__[name] = value
    try:
        result: Tensor = module(x)
        return result
    finally:
        for name in given:
            del module.__dict__[name]


def _emptied(module: nn.Module) -> Any:
    """The module, emptied of the tensors that another one holds now."""
    module._parameters.clear()
    return module


class MixedParameter:
    """Forward hooks of a module that reads a bare tensor (a class token, position embeddings): it
    is given one a sample, [B,...] in place of [1,...] or [d]."""

    def __init__(self, module: nn.Module, leaf: str, code: Code, context: Context) -> None:
        self.leaf, self.code, self.context = leaf, code, context
        add_parts(module, leaf, code)
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after, always_call=True)

    def before(self, module: nn.Module, args: Any) -> None:
        """Puts the mixed tensor in front of the parameter."""
        anchor = module._parameters[self.leaf]
        assert anchor is not None
        mix = self.context.mix(self.code.gate, anchor)
        if mix is None:
            return
        parts = {n: getattr(module, attribute(self.leaf, n)) for n in self.code.parts}
        value = codecs.mixed(self.code, parts, anchor, mix.c)
        wide = anchor if anchor.dim() > 1 else anchor.unsqueeze(0)
        module.__dict__[self.leaf] = value.view(len(mix.c), *wide.shape[1:])
        if anchor.dim() == 1:
            module.__dict__[self.leaf] = value.unsqueeze(1)

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """Takes it away again."""
        module.__dict__.pop(self.leaf, None)


def attribute(leaf: str, part: str) -> str:
    """The buffer's name in its module: dyn_u beside weight, bias_dyn_u beside bias."""
    return f"dyn_{part}" if leaf == "weight" else f"{leaf}_dyn_{part}"


def add_parts(module: nn.Module, leaf: str, code: Code) -> None:
    """Buffers for a code's parts, on the device where modules are being made."""
    for name, part in code.parts.items():
        empty = torch.empty(part.shape, dtype=DTYPES[part.dtype])
        module.register_buffer(attribute(leaf, name), empty)


def install(
    model: nn.Module, manifest: Manifest, context: Context, located: Callable[[str], str]
) -> None:
    """Puts mixing modules in the place of those whose tensors have codes.

    `located` gives a tensor's name in memory for its name on disk.

    Raises:
        ValueError: a tensor that no such module can mix.
    """
    by_module: dict[str, dict[str, Code]] = {}
    for code in manifest.codes:
        path, _, leaf = located(code.name).rpartition(".")
        by_module.setdefault(path, {})[leaf] = code
    for path, codes in by_module.items():
        inner = model.get_submodule(path)
        kind = _kind(inner, codes)
        if kind is None:
            for leaf, code in codes.items():
                bare = code.shape[:1] == (1,) or len(code.shape) == 1
                if not bare or "weight" in inner._parameters:
                    raise ValueError(
                        f"'{code.name}' cannot differ from sample to sample: no layer that"
                        f" {type(inner).__name__} has could mix it"
                    )
                MixedParameter(inner, leaf, code, context)
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, kind(inner, codes, context))


def _kind(inner: nn.Module, codes: Mapping[str, Code]) -> Any:
    """The class that mixes such a module, None where its tensors are bare."""
    weight = inner._parameters.get("weight")
    if weight is None or set(codes) - {"weight", "bias"}:
        return None
    if isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D":
        return MixedLinear
    if isinstance(inner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return MixedConv
    if isinstance(inner, nn.Embedding) and (type(inner) is nn.Embedding or _scaled(inner)):
        return MixedEmbedding
    channels = isinstance(inner, nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
    return MixedNorm if weight.dim() == 1 and not channels else None


def _scaled(inner: nn.Module) -> bool:
    return isinstance(getattr(inner, "embed_scale", None), Tensor)


def scratch_bytes(manifest: Manifest) -> int:
    """Bytes of mixed weights that a pass without gradients holds at most at a time, in fp32."""
    largest = max((prod(code.shape) for code in manifest.codes), default=0) * 4
    return max(largest, BUDGET) if largest else 0
