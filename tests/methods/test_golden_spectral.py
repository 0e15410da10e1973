"""Every golden case of the methods on matrices: their functions on the tiny models' tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import CASES, GOLDEN, assert_within_tolerance, deltas, expected, extra, wide
from safetensors.torch import load_file
from torch import Tensor
from zoo import Zoo

from mowmerge.checkpoint import naming
from mowmerge.methods import registry
from mowmerge.methods.ops.spectral import left_basis, svd
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


def low_rank(case: str) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Each tensor's factors, a pair a model."""
    held = load_file(GOLDEN / "cases" / case / "inputs.safetensors")
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for key in sorted(held):
        if key.endswith("/B"):
            _, tensor, _ = key.split("/")
            found.setdefault(tensor, []).append((held[key], held[key[:-1] + "A"]))
    return found


@pytest.mark.parametrize("thin", [True, False])
def test_knots_of_adapters(thin: bool) -> None:
    case, got = "knots_ties_lowrank", {}
    for tensor, factors in low_rank(case).items():
        moved = torch.stack([b @ a for b, a in factors])
        basis, _ = left_basis(moved, factors if thin else None)
        assert basis.shape[1] == extra(case)["retained_directions"][tensor]
        delta = registry.get("knots").function(moved, scale=0.5, factors=factors if thin else None)
        delta = delta[0] @ delta[1] if thin else delta
        got[tensor] = wide("models/base", tensor) + delta
    assert_within_tolerance(case, got)


def test_knots_trims_over_all_matrices(zoo: Zoo) -> None:
    """As a recipe: the threshold is of all matrices, those too that the case leaves out."""
    case = "knots_ties_top30_mean"
    base, *experts = CASES[case]["inputs"]
    content = {
        "base": str(GOLDEN / base),
        "models": {Path(e).name: str(GOLDEN / e) for e in experts},
        "method": "knots",
        "parameters": {"density": 0.3, "scale": 0.6},
    }
    found, _ = zoo.merge(content, workers=2)
    for tensor, count in extra(case)["retained_directions"].items():
        assert left_basis(deltas(base, experts, tensor))[0].shape[1] == count
    assert_within_tolerance(case, {name: found[name] for name in expected(case)})
    again, _ = zoo.merge(content, "again", workers=1, stats=False)
    assert all(torch.equal(again[name], value) for name, value in found.items())


@pytest.mark.parametrize("case", ["opcm_a05", "opcm_a05_zerodiag"])
def test_opcm_as_a_recipe(zoo: Zoo, case: str) -> None:
    base, *experts = CASES[case]["inputs"]
    content = {
        "base": str(GOLDEN / base),
        "models": {Path(e).name: str(GOLDEN / e) for e in experts},
        "method": "opcm",
        "parameters": {"zero_diagonal": case.endswith("zerodiag")},
        "rules": [{"match": {"role": "head"}, "parameters": {"vocabulary": True}}],
    }
    found, report = zoo.merge(content, workers=2)
    assert_within_tolerance(case, {name: found[name] for name in expected(case)})
    (told,) = report["statistics"]
    assert told["merged"] == len(experts)
    logged = extra(case)["logged"]["model/lambda_t"]
    assert told["stretch"] == pytest.approx(logged[-1], rel=1e-5)


def test_doge_as_a_recipe(zoo: Zoo) -> None:
    """Its threshold is of the layers' matrices, as in the case: vocabulary tables have none."""
    case = "doge_default"
    base, *experts = CASES[case]["inputs"]
    content = {
        "base": str(GOLDEN / base),
        "models": {Path(e).name: str(GOLDEN / e) for e in experts},
        "method": "doge",
    }
    found, _ = zoo.merge(content, workers=2)
    assert_within_tolerance(case, {name: found[name] for name in expected(case)})


def test_every_case_is_run() -> None:
    named = {*PER_MATRIX, "knots_ties_lowrank", "knots_ties_top30_mean", "opcm_a05"}
    named |= {"opcm_a05_zerodiag", "doge_default"}
    assert named == {name for name in CASES if re.match("iso_c|tsvm|star|knots|opcm|doge", name)}
