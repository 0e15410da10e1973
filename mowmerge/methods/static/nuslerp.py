"""NuSLERP: spherical interpolation of two models or task vectors, whole, by row or by column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mowmerge.methods.contracts import Block, Extent, PerModel, Reduction
from mowmerge.methods.ops import Sum, inner_products, settle, spread
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

STRAIGHT = 1e-6  # |sin| of an angle below which the arc is a line: rounding decides what it is


def _moved(models: Tensor, base: Tensor | None) -> Tensor:
    return models if base is None else models - base


def _products(pair: Tensor, dim: int) -> Tensor:
    """<a,a>, <a,b>, <b,b> along a dimension of a [2,*S], stacked, in fp64."""
    a, b = pair.double()
    return torch.stack([(a * a).sum(dim), (a * b).sum(dim), (b * b).sum(dim)])


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """The inner products of the whole vectors, or of every column."""
    axis, shape = extents[0].parameters["axis"], extents[0].shape
    if axis == "rows":
        return None

    def whole(block: Block) -> Tensor:
        products = inner_products(_moved(block.values, block.base))
        return torch.stack([products[0, 0], products[0, 1], products[1, 1]])

    def columns(block: Block) -> Tensor:
        return _products(_moved(block.values, block.base), 0)

    found = yield Sum(columns if axis == "columns" and len(shape) > 1 else whole)
    return found.total


def _coefficients(products: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """What a and b are multiplied by, for each pair of vectors."""
    aa, ab, bb = products
    length = (aa * bb).sqrt()
    angle = (ab / length.where(length > 0, 1.0)).clamp(-1.0, 1.0).acos()
    sine = angle.sin()
    arc = sine.abs() >= STRAIGHT
    under = sine.where(arc, 1.0)
    first = (((1.0 - t) * angle).sin() / under).where(arc, 1.0 - t)
    return first, ((t * angle).sin() / under).where(arc, t)


def _caution(p: Mapping[str, Any], n: int) -> str:
    first, second = p["weight"]
    outside = first * second < 0 and abs(first + second) >= 1e-6
    return "nuslerp extrapolates: the weights have opposite signs" if outside else ""


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """Task vectors and what comes of them; of rows all in fp64."""
    return (8 if p["axis"] == "rows" else 5) * math.prod(shape)


@merge_method(
    paper="mergekit, nuslerp",
    scope=lambda p: "tensor" if p["axis"] == "all" else "row",
    workspace=_workspace,
    models=2,
    laws=("idempotent", "permutation", "scale"),
    reduce=_statistics,
    caution=_caution,
)
def nuslerp(
    models: Tensor,
    base: Tensor | None = None,
    *,
    weight: PerModel[float] = 1.0,
    axis: Literal["all", "rows", "columns"] = "all",
    state: Tensor | None = None,
) -> Tensor:
    """The point of the great arc between two models, or with a base between their task vectors.

    t = weight_2 / (weight_1 + weight_2); with a, b the models (minus the base, which is added
    again) and O the angle between them: out = sin((1-t) O)/sin O * a + sin(t O)/sin O * b, and
    (1-t) a + t b where |sin O| < 1e-6.

    Shapes: models [2,*S], base [*S] -> [*S].

    Args:
        weight: only their ratio matters; weights of opposite sign extrapolate, and t is 1/2 where
            their sum is below 1e-6.
        axis: a tensor is one vector; or each row is (along the last dimension); or each column
            (along the first). A vector is one in any case.

    Source: mergekit's nuslerp; Shoemake 1985.
    Differs: mergekit's nuslerp_row_wise: true interpolates the columns of the stored matrix, and
    false the rows; axis says what is meant. The angle with a zero vector is a right one, decided by
    exact zero. mergekit's line begins at |sin O| < 1e-8, finer than a cosine is known: opposite
    vectors of other lengths blow up there. Unlike slerp nothing else makes the arc a line.
    """
    each = [float(w) for w in spread(weight, 2)]
    total = sum(each)
    t = each[1] / total if abs(total) >= 1e-6 else 0.5
    pair = _moved(models, base)
    if axis == "rows":
        products = _products(pair, -1) if pair.dim() > 1 else _products(pair[:, None], -1)
        first, second = (c[..., None] for c in _coefficients(products, t))
    else:
        if state is None:
            state = settle(_statistics, models, {"axis": axis}, base=base, rows=axis == "columns")
        first, second = _coefficients(state, t)
    out: Tensor = pair[0] * first.to(pair.dtype) + pair[1] * second.to(pair.dtype)
    return (out if base is None else out + base).reshape(models.shape[1:])
