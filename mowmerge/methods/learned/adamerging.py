"""AdaMerging: task arithmetic with the coefficients that make the merged model least uncertain."""

from __future__ import annotations

from typing import Literal

from mowmerge.methods.contracts import Count, NonNegative, PerModel, Positive, Seed, Unit
from mowmerge.methods.ops import spread, weighted_sum
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


@merge_method(
    paper="arXiv:2310.02575",
    fit="weight",
    laws={"identity": {"weight": 1.0}, "permutation": {}, "scale": {}, "propagates": {}},
)
def adamerging(
    deltas: Tensor,
    *,
    weight: PerModel[Unit] = 0.3,
    granularity: Literal["tensor", "task"] = "tensor",
    steps: Count = 500,
    rate: NonNegative = 1e-3,
    batch: Positive = 16,
    balance: bool = False,
    seed: Seed = 0,
) -> Tensor:
    """The sum of the task vectors, by coefficients that a fit pass finds: sum_i weight_i * D_i.

    The fit pass minimises sum_t mean_x H(softmax(h_t(f(x; W)))) over the weights, with unlabelled
    samples x of each task t and the head h_t of its expert; it has run before this is called.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        weight: coefficient of each task vector: where the fit starts, and its bounds.
        granularity: fit one coefficient a model and tensor (the papers' "layer-wise"), or one a
            model (task-wise).
        steps: updates of the coefficients (Adam); 0 leaves them at weight.
        rate: Adam's learning rate.
        batch: samples of each task an update sees.
        balance: divide each task's entropy by the log of its number of classes, the most it can be.
        seed: which order the samples come in.

    Source: AdaMerging, arXiv:2310.02575, eq. 5 and 6; reference code
    main_layer_wise_adamerging.py, main_task_wise_adamerging.py.
    Differs: fitted on the router split; the paper fits on the inputs it is tested on. One batch a
    task and step, where the released loop sees two. Weights are put back into 0..1 after each step;
    clamped in the graph, as released, those that leave 0..1 have no gradient and stay there.
    """
    return weighted_sum(deltas, [float(w) for w in spread(weight, len(deltas))])
