"""Every golden case of these methods, by calling their functions on the tiny models' tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import (
    CASES,
    GOLDEN,
    assert_within_tolerance,
    deltas,
    expected,
    extra,
    stored,
    wide,
)
from torch import Tensor
from zoo import Zoo

from mowmerge.methods import ops, registry

torch.set_num_threads(1)
MERGEKIT = [name for name in CASES if name.startswith("mergekit_")]  # tests/recipe
GLOBAL = [name for name in CASES if name.startswith("ties_global_")]
DYNAMIC = [name for name in CASES if re.match("mow_merge|wemoe_|smile_", name)]  # tests/dynamic
SPECTRAL = [n for n in CASES if re.match("iso_c|tsvm|star|knots|opcm|doge", n)]  # its own file


def method(name: str) -> Callable[..., Any]:
    return registry.get(name).function


dare, ties, adamerging_pp = method("dare"), method("ties"), method("adamerging_pp")


# --- the papers' own code


@pytest.mark.parametrize("case", GLOBAL)
def test_ties_over_the_whole_model(case: str) -> None:
    p, (base, *experts) = CASES[case]["parameters"], CASES[case]["inputs"]
    names, flat = whole_model(base, experts)
    options = {
        "weight": 1.0,
        "density": int(p["reset"].removeprefix("topk")) / 100,
        "trim": "global",
        "elect": p["resolve"],
        "aggregate": p["merge"].removeprefix("dis-"),
        "zero_sign": "majority",
        "rescale": False,
    }
    delta = ties(flat, scale=p["lambda"], **options)
    sizes = [stored(base)[n].numel() for n in names]
    pieces = dict(zip(names, delta.split(sizes), strict=True))
    got = {n: wide(base, n) + pieces[n].view_as(stored(base)[n]) for n in expected(case)}
    assert_within_tolerance(case, got)

    told, n = extra(case), len(experts)
    spread = {**options, "weight": [1.0] * n, "density": [options["density"]] * n}
    state = ops.settle(registry.get("ties").reduce, flat, spread)
    thresholds = [edge.least for edge in state.edge]
    assert thresholds == pytest.approx(told["trim_thresholds"], rel=1e-6)
    kept = [int((v.abs() >= t).sum()) for v, t in zip(flat, thresholds, strict=True)]
    assert kept == told["kept_counts"]


def test_adamerging_pp_with_given_coefficients() -> None:
    case = "adapp_k20_const"
    base, *experts = CASES[case]["inputs"]
    told = extra(case)
    _, flat = whole_model(base, experts)
    density = CASES[case]["parameters"]["K"] / 100
    spread = {"weight": [1.0] * len(experts), "density": density}
    state = ops.settle(registry.get("adamerging_pp").reduce, flat, spread)
    got = {}
    for key in expected(case):
        kind, _, name = key.partition("/")
        expert = ""
        if kind == "tau":
            expert, _, name = name.partition("/")
        moved = deltas(base, experts, name)
        weight = [float(e.endswith(f"/{expert}")) for e in experts] if expert else None
        weight = weight or told["lambdas"][name]
        delta = adamerging_pp(moved, weight=weight, density=density, state=state)
        got[key] = delta if expert else wide(base, name) + delta
    assert_within_tolerance(case, got)
    for i, share in enumerate(told["nonzero_fraction"]):
        one = [float(i == k) for k in range(len(experts))]
        alone = adamerging_pp(flat, weight=one, density=density, state=state)
        assert float((alone != 0).double().mean()) == pytest.approx(share, rel=1e-6)


def test_dare_by_magnitude() -> None:
    case = "dare_magnitude_80"
    p, (base, *experts) = CASES[case]["parameters"], CASES[case]["inputs"]
    options = {"mask": "magnitude", "density": 1 - p["mask_rate"], "rescale": "density"}
    got = {}
    for key in expected(case):
        if key.startswith("merged/"):
            name = key.removeprefix("merged/")
            moved = dare(deltas(base, experts, name), weight=p["weights"], **options)
            got[key] = wide(base, name) + moved
        else:
            _, expert, name = key.split("/")
            got[key] = dare(deltas(base, [f"models/{expert}"], name), **options)
    assert_within_tolerance(case, got)


def whole_model(base: str, experts: list[str]) -> tuple[list[str], Tensor]:
    """The names of the model's tensors, and its task vectors [N,D] in that order."""
    names = sorted(stored(base))
    moved = [deltas(base, experts, name).reshape(len(experts), -1) for name in names]
    return names, torch.cat(moved, 1)


PER_TENSOR = {
    "magmax_half": ("magmax", {"scale": 0.5}),
    "sce_fusechat_topk01": ("sce", {"density": 0.1, "mode": "fusechat"}),
    "varm": ("sce", {"mode": "varm"}),
    "consensus_l04_k2": ("consensus_ta", {"threshold": 0.4, "agreement": 2, "scale": 0.3}),
}
PER_MATRIX = {"wudi_300": ("wudi", {"rest": "mean"})}
PER_COLUMN = {"widen_default": {}, "widen_r12_c08": {"above": 1.2, "calibration": 0.8}}
PER_MODEL = {
    "consensus_ties_l02_k1": (
        "consensus_ta", {"threshold": 0.2, "agreement": 1, "scale": 0.5, "merge": "ties"}
    ),
    "pcb_A_r10": ("pcb_merging", {"density": 0.1}),
    "pcb_B_r05": (
        "pcb_merging",
        {"density": 0.05, "clamp": 1e-2, "competition": "pairs", "weight": 1.2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PER_TENSOR)
def test_tensor_by_tensor(case: str) -> None:
    (name, given), (base, *experts) = PER_TENSOR[case], CASES[case]["inputs"]
    got = {
        tensor: wide(base, tensor) + method(name)(deltas(base, experts, tensor), **given)
        for tensor in expected(case)
    }
    assert_within_tolerance(case, got)


@pytest.mark.parametrize("case", PER_MATRIX)
def test_matrix_by_matrix(case: str) -> None:
    """Embeddings and head, which the case leaves out, have the mean that vectors have too."""
    (name, given), (base, *experts) = PER_MATRIX[case], CASES[case]["inputs"]
    got = {}
    for tensor in expected(case):
        moved = deltas(base, experts, tensor)
        inner = tensor not in CASES[case]["parameters"]["exclude_keys"]
        delta = method(name)(moved, **given) if inner else moved.mean(0)
        got[tensor] = wide(base, tensor) + delta
    assert_within_tolerance(case, got)


@pytest.mark.parametrize("case", PER_COLUMN)
def test_widen_as_a_recipe(zoo: Zoo, case: str) -> None:
    """By columns, and by the tokens of the embedding, which the reference transposes."""
    base, *experts = CASES[case]["inputs"]
    content = {
        "base": str(GOLDEN / base),
        "models": {Path(e).name: str(GOLDEN / e) for e in experts},
        "method": "widen",
        "parameters": PER_COLUMN[case],
    }
    found, _ = zoo.merge(content, workers=2)
    assert_within_tolerance(case, {name: found[name] for name in expected(case)})


@pytest.mark.parametrize("case", PER_MODEL)
def test_over_the_whole_model(case: str) -> None:
    (name, given), (base, *experts) = PER_MODEL[case], CASES[case]["inputs"]
    names, flat = whole_model(base, experts)
    pieces = method(name)(flat, **given).split([stored(base)[n].numel() for n in names])
    moved = dict(zip(names, pieces, strict=True))
    got = {n: wide(base, n) + moved[n].view_as(stored(base)[n]) for n in expected(case)}
    assert_within_tolerance(case, got)


def test_every_case_is_run() -> None:
    named = {
        "dare_magnitude_80",
        "adapp_k20_const",
        *PER_TENSOR,
        *PER_MATRIX,
        *PER_COLUMN,
        *PER_MODEL,
    }
    static = {n for n, case in CASES.items() if case.get("family") != "dynamic"}
    static -= {*DYNAMIC, *SPECTRAL}
    assert {*MERGEKIT, *GLOBAL, *named} == static
    assert len(static) == 79
