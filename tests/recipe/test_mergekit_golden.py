"""Every golden case of mergekit's, run from its own YAML text as `mowmerge merge` runs it."""

from __future__ import annotations

import json
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
    wide,
)
from torch import Tensor
from zoo import load

from mowmerge import api
from mowmerge.checkpoint import tokenizers
from mowmerge.methods import registry
from mowmerge.methods.contracts import Draws
from mowmerge.planner import build
from mowmerge.recipe import parse

torch.set_num_threads(1)
MERGEKIT = [name for name in CASES if name.startswith("mergekit_")]
RANDOM = [name for name in MERGEKIT if name.startswith("mergekit_stat_")]
EXACT = [name for name in MERGEKIT if name not in RANDOM]
SEEDS = 200


def recipe(case: str) -> Path:
    return GOLDEN / "cases" / case / "recipe.yml"


@pytest.mark.parametrize("case", EXACT)
def test_its_yaml_gives_its_tensors(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(GOLDEN)
    result = api.merge(recipe(case), tmp_path / "out", hashes=False)
    got, want = load(result.path), expected(case)
    assert got.keys() >= want.keys()
    if "output_vocab" in extra(case):
        got |= by_token(result.path, got, extra(case)["output_vocab"])
    assert_within_tolerance(case, {name: got[name] for name in want})


def by_token(out: Path, got: dict[str, Tensor], ids: dict[str, int]) -> dict[str, Tensor]:
    """The rows of an output's tokens where mergekit's output has them."""
    ours = tokenizers.read(out).ids
    assert ours.keys() == ids.keys()
    found = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found[name] = got[name].clone()
        for token, i in ids.items():
            found[name][i] = got[name][ours[token]]
    return found


@pytest.mark.parametrize("case", EXACT)
def test_its_recipe_is_the_same_plan(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check --convert` prints what gives the same plan, and converts to itself."""
    monkeypatch.chdir(GOLDEN)
    text = parse.native(recipe(case))
    again = parse.loads(text, "recipe", recipe(case).parent)
    assert build(again).fingerprint == build(parse.load(recipe(case))).fingerprint
    (tmp_path / "recipe.yaml").write_text(text)
    assert parse.native(tmp_path / "recipe.yaml") == text


def settings(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The case as YAML of mergekit's, converted; its method's parameters in the plan."""
    told = extra(case)
    p = told["parameters"]
    each = [
        {
            "model": f"models/{expert}",
            "parameters": {
                "weight": p["weight"][i], "density": p["density"][i],
                **({"epsilon": p["epsilon"][i]} if "epsilon" in p else {}),
            },
        }
        for i, expert in enumerate(p["experts"])
    ]  # fmt: skip
    content = {
        "merge_method": told["method"], "base_model": "models/base", "models": each,
        "parameters": p["extra"], "dtype": "float32",
    }  # fmt: skip
    planned = build(parse.loads(json.dumps(content), folder=GOLDEN))
    return told, dict(planned.jobs[0].parameters) | {"method": planned.jobs[0].method}


@pytest.mark.parametrize("case", RANDOM)
def test_its_random_drops_in_distribution(case: str) -> None:
    told, given = settings(case)
    p, drop = told["parameters"], registry.get(given.pop("method")).function
    del given["seed"]
    experts = [f"models/{e}" for e in p["experts"]]
    for tensor, want in told["tensors"].items():
        base, moved = wide("models/base", tensor), deltas("models/base", experts, tensor)
        draws = [Draws(seed, p["experts"], tensor) for seed in range(SEEDS)]

        for i, expert in enumerate(want["experts"]):
            one = moved[i : i + 1]
            only = {
                name: (value[i],) if isinstance(value, tuple) else value
                for name, value in given.items()
            } | {"weight": 1.0, "elect": "none", "aggregate": "sum", "scale": 1.0}
            alone = [Draws(d.seed, [expert["expert"]], tensor) for d in draws]
            plain = {**only, "rescale": "none"}
            left = [(drop(one, **plain, rng=d) != 0).sum().item() for d in alone]
            kept = [count / max(1, int((one != 0).sum())) for count in left]
            error = sum(kept) / SEEDS - expert["expected_kept_fraction"]
            assert abs(error) <= 5 * expert["binomial_sd"] / SEEDS**0.5
            norm = one.double().abs().sum().item()
            for d in alone[:20] if only["rescale"] == "l1" else []:
                after = drop(one, **only, rng=d).double().abs().sum().item()
                assert after == pytest.approx(norm, rel=1e-6)

        runs = torch.stack([base.double() + drop(moved, **given, rng=d) for d in draws])
        runs = runs.reshape(SEEDS, -1)
        at, mean = want["positions"], runs.mean(0)
        index = torch.tensor(at["flat_index"])
        ours, theirs = runs.std(0)[index] / SEEDS**0.5, torch.tensor(at["mc_standard_error"])
        gap = (mean[index] - torch.tensor(at["mc_mean"])).abs()
        assert (gap <= 5 * (ours**2 + theirs**2).sqrt() + 1e-7).all()
        if given["elect"] == "none" and given["rescale"] == "none":
            p_delta = torch.tensor([w * d for w, d in zip(p["weight"], p["density"], strict=True)])
            hope = torch.tensordot(p_delta.double(), moved.double(), 1) * p["extra"]["lambda"]
            noise = (runs.var(0).sum() / SEEDS).sqrt()
            far = (mean - (base.double() + hope).reshape(-1)).norm()
            assert far <= 1.5 * noise


def test_every_case_is_run() -> None:
    assert len(EXACT) == 59
    assert len(RANDOM) == 5
