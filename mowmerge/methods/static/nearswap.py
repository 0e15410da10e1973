"""NearSwap: move each weight of the base towards the other model's, by a fixed step at most."""

from __future__ import annotations

from mowmerge.methods.contracts import NonNegative
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


@merge_method(paper="mergekit, nearswap", models=1)
def nearswap(
    models: Tensor,
    base: Tensor,
    *,
    t: NonNegative = 1e-4,
    floor: NonNegative = 0.0,
) -> Tensor:
    """The base, each weight moved by at most t towards the model's, which it takes if it is nearer.

    out = base + clip(W - base, -t, t).

    Shapes: models [1,*S], base [*S] -> [*S].

    Args:
        t: the most that a weight moves.
        floor: a difference below it moves by the share t / floor of itself, if that is below 1.

    Source: mergekit's nearswap; the recipe of QuartetAnemoi-70B-t0.0001.
    Differs: mergekit's floor is 1e-6, which slows small differences where t is below it; by default
    there is none, as in the first recipe. A weight within t is the model's own, bit for bit.
    """
    (model,) = models
    step = model - base
    near = step.abs() <= t
    if t < floor:
        near, step = near.zero_(), step.mul_(t / floor)
    out: Tensor = torch.where(near, model, base + step.clamp_(-t, t))
    return out
