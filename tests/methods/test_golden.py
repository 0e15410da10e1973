"""Every golden case of these methods, by calling their functions on the tiny models' tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_cases import (
    CASES,
    Parameters,
    Recipe,
    assert_within_tolerance,
    by_token,
    deltas,
    expected,
    extra,
    renamed,
    stored,
    wide,
)
from torch import Tensor

from mowmerge.methods import ops, registry
from mowmerge.methods.contracts import Draws

torch.set_num_threads(1)
MERGEKIT = [name for name in CASES if re.match(r"mergekit_(?!stat_)", name)]
GLOBAL = [name for name in CASES if name.startswith("ties_global_")]
STATISTICAL = [name for name in CASES if name.startswith("mergekit_stat_")]
DYNAMIC = [name for name in CASES if re.match("mow_merge|wemoe_|smile_", name)]  # tests/dynamic
SPECTRAL = [name for name in CASES if re.match("iso_c|tsvm|star|knots|opcm", name)]  # its own file
SEEDS = 200


def method(name: str) -> Callable[..., Any]:
    return registry.get(name).function


dare, ties, adamerging_pp = method("dare"), method("ties"), method("adamerging_pp")


# --- mergekit's recipes


TASK_VECTORS = {
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {"trim": "tensor", "zero_sign": "plus"}),
    "breadcrumbs": ("breadcrumbs", {"elect": "none"}),
    "breadcrumbs_ties": ("breadcrumbs", {"elect": "mass"}),
}


def merged(recipe: Recipe, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """One output tensor by the recipe's method, in fp32."""
    p = Parameters(recipe, name)
    base = tensors.get(recipe.base)
    experts = [model for model in tensors if model != recipe.base]
    everyone, others = (torch.stack([tensors[m] for m in who]) for who in (tensors, experts))
    if recipe.method in ("linear", "passthrough", "slerp", "karcher"):
        return on_models(recipe, p, list(tensors), everyone)
    if recipe.method in ("nuslerp", "multislerp", "nearswap", "arcee_fusion"):
        return beside_a_base(recipe, p, experts, others, base)
    assert base is not None
    moved = others - base
    if recipe.method in TASK_VECTORS:
        return base + on_task_vectors(recipe, p, experts, moved)
    if recipe.method == "model_stock":
        wise = bool(p.shared("filter_wise", False))
        return base + method("model_stock")(moved, filter_wise=wise, clamp=False)
    if recipe.method == "sce":
        return base + method("sce")(moved, density=p.shared("select_topk", 1.0), floor=1e-6)
    plus = recipe.method == "ramplus_tl"
    return base + method("ram")(
        moved,
        eps=p.shared("epsilon", 1e-5),
        boost=p.shared("r", 0.1) if plus else 0.0,
        cap=p.shared("alpha", 0.2),
        counts="tensor",
    )


def on_models(recipe: Recipe, p: Parameters, names: list[str], models: Tensor) -> Tensor:
    if recipe.method == "linear":
        normalize = bool(p.shared("normalize", True))
        return method("linear")(models, weight=p.each("weight", names, ...), normalize=normalize)
    if recipe.method == "passthrough":
        return method("passthrough")(models, scale=p.each("scale", names, 1.0))
    if recipe.method == "karcher":
        return method("karcher")(
            models, max_iter=p.shared("max_iter", 10), tol=p.shared("tol", 1e-5)
        )
    first = names.index(recipe.base)
    return method("slerp")(models[[first, 1 - first]], t=p.shared("t", ...))


def beside_a_base(
    recipe: Recipe, p: Parameters, names: list[str], models: Tensor, base: Tensor | None
) -> Tensor:
    if recipe.method == "nearswap":
        return method("nearswap")(models, base, t=p.shared("t", ...), floor=1e-6)
    if recipe.method == "arcee_fusion":
        return method("arcee_fusion")(models, base)
    weight = p.each("weight", names, ...)
    if recipe.method == "multislerp":
        return method("multislerp")(models, base, weight=weight)
    by_row = "columns" if p.shared("nuslerp_row_wise", False) else "rows"
    axis = "all" if p.shared("nuslerp_flatten", True) else by_row
    return method("nuslerp")(models, base, weight=weight, axis=axis)


def on_task_vectors(recipe: Recipe, p: Parameters, names: list[str], moved: Tensor) -> Tensor:
    ours, given = TASK_VECTORS[recipe.method]
    given = {**given, "weight": p.each("weight", names, ...), "scale": p.shared("lambda", 1.0)}
    normalize = bool(p.shared("normalize", recipe.method == "ties"))
    if ours == "task_arithmetic":
        return method(ours)(moved, normalize=normalize, **given)
    if ours == "breadcrumbs":
        given["gamma"] = p.each("gamma", names, 0.01)
    return method(ours)(
        moved,
        density=p.each("density", names, 1.0),
        aggregate="mean" if normalize else "sum",
        rescale=bool(p.shared("rescale", False)),
        **given,
    )


@pytest.mark.parametrize("case", MERGEKIT)
def test_mergekit(case: str) -> None:
    recipe = Recipe(case)
    ids = extra(case)["output_vocab"] if "tokenizer" in recipe.raw else None
    got = {}
    for name, value in expected(case).items():
        piece, offset, _ = recipe.place(name)
        tensors = {
            model: wide(model, renamed(name, start + offset)) for model, start, _ in piece.sources
        }
        if ids:
            tensors = by_token(name, tensors, recipe.base, ids)
        got[name] = merged(recipe, name, tensors).to(value.dtype)
    assert_within_tolerance(case, got)


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
    assert list(state.threshold) == pytest.approx(told["trim_thresholds"], rel=1e-6)
    kept = [int((v.abs() >= t).sum()) for v, t in zip(flat, state.threshold, strict=True)]
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


@pytest.mark.parametrize("case", STATISTICAL)
def test_random_drops_in_distribution(case: str) -> None:
    told = extra(case)
    p = told["parameters"]
    name, _, variant = told["method"].partition("_")
    elect = "mass" if variant == "ties" or told["method"] == "della" else "none"
    drop = method(name)
    own = [{"epsilon": e} for e in p["epsilon"]] if name == "della" else [{}] * len(p["experts"])
    shared = {"epsilon": p["epsilon"]} if name == "della" else {}
    experts = [f"models/{e}" for e in p["experts"]]
    rescale = "l1" if p["extra"].get("rescale", True) else "none"
    for tensor, want in told["tensors"].items():
        base, moved = wide("models/base", tensor), deltas("models/base", experts, tensor)
        draws = [Draws(seed, p["experts"], tensor) for seed in range(SEEDS)]

        for i, expert in enumerate(want["experts"]):
            one, given = moved[i : i + 1], {"density": p["density"][i], **own[i]}
            given |= {"elect": "none", "aggregate": "sum"}
            alone = [Draws(d.seed, [expert["expert"]], tensor) for d in draws]
            left = [(drop(one, rescale="none", rng=d, **given) != 0).sum().item() for d in alone]
            kept = [count / max(1, int((one != 0).sum())) for count in left]
            error = sum(kept) / SEEDS - expert["expected_kept_fraction"]
            assert abs(error) <= 5 * expert["binomial_sd"] / SEEDS**0.5
            norm = one.double().abs().sum().item()
            for d in alone[:20]:
                after = drop(one, rescale="l1", rng=d, **given).double().abs().sum().item()
                assert after == pytest.approx(norm, rel=1e-6)

        runs = torch.stack([
            base.double()
            + drop(
                moved,
                weight=p["weight"],
                density=p["density"],
                elect=elect,
                aggregate="mean" if told["method"] == "della" else "sum",
                rescale=rescale,
                scale=p["extra"].get("lambda", 1.0),
                rng=d,
                **shared,
            )
            for d in draws
        ]).reshape(SEEDS, -1)  # fmt: skip
        at, mean = want["positions"], runs.mean(0)
        index = torch.tensor(at["flat_index"])
        ours, theirs = runs.std(0)[index] / SEEDS**0.5, torch.tensor(at["mc_standard_error"])
        gap = (mean[index] - torch.tensor(at["mc_mean"])).abs()
        assert (gap <= 5 * (ours**2 + theirs**2).sqrt() + 1e-7).all()
        if elect == "none" and rescale == "none":
            p_delta = torch.tensor([w * d for w, d in zip(p["weight"], p["density"], strict=True)])
            hope = torch.tensordot(p_delta.double(), moved.double(), 1) * p["extra"]["lambda"]
            noise = (runs.var(0).sum() / SEEDS).sqrt()
            far = (mean - (base.double() + hope).reshape(-1)).norm()
            assert far <= 1.5 * noise


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
def test_widen_column_by_column(case: str) -> None:
    """The reference transposes the token embedding."""
    got, (base, *experts) = {}, CASES[case]["inputs"]
    for tensor in expected(case):
        models, start = torch.stack([wide(e, tensor) for e in experts]), wide(base, tensor)
        if "embed_tokens" in tensor:
            got[tensor] = method("widen")(models.mT, start.T, **PER_COLUMN[case]).T
        else:
            got[tensor] = method("widen")(models, start, **PER_COLUMN[case])
    assert_within_tolerance(case, got)


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
    assert {*MERGEKIT, *GLOBAL, *STATISTICAL, *named} == static
    assert len(static) == 79
