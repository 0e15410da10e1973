"""WUDI: the merged task vector that interferes least with each, judged by their own row spaces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from mowmerge.methods.contracts import Count, NonNegative
from mowmerge.methods.ops import added
from mowmerge.methods.ops.descent import adam
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

NULL = 1e-10  # share of the largest eigenvalue below which a direction is none of the experts'


def _normal_equations(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """A = sum_i G_i, B = sum_i D_i G_i, with G_i = D_i' D_i / |D_i|^2: gradient 2(TA - B)."""
    left, right = deltas.new_zeros(deltas.shape[2], deltas.shape[2]), torch.zeros_like(deltas[0])
    for delta in deltas:
        energy = delta.double().square().sum()
        if energy > 0:
            product = (delta.T @ delta).div_(energy)
            left += product
            right += delta @ product
    return left, right


def _by_adam(start: Tensor, left: Tensor, right: Tensor, steps: int, rate: float) -> Tensor:
    def slope(moved: Tensor) -> Tensor:
        return ((start + moved) @ left).sub_(right).mul_(2.0)

    return start + adam(slope, start, steps, rate)


def _closed(left: Tensor, right: Tensor) -> Tensor:
    """B A^+: the stationary point without a part outside the experts' row spaces."""
    values, vectors = torch.linalg.eigh(left)
    used = values > NULL * values[-1].clamp(min=0.0)
    inverse = (1.0 / values.where(used, 1.0)).where(used, 0.0)
    found: Tensor = right @ (vectors * inverse) @ vectors.T
    return found


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """In fp64 the task vectors and both sides of the closed form, or Adam's moments; and products
    of k x k."""
    if len(shape) != 2:
        return 0
    held = 2 * n + 6 if p["solver"] == "closed" else 9
    return held * math.prod(shape) + 8 * shape[1] ** 2


@merge_method(
    paper="arXiv:2503.08099",
    scope="tensor",
    workspace=_workspace,
    decompositions=lambda shape, n: [],
    laws={"permutation": {"solver": "closed"}, "scale": {"solver": "closed"}},
)
def wudi(
    deltas: Tensor,
    *,
    solver: Literal["adam", "closed"] = "adam",
    steps: Count = 300,
    rate: NonNegative = 1e-5,
    rest: Literal["base", "mean"] = "base",
    vocabulary: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """For matrices the T of least interference sum_i |(T - D_i) D_i'|^2 / |D_i|^2, times scale.

    From T = sum_i D_i by Adam, or T = B A^+ with A = sum_i G_i, B = sum_i D_i G_i and
    G_i = D_i' D_i / |D_i|^2.

    Shapes: deltas [N,m,k] -> delta [m,k]; other tensors as rest says.

    Args:
        solver: Adam's steps from the sum, as published, or the minimum itself (closed): one
            eigendecomposition of a k x k matrix instead of `steps` products with one.
        steps: of Adam.
        rate: of Adam, absolute: an entry moves by about rate x steps at most, whatever the size of
            the task vectors.
        rest: what is not a matrix stays at the base, or takes the mean task vector.
        vocabulary: whether embeddings and output heads are matrices too.
        scale: factor on the result.

    Source: WUDI-Merging, arXiv:2503.08099; reference code wudi_main.py.
    Differs: a task vector of zeros, which gives NaN there, is left out. The code optimises matrices
    of attention and MLP only; here those of other roles too, but for vocabulary tables.
    """
    if deltas.dim() != 3 or not deltas.numel():
        return deltas.mean(0).mul_(scale) if rest == "mean" else torch.zeros_like(deltas[0])
    if solver == "closed":
        return _closed(*_normal_equations(deltas.double())).to(deltas.dtype).mul_(scale)
    left, right = _normal_equations(deltas)
    return _by_adam(added(list(deltas)), left, right, steps, rate).mul_(scale)
