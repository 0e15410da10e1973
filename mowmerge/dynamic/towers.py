"""Models with a tower for texts and one for pictures, such as CLIP: what each may see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

ALONE = ("get_text_features", "get_image_features")  # a tower of such a model by itself


def apart(base: Any) -> bool:
    """Whether the towers of a class answer each by itself."""
    return all(hasattr(base, name) for name in ALONE)


def of_pictures(model: nn.Module) -> tuple[str, ...]:
    """What the names of tensors begin with that see pictures in a model that reads texts too."""
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if name and getattr(module, "main_input_name", "") == "pixel_values"
    )


def check(base: Any, inputs: Mapping[str, Any], picture: int | None) -> None:
    """Raises ValueError where it is not told which pictures are a sample's; `picture` is the token
    that stands for a part of one in a model that reads them among the words of a text."""
    texts, pictures = inputs.get("input_ids"), inputs.get("pixel_values")
    if texts is None or pictures is None:
        return
    if apart(base) and len(texts) != len(pictures):
        raise ValueError(
            f"{len(texts)} texts and {len(pictures)} pictures: a sample of a dynamic model is one"
            f" of each; {' and '.join(ALONE)} take any number"
        )
    counts = (texts == picture).sum(1).tolist() if picture is not None else []
    if len(set(counts)) > 1:
        raise ValueError(
            "the samples of a batch have pictures of different numbers or sizes, of whose weights"
            " each sample has its own: give them one by one"
        )


def method(base: Any, name: str) -> Any:
    """One of ALONE as a pass of its own, where no pass is running."""

    def run(
        self: Any, *args: Any, gates: Tensor | None = None, task_ids: Tensor | None = None,
        **inputs: Any,
    ) -> Any:  # fmt: skip
        whole = getattr(base, name)
        if self._context.running:
            return whole(self, *args, **inputs)
        scopes = {gate.scope for gate in self._manifest.gates.values()}
        if "sample" in scopes and gates is None and task_ids is None:
            raise ValueError(f"{name} runs without the classifier: pass task_ids or gates")
        self._set_gates(args, inputs, gates, task_ids, None)
        try:
            return whole(self, *args, **inputs)
        finally:
            self._context.active = False

    return run


def methods(base: Any) -> dict[str, Any]:
    """ALONE, for a class that has them."""
    return {name: method(base, name) for name in ALONE} if apart(base) else {}
