"""One model's tensors as they are, or scaled."""

from __future__ import annotations

from mowmerge.methods.contracts import PerModel
from mowmerge.methods.ops import spread
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


@merge_method(
    paper="arXiv:2312.15166",
    models=1,
    laws={
        "identity": {},
        "idempotent": {"scale": 1.0},
        "permutation": {},
        "scale": {},
        "propagates": {},
    },
)
def passthrough(models: Tensor, *, scale: PerModel[float] = 1.0) -> Tensor:
    """The only model's tensor times scale; its bytes where scale is 1 and the dtype stays.

    Shapes: models [1,*S] -> [*S].

    Args:
        scale: factor; 0 switches a residual branch off.

    Source: layer stacking as in SOLAR (depth up-scaling), arXiv:2312.15166.
    Differs: none.
    """
    return models[0] * float(spread(scale, 1)[0])
