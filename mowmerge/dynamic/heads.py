"""The heads of all tasks in the place of the base's one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from .context import Context
from .format import Head


class Heads(nn.Module):
    """Each sample's logits from its own task's head, padded with -inf to the widest."""

    def __init__(self, heads: nn.ModuleList, context: Context) -> None:
        super().__init__()
        self._heads, self.context = (heads,), context  # registered once, as mow_heads

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """[B,...,d] -> [B,...,widest]."""
        logits = [head(x, *args) for head in self._heads[0]]
        widest = max(one.shape[-1] for one in logits)
        padded = [
            nn.functional.pad(one, (0, widest - one.shape[-1]), value=float("-inf"))
            for one in logits
        ]
        chosen = self.context.choice(len(logits)).to(x.device)
        return torch.stack(padded, 1)[torch.arange(len(x), device=x.device), chosen]


def made(base: Any, head: Head) -> tuple[str, nn.Module]:
    """The name of a class's head and one like it for a task, on the device where modules are
    being made.

    Raises:
        ValueError: a class that has no head, or several.
    """
    with torch.device("meta"):
        whole = base(AutoConfig.for_model(**head.config))
    inside = whole.base_model_prefix
    names = [
        n for n, m in whole.named_children() if n != inside and any(True for _ in m.parameters())
    ]
    if len(names) != 1:
        raise ValueError(f"{base.__name__} has no single head: {', '.join(names)}")
    return names[0], getattr(whole, names[0]).to_empty(device=torch.empty(0).device)


def width(head: Head) -> int:
    """How many labels a head's config names."""
    return int(AutoConfig.for_model(**head.config).num_labels)
