"""Descent on a tensor by a slope in closed form: no graph, and no optimiser object."""

from __future__ import annotations

from collections.abc import Callable

from mowmerge.tensors import Tensor, torch


def adam(
    slope: Callable[[Tensor], Tensor],
    like: Tensor,
    steps: int,
    rate: float,
    kept: Callable[[Tensor], Tensor] = lambda moved: moved,
) -> Tensor:
    """Where Adam comes from 0 in that many steps (betas 0.9 and 0.999, eps 1e-8).

    slope: the gradient at a point shaped as `like`. kept: what stays of a point after each step.
    """
    moved, first, second = (torch.zeros_like(like) for _ in range(3))
    for step in range(1, steps + 1):
        steep = slope(moved)
        first.mul_(0.9).add_(steep, alpha=0.1)
        second.mul_(0.999).addcmul_(steep, steep, value=0.001)
        spread = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        moved = kept(moved.addcdiv_(first, spread, value=-rate / (1 - 0.9**step)))
    return moved
