"""A whole dynamic CLIP as two models: each tower mixes its weights by what it is given itself.

Pictures are mixed by their patches and prompts by their tokens, or both by the true task's expert.
Gates of scope sample have no part in this: their router reads one tower for both.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mowmerge.errors import CheckpointError


class Tower(nn.Module):
    """A tower of a dynamic CLIP with its projection; the whole model's other tower is asleep."""

    def __init__(self, whole: Any, tower: str, projection: str) -> None:
        super().__init__()
        self.whole, self._tower, self._projection = whole, tower, projection

    @property
    def config(self) -> Any:
        """The whole model's."""
        return self.whole.config

    @property
    def device(self) -> Any:
        """Where its inputs go."""
        return self.whole.device

    def forward(self, task_ids: Any = None, **inputs: Any) -> dict[str, Any]:
        """embeds [B,d], and gates [B,G] where there are routed ones."""
        whole = self.whole
        whole._set_gates((), inputs, None, task_ids, None)
        try:
            pooled = getattr(whole, self._tower)(**inputs).pooler_output
            found = {"embeds": getattr(whole, self._projection)(pooled)}
            routed = whole._manifest.routed
            return found | ({"gates": whole._context.every(routed)} if routed else {})
        finally:
            whole._context.active = False


def towers(whole: Any, where: str) -> tuple[Tower, Tower]:
    """The vision tower and the text tower.

    Raises:
        CheckpointError: a router that chooses for both towers at once.
    """
    if any(gate.scope == "sample" for gate in whole._manifest.gates.values()):
        raise CheckpointError(
            "a whole dynamic CLIP has one router for both towers, which sees no picture",
            where=where,
            hint="merge the vision tower alone, or by a method whose blocks choose, as wemoe",
        )
    vision = Tower(whole, "vision_model", "visual_projection")
    return vision, Tower(whole, "text_model", "text_projection")
