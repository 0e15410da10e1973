"""The golden cases: tiny models, and other implementations' results on them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
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
