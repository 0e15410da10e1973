"""The pieces that methods share: functions on blocks, folds over tensors and models, selection.

Blocks are contiguous and cut at multiples of 65,536 elements, so a fused multiply-add gives each
element the same bits however a tensor is cut.
"""

from mowmerge.methods.ops.blocks import (
    Elect,
    added,
    agree,
    directions,
    elect_sign,
    exclusive,
    fused,
    keep_above,
    l1_norms,
    one_block,
    restoring,
    shares,
    spread,
    stacked,
    weighted_sum,
)
from mowmerge.methods.ops.edges import Edge, edges, keep_beyond, largest, marked
from mowmerge.methods.ops.folds import (
    Listed,
    Most,
    Sum,
    gram,
    inner_products,
    majority,
    mapped,
    settle,
    square_norm,
)
from mowmerge.methods.ops.selection import TALLY, kth_largest, trim_ranks, trim_thresholds

__all__ = [
    "TALLY",
    "Edge",
    "Elect",
    "Listed",
    "Most",
    "Sum",
    "added",
    "agree",
    "directions",
    "edges",
    "elect_sign",
    "exclusive",
    "fused",
    "gram",
    "inner_products",
    "keep_above",
    "keep_beyond",
    "kth_largest",
    "l1_norms",
    "largest",
    "majority",
    "mapped",
    "marked",
    "one_block",
    "restoring",
    "settle",
    "shares",
    "spread",
    "square_norm",
    "stacked",
    "trim_ranks",
    "trim_thresholds",
    "weighted_sum",
]
