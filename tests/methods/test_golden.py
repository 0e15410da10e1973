"""Every golden case of these methods, by calling their functions on the tiny models' tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mowmerge.methods import ops, registry
from mowmerge.methods.contracts import Draws

torch.set_num_threads(1)
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {c["id"]: c for c in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}
MERGEKIT = [name for name in CASES if re.match(r"mergekit_(?!stat_)", name)]
GLOBAL = [name for name in CASES if name.startswith("ties_global_")]
STATISTICAL = [name for name in CASES if name.startswith("mergekit_stat_")]
DYNAMIC = [name for name in CASES if re.match("mow_merge|wemoe_|smile_", name)]  # tests/dynamic
SEEDS = 200

linear, slerp, task_arithmetic, ties, dare, passthrough, model_stock, adamerging_pp = (
    registry.get(name).function
    for name in (
        "linear", "slerp", "task_arithmetic", "ties", "dare", "passthrough", "model_stock",
        "adamerging_pp",
    )
)  # fmt: skip


# --- models and expected values


@cache
def stored(folder: str) -> dict[str, Tensor]:
    """A model's tensors as stored: one file, or the shards; `base+adapter` with the LoRA added."""
    base, plus, adapter = folder.partition("+")
    found: dict[str, Tensor] = {}
    for file in sorted((GOLDEN / base).glob("model*.safetensors")):
        found.update(load_file(file))
    return {**found, **adapted(found, GOLDEN / adapter)} if plus else found


def adapted(base: dict[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """W + alpha/r * B @ A of every tensor that the adapter touches."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    parts, found = load_file(adapter / "adapter_model.safetensors"), {}
    for key, a in parts.items():
        if key.endswith(".lora_A.weight"):
            b = parts[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            found[name] = base[name] + config["lora_alpha"] / config["r"] * (b @ a)
    assert len(found) == len(config["target_modules"]) * 2
    return found


def wide(folder: str, name: str) -> Tensor:
    return stored(folder)[name].float()


def deltas(base: str, experts: list[str], name: str) -> Tensor:
    return torch.stack([wide(e, name) - wide(base, name) for e in experts])


@cache
def expected(case: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases" / case / "expected.safetensors")


def extra(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "cases" / case / "extra.json").read_text())


def assert_within_tolerance(case: str, got: dict[str, Tensor]) -> None:
    """|x - expected| <= atol + rtol |expected|, for all but a stated share of the elements."""
    want, tolerance = expected(case), CASES[case]["tolerance"]
    assert got.keys() == want.keys()
    wrong: dict[str, int] = {}
    for name, value in want.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == value.dtype
        ours, theirs = got[name].double(), value.double()
        off = (ours - theirs).abs() > tolerance["atol"] + tolerance["rtol"] * theirs.abs()
        assert torch.isfinite(ours).all()
        wrong[name] = int(off.sum())
        if value.dtype != torch.float32:  # fp32 arithmetic and one cast: a rounding rarely differs
            assert (ours != theirs).double().mean() < 0.005
    total = sum(value.numel() for value in want.values())
    share = sum(wrong.values()) / total
    assert share <= tolerance["max_mismatch_fraction"], {k: v for k, v in wrong.items() if v}


# --- mergekit's recipes


@dataclass
class Slice:
    """Layers that several models give to the output: its own sources and parameters."""

    sources: list[tuple[str, int, dict[str, Any]]]  # model, first layer, its parameters
    length: int
    levels: list[dict[str, Any]] = field(default_factory=list)  # slice, module, top


class Recipe:
    """A mergekit recipe: which tensors of which models, with which parameters, make an output."""

    def __init__(self, case: str) -> None:
        self.raw = yaml.safe_load((GOLDEN / "cases" / case / "recipe.yml").read_text())
        self.method, self.base = self.raw["merge_method"], self.raw.get("base_model")
        modules = self.raw.get("modules")
        assert not modules or list(modules) == ["default"]
        body = modules["default"] if modules else self.raw
        levels = [body.get("parameters", {})] if modules else []
        self.slices = [
            Slice(sources, length, [own, *levels, self.raw.get("parameters", {})])
            for sources, length, own in self._slices(body)
        ]

    def _slices(self, body: dict[str, Any]) -> Iterator[tuple[list[Any], int, dict[str, Any]]]:
        for piece in body.get("slices", []):
            sources = [
                (s["model"], s["layer_range"][0], s.get("parameters", {})) for s in piece["sources"]
            ]
            (length,) = {s["layer_range"][1] - s["layer_range"][0] for s in piece["sources"]}
            yield sources, length, piece.get("parameters", {})
        if "models" in body:
            sources = [(m["model"], 0, m.get("parameters", {})) for m in body["models"]]
            if self.base and all(model != self.base for model, _, _ in sources):
                sources.append((self.base, 0, {}))  # an unlisted base is one more source
            config = GOLDEN / sources[0][0].partition("+")[0] / "config.json"
            yield sources, json.loads(config.read_text())["num_hidden_layers"], {}

    def place(self, name: str) -> tuple[Slice, int, float]:
        """The slice of an output tensor, its layer in the slice, and t along the slice.

        Embeddings come from the first slice, norm and head from the last, both at t = 0.
        """
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if not layer:
            return self.slices[0 if "embed_tokens" in name else -1], 0, 0.0
        offset = int(layer[1])
        for piece in self.slices:
            if offset < piece.length:
                return piece, offset, offset / (piece.length - 1) if piece.length > 1 else 1.0
            offset -= piece.length
        raise AssertionError(name)


def renamed(name: str, layer: int) -> str:
    return re.sub(r"\.layers\.\d+\.", f".layers.{layer}.", name)


def evaluated(setting: Any, name: str, t: float) -> Any:
    """A scalar; a gradient at t; or the first filter that is a substring of the name; or None."""
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], dict):
        for entry in setting:
            if entry.get("filter", "*") == "*" or entry["filter"] in name:
                return evaluated(entry["value"], name, t)
        return None
    x = t * (len(setting) - 1)
    low = min(int(x), max(len(setting) - 2, 0))
    high = min(low + 1, len(setting) - 1)
    return setting[low] + (x - low) * (setting[high] - setting[low])


class Parameters:
    """Values for one output tensor: the source's, else the slice's, the module's, the top's."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self.piece, self.offset, self.t = recipe.place(name)
        self.name = name

    def shared(self, word: str, default: Any) -> Any:
        return self._first(word, self.piece.levels, self.name, default)

    def each(self, word: str, models: list[str], default: Any) -> list[Any]:
        by_model = {model: (start, own) for model, start, own in self.piece.sources}
        found = []
        for model in models:
            start, own = by_model[model]
            name = renamed(self.name, start + self.offset)
            found.append(self._first(word, [own, *self.piece.levels], name, default))
        return found

    def _first(self, word: str, levels: list[dict[str, Any]], name: str, default: Any) -> Any:
        for level in levels:
            value = evaluated(level[word], name, self.t) if word in level else None
            if value is not None:
                return value
        assert default is not ..., f"{word} is required"
        return default


def merged(recipe: Recipe, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """One output tensor by the recipe's method, in fp32."""
    p = Parameters(recipe, name)
    everyone = list(tensors)
    experts = [model for model in everyone if model != recipe.base]
    if recipe.method == "linear":
        return linear(
            torch.stack(list(tensors.values())),
            weight=p.each("weight", everyone, ...),
            normalize=bool(p.shared("normalize", True)),
        )
    if recipe.method == "slerp":
        (other,) = experts
        return slerp(torch.stack([tensors[recipe.base], tensors[other]]), t=p.shared("t", ...))
    if recipe.method == "passthrough":
        return passthrough(
            torch.stack(list(tensors.values())), scale=p.each("scale", everyone, 1.0)
        )
    base = tensors[recipe.base]
    moved = torch.stack([tensors[model] - base for model in experts])
    if recipe.method == "model_stock":
        wise = bool(p.shared("filter_wise", False))
        return base + model_stock(moved, filter_wise=wise, clamp=False)
    weight, scale = p.each("weight", experts, ...), p.shared("lambda", 1.0)
    if recipe.method == "task_arithmetic":
        normalize = bool(p.shared("normalize", False))
        return base + task_arithmetic(moved, weight=weight, scale=scale, normalize=normalize)
    assert recipe.method == "ties"
    return base + ties(
        moved,
        weight=weight,
        density=p.each("density", experts, 1.0),
        trim="tensor",
        zero_sign="plus",
        aggregate="mean" if p.shared("normalize", True) else "sum",
        rescale=bool(p.shared("rescale", False)),
        scale=scale,
    )


def vocabulary(folder: str) -> dict[str, int]:
    return json.loads((GOLDEN / folder / "tokenizer.json").read_text())["model"]["vocab"]


def by_token(
    name: str, given: dict[str, Tensor], base: str, ids: dict[str, int]
) -> dict[str, Tensor]:
    """Vocabulary rows in the order of `ids`; base's row, else the mean, where a model has none."""
    if name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return given
    rows = {model: torch.zeros(len(ids), value.shape[1]) for model, value in given.items()}
    known = {model: vocabulary(model) for model in given}
    for token, i in ids.items():
        held = {m: given[m][known[m][token]] for m in given if token in known[m]}
        spare = held[base] if base in held else torch.stack(list(held.values())).mean(0)
        for model, row in rows.items():
            row[i] = held.get(model, spare)
    return rows


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
    names = sorted(stored(base))
    flat = torch.cat([deltas(base, experts, n).reshape(len(experts), -1) for n in names], 1)
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
    names, told = sorted(stored(base)), extra(case)
    flat = torch.cat([deltas(base, experts, n).reshape(len(experts), -1) for n in names], 1)
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
def test_dare_in_distribution(case: str) -> None:
    told = extra(case)
    p = told["parameters"]
    experts = [f"models/{e}" for e in p["experts"]]
    elect = "mass" if told["method"] == "dare_ties" else "none"
    rescale = "l1" if p["extra"].get("rescale", True) else "none"
    for name, want in told["tensors"].items():
        base, moved = wide("models/base", name), deltas("models/base", experts, name)
        draws = [Draws(seed, p["experts"], name) for seed in range(SEEDS)]

        for i, expert in enumerate(want["experts"]):
            one, density = moved[i : i + 1], p["density"][i]
            alone = [Draws(d.seed, [expert["expert"]], name) for d in draws]
            bare = torch.ones_like(one)
            kept = [dare(bare, density=density, rescale="none", rng=d).mean().item() for d in alone]
            error = sum(kept) / SEEDS - expert["expected_kept_fraction"]
            assert abs(error) <= 5 * expert["binomial_sd"] / SEEDS**0.5
            norm = one.double().abs().sum().item()
            for d in alone[:20]:
                after = dare(one, density=density, rescale="l1", rng=d).double().abs().sum().item()
                assert after == pytest.approx(norm, rel=1e-6)

        runs = torch.stack([
            base.double()
            + dare(
                moved,
                weight=p["weight"],
                density=p["density"],
                elect=elect,
                aggregate="sum",
                rescale=rescale,
                scale=p["extra"].get("lambda", 1.0),
                rng=d,
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


def test_every_case_is_run() -> None:
    named = {"dare_magnitude_80", "adapp_k20_const"}
    static = {n for n, case in CASES.items() if case.get("family") != "dynamic"} - {*DYNAMIC}
    assert {*MERGEKIT, *GLOBAL, *STATISTICAL, *named} == static
    assert len(static) == 41
