"""The modules with tensors that differ from sample to sample, and their places in a model.

`install` puts them in the place of a model's own modules. What they share in one forward pass, the
coefficients of each gate, is in the Context that the model renews at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .codecs import mixed
from .context import Context
from .embedding import MixedEmbedding
from .format import Code, Manifest
from .linear import Held, MixedLinear
from .mixable import Mixable, add_parts, parts_of


class MixedConv(Mixable):
    """A convolution with one kernel a sample: a product with the patches of the input, or all
    kernels at once as groups."""

    def __init__(self, inner: nn.Module, codes: Mapping[str, Code], context: Context) -> None:
        super().__init__(inner, codes, context)
        self.weight: Tensor
        self.bias: Tensor | None = getattr(inner, "bias", None)
        self._inner = (_emptied(inner),)  # no child: what it held is here now

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,*size] -> [B,out,*size]."""
        inner, weight = self._inner[0], self.weight
        code, bias = self.codes.get("weight"), self.mixed("bias", x)
        mix = self.context.mix(code.gate, x) if code else None
        dims = x.dim() - 2
        convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[dims]
        how = (inner.stride, inner.padding, inner.dilation)
        if mix is None or code is None:
            static = bias if bias is self.bias else None
            y: Tensor = convolve(x, weight, static, *how, inner.groups)
            bias = bias if static is None else None
        elif tuple(inner.kernel_size) == tuple(inner.stride) and not any(_padding(inner)):
            y = self._patches(x, Held(weight, code, self.parts("weight"), False, self.context))
        else:
            code, parts, c = mix.only(code, self.parts("weight"))
            each = mixed(code, parts, weight, c).flatten(0, 1)
            folded = x.flatten(0, 1).unsqueeze(0)
            y = convolve(folded, each, None, *how, inner.groups * len(x))
            y = y.view(len(x), -1, *y.shape[2:])
        return y if bias is None else y + bias.view(-1, bias.shape[-1], *[1] * dims)

    def _patches(self, x: Tensor, held: Held) -> Tensor:
        """Patches that do not overlap, as tokens [B,T,in*size], times the kernels."""
        mix = self.context.mix(held.code.gate, x)
        assert mix is not None
        size, dims = self._inner[0].kernel_size, x.dim() - 2
        for axis, n in enumerate(size):
            x = x.unfold(axis + 2, n, n)
        counts = x.shape[2 : 2 + dims]
        order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
        tokens = x.permute(order).flatten(1 + dims).flatten(1, dims)
        y = held.times(tokens, mix).transpose(1, 2)
        return y.reshape(*y.shape[:2], *counts)


def _padding(inner: Any) -> tuple[Any, ...]:
    """What keeps a convolution from being a product with patches: padding, dilation, groups."""
    padding = inner.padding if isinstance(inner.padding, tuple) else (inner.padding != "valid",)
    return (*padding, *(d - 1 for d in inner.dilation), inner.groups - 1)


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
        y = low + y * _fitted(weight, y)
        return y if bias is None else y + _fitted(bias, y)


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
        code, parts, c = mix.only(self.code, parts_of(module, self.leaf, self.code))
        value = mixed(code, parts, anchor, c)
        shape = anchor.shape if anchor.dim() > 1 else (1, 1, *anchor.shape)
        module.__dict__[self.leaf] = value.view(len(mix.c), *shape[1:])

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """Takes it away again."""
        module.__dict__.pop(self.leaf, None)


def install(
    model: nn.Module, manifest: Manifest, context: Context, located: Callable[[str], str]
) -> None:
    """Puts mixing modules in the place of those whose tensors have codes.

    `located` gives a tensor's name in memory for its name on disk.

    Raises:
        ValueError: a tensor that no such module can mix, or not by such a gate.
    """
    by_module: dict[str, dict[str, Code]] = {}
    for code in manifest.codes:
        path, _, leaf = located(code.name).rpartition(".")
        held = model.get_submodule(path)._parameters.get(leaf)
        if held is None or tuple(held.shape) != code.shape:
            shape = "nothing" if held is None else list(held.shape)
            raise ValueError(f"'{code.name}' is coded as {list(code.shape)}; the model has {shape}")
        by_module.setdefault(path, {})[leaf] = code
    for path, codes in by_module.items():
        inner = model.get_submodule(path)
        kind = _kind(inner, codes, path)
        for leaf, code in codes.items():
            scope = manifest.gates[code.gate].scope
            _check(inner, leaf, code, kind, scope)
            if scope == "module" and not ("weight" in codes and codes["weight"].gate_rank):
                raise ValueError(
                    f"'{code.name}' has no gate of its matrix to choose for each token"
                )
            if kind is None:
                MixedParameter(inner, leaf, code, context)
        if kind is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, kind(inner, codes, context))


def _check(inner: nn.Module, leaf: str, code: Code, kind: Any, scope: str) -> None:
    """Refuses what would not be mixed, or only wrongly."""
    named = f"'{code.name}' cannot differ from sample to sample"
    bare = code.shape[:1] == (1,) or len(code.shape) == 1
    if kind is None and (not bare or leaf in ("weight", "bias")):
        raise ValueError(f"{named}: no layer could mix a tensor of {type(inner).__name__}")
    if scope == "module" and kind is not MixedLinear:
        raise ValueError(f"{named}: only linear layers choose token by token")
    if scope == "block" and kind in (None, MixedEmbedding, MixedConv):
        raise ValueError(f"{named} by the tokens of its block: it has none before it")


def _kind(inner: nn.Module, codes: Mapping[str, Code], path: str) -> Any:
    """The class that mixes such a module, None where its tensors are bare."""
    weight = inner._parameters.get("weight")
    if weight is None or set(codes) - {"weight", "bias"}:
        return None
    if isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D":
        return MixedLinear
    if isinstance(inner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return MixedConv if inner.padding_mode == "zeros" else None
    if isinstance(inner, nn.Embedding):
        known = type(inner) is nn.Embedding or hasattr(inner, "embed_scale")
        return MixedEmbedding if known and "attention_bias" not in path else None
    channels = isinstance(inner, nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
    return MixedNorm if weight.dim() == 1 and not channels else None
