"""Every golden case of the methods on matrices: their functions on the tiny models' tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import CASES, assert_within_tolerance, deltas, expected, extra, wide
from torch import Tensor

from mowmerge.checkpoint import naming
from mowmerge.methods import registry
from mowmerge.methods.ops.spectral import svd
from mowmerge.methods.static.star import _truncated

torch.set_num_threads(1)
PER_MATRIX: dict[str, tuple[str, dict[str, Any]]] = {
    "tsvm_all_matrices": ("tsv_m", {"vocabulary": True}),
    "tsvm_no_vocab": ("tsv_m", {"scale": 0.8}),
    "iso_c_all": ("iso_c", {"vocabulary": True}),
    "iso_c_no_vocab": ("iso_c", {"scale": 1.3}),
    "iso_cts_f08": ("iso_cts", {"vocabulary": True}),
    "iso_cts_f05_no_vocab": ("iso_cts", {"common": 0.5, "scale": 0.9}),
    "star_eta40": ("star", {"density": 0.4, "vocabulary": True}),
    "star_eta75": ("star", {"density": 0.75, "vocabulary": True}),
}


def merged(name: str, tensor: str, moved: Tensor, given: dict[str, Any]) -> Tensor:
    """As the engine calls it: a matrix in its shape, anything else as elements."""
    spec = registry.get(name)
    _, whole = spec.sees(moved.shape[1:], naming.role(tensor), spec.complete(given))
    values = moved if whole else moved.flatten(1)
    return spec.function(values, **given).view_as(moved[0])


@pytest.mark.parametrize("case", PER_MATRIX)
def test_matrix_by_matrix(case: str) -> None:
    (name, given), (base, *experts) = PER_MATRIX[case], CASES[case]["inputs"]
    got = {
        tensor: wide(base, tensor) + merged(name, tensor, deltas(base, experts, tensor), given)
        for tensor in expected(case)
    }
    assert_within_tolerance(case, got)


@pytest.mark.parametrize("case", ["star_eta40", "star_eta75"])
def test_star_keeps_the_ranks_that_the_code_keeps(case: str) -> None:
    base, density = CASES[case]["inputs"][0], CASES[case]["parameters"]["eta"] / 100
    for expert, ranks in extra(case)["kept_rank"].items():
        for tensor, rank in ranks.items():
            moved = deltas(base, [f"models/{expert}"], tensor)[0]
            kept = _truncated(svd(moved), density)
            assert len(kept.values) == (rank if moved.any() else 0), (expert, tensor)
