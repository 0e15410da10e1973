"""Measures merges of thousands of tiny tensors, as in checkpoints with a file of many experts.

    python -m tests.bench.many DIR [--runs 3]

DIR gets four models of 7,203 bf16 tensors, 256 elements in most of them. What it prints is wall
time from the start of the command to its end, statistics and hashes included, medians of the runs.
The aim is 5 seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from tests.bench.merge import measure, table

NAMES = ("base", "a", "b", "c")
LAYERS, EXPERTS, PROJECTIONS = 24, 100, ("w1", "w2", "w3")
AIM = 5.0  # seconds
OURS: dict[str, dict[str, str]] = {
    "linear": {},
    "ties": {"trim": "tensor"},
    "ties-global": {"trim": "global"},
}
CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 16,
    "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_local_experts": EXPERTS,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "torch_dtype": "bfloat16",
}  # fmt: skip


def fill(folder: Path) -> None:
    """The four models, where they are not there yet."""
    for seed, name in enumerate(NAMES):
        draws = torch.Generator().manual_seed(seed)
        shapes = {
            f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight": (16, 16)
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
            for part in PROJECTIONS
        }
        shapes |= {"model.embed_tokens.weight": (64, 16), "lm_head.weight": (64, 16)}
        tensors = {k: torch.randn(v, generator=draws).bfloat16() for k, v in shapes.items()}
        tensors["model.norm.weight"] = torch.ones(16, dtype=torch.bfloat16)
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure merges of many tiny tensors.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    fill(folder)
    rows = []
    for method, parameters in OURS.items():
        models = {name: str(folder / name) for name in NAMES[1:]}
        recipe = {"models": models, "method": method.partition("-")[0], "parameters": parameters}
        recipe |= {"base": str(folder / "base")} if method != "linear" else {}
        file, out, walls = folder / f"{method}.yaml", folder / "out", []
        file.write_text(json.dumps(recipe))
        for _ in range(asked.runs):
            shutil.rmtree(out, ignore_errors=True)
            words = [sys.executable, "-m", "mowmerge", "merge", str(file), str(out), "--quiet"]
            walls.append(measure(words, folder / "log").wall)
        wall = median(walls)
        rows.append([method, f"{wall:.2f}", "yes" if wall < AIM else "no"])
    print(table("method | wall, s | under 5 s", rows))


if __name__ == "__main__":
    main()
