"""A dynamic checkpoint read back: its tensors, its manifest, and what its codes stand for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from zoo import Tensors, load

from mowmerge.dynamic import codecs
from mowmerge.dynamic.format import Code, Manifest


@dataclass(frozen=True)
class Made:
    """A dynamic checkpoint's tensors, and what its manifest says of them."""

    tensors: Tensors
    manifest: Manifest

    @property
    def codes(self) -> dict[str, Code]:
        """Every code by the name of its tensor."""
        return {code.name: code for code in self.manifest.codes}

    def parts(self, code: Code) -> dict[str, Tensor]:
        """The stored parts of a code."""
        return {part: self.tensors[code.part_name(part)] for part in code.parts}

    def slots(self, name: str) -> list[Tensor]:
        """Every delta of a tensor, in fp64."""
        code, anchor = self.codes[name], self.tensors[name].double()
        return [codecs.slot(code, self.parts(code), s, anchor) for s in range(code.slots)]

    def expert(self, name: str, k: int) -> Tensor:
        """W_k as the code has it: the anchor with its offset taken off, and expert k's deltas."""
        code, deltas = self.codes[name], self.slots(name)
        each = code.slots // len(self.manifest.experts)
        offset = self.manifest.gates[code.gate].offset
        value = self.tensors[name].double() - offset * sum(deltas)
        return value + sum(deltas[k * each : (k + 1) * each])


def made(folder: Path) -> Made:
    """The checkpoint in a folder."""
    held = json.loads((folder / "config.json").read_text())["mowmerge"]
    return Made(load(folder), Manifest.from_json(held))
