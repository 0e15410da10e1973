"""The golden cases: tiny models, other implementations' results on them, and mergekit's recipes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
CASES = {c["id"]: c for c in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}


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
    """What is to come out; without what no correct implementation gives, or with what it does."""
    folder = GOLDEN / "cases" / case
    corrected = folder / "expected_corrected.safetensors"
    found = load_file(folder / "expected.safetensors")
    left = {n: v for n, v in found.items() if n not in CASES[case].get("ill_posed_tensors", [])}
    return left | (load_file(corrected) if corrected.exists() else {})


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
