"""A module's tensors and the codes beside them, and where one model holds them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .codecs import expanded, mixed, plain
from .context import Context
from .format import Code
from .names import part_in_memory

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


class Mixable(nn.Module):
    """A module with codes for some of its tensors. Holds the tensors it took over under their own
    names, and each part of a code as a buffer beside."""

    def __init__(self, inner: nn.Module, codes: Mapping[str, Code], context: Context) -> None:
        super().__init__()
        self.codes = {leaf: plain(code) for leaf, code in codes.items()}
        self.stored, self.context = dict(codes), context
        for leaf, value in inner._parameters.items():
            self.register_parameter(leaf, value)
        for leaf, code in codes.items():
            add_parts(self, leaf, code)

    def parts(self, leaf: str) -> Mapping[str, Tensor]:
        """The parts of a tensor's code as it is used."""
        code = self.stored[leaf]
        return expanded(code, parts_of(self, leaf, code))

    def mixed(self, leaf: str, x: Tensor) -> Tensor | None:
        """The tensor as each sample has it [B,*shape], or the anchor's own [*shape]."""
        value: Tensor | None = getattr(self, leaf)
        code = self.codes.get(leaf)
        mix = self.context.mix(code.gate, x) if code and value is not None else None
        if code is None or mix is None or value is None:
            return value
        code, parts, c = mix.only(code, self.parts(leaf))
        return mixed(code, parts, value, c)


def parts_of(module: nn.Module, leaf: str, code: Code) -> dict[str, Tensor]:
    """The stored parts of the code of one of a module's tensors."""
    return {name: getattr(module, part_in_memory(leaf, name)) for name in code.parts}


def add_parts(module: nn.Module, leaf: str, code: Code) -> None:
    """Buffers for a code's parts, on the device where modules are being made; what may be learned
    is a parameter."""
    for name, part in code.parts.items():
        blank = torch.zeros(part.shape, dtype=DTYPES[part.dtype])
        if name == "factor":
            learned = nn.Parameter(blank, requires_grad=False)
            module.register_parameter(part_in_memory(leaf, name), learned)
        else:
            module.register_buffer(part_in_memory(leaf, name), blank)
