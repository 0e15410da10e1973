"""Measures merges of adapters on their base beside the same merges of full checkpoints.

    python -m tests.bench.adapters DIR [--layers 4] [--r 16] [--runs 3] [--methods linear,ties]

DIR is filled once with a llama-shaped base (bf16, hidden 2048), three adapters on every linear
layer, and the checkpoints that they make of it. Every merge is a child process with one worker;
CPU is its user + system time, medians are taken. Both merges have to write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from mowmerge import api
from mowmerge.planner import Options
from tests.bench.family import Llama, write_family
from tests.bench.merge import measure

MOST = 1.3  # times the CPU of the same merge from full checkpoints
NAMES = ("a", "b", "c")


def fill(folder: Path, layers: int, r: int) -> None:
    """The base, the adapters, and what they make of it."""
    model = Llama(layers=layers, vocab=8192)
    write_family(folder, model, experts=0)
    for i, name in enumerate(NAMES):
        adapter(folder / f"lora-{name}", model, r, i)
        recipe = folder / f"full-{name}.yaml"
        source = {"source": "./base", "adapter": f"./lora-{name}"}
        recipe.write_text(json.dumps({"models": {name: source}, "method": "passthrough"}))
        api.merge(recipe, folder / f"full-{name}", options=Options(), hashes=False)


def adapter(folder: Path, model: Llama, r: int, seed: int) -> None:
    """A LoRA of random factors on every linear layer."""
    folder.mkdir()
    draws, tensors = torch.Generator().manual_seed(seed), {}
    for spec in model.specs:
        if "_proj" in spec.name:
            module = f"base_model.model.{spec.name.removesuffix('.weight')}"
            rows, columns = spec.shape
            tensors[f"{module}.lora_A.weight"] = torch.randn(r, columns, generator=draws) * 0.01
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, r, generator=draws) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": r}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def recipes(folder: Path, method: str) -> dict[str, Path]:
    """The merge of adapters and that of full checkpoints."""
    on_base: dict[str, Any] = {n: {"source": "base", "adapter": f"./lora-{n}"} for n in NAMES}
    sources = {"adapters": on_base, "full": {n: f"./full-{n}" for n in NAMES}}
    found = {}
    for kind, models in sources.items():
        found[kind] = folder / f"{kind}-{method}.yaml"
        content = {"base": "./base", "models": models, "method": method}
        found[kind].write_text(json.dumps(content))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", default="linear,ties")
    asked = parser.parse_args(arguments)
    if not (asked.folder / "full-c").exists():
        fill(asked.folder, asked.layers, asked.r)
    failed = False
    for method in asked.methods.split(","):
        cpu: dict[str, list[float]] = {"adapters": [], "full": []}
        files = recipes(asked.folder, method)
        for _ in range(asked.runs):
            for kind, recipe in files.items():
                merge = [sys.executable, "-m", "mowmerge", "merge", str(recipe)]
                out = [str(asked.folder / f"out-{kind}"), "--force", "--no-hash", "--quiet"]
                sample = measure([*merge, *out, "--workers", "1"], asked.folder / "log")
                cpu[kind].append(sample.cpu)
        first, second = (written(asked.folder / f"out-{kind}") for kind in cpu)
        ours, theirs = (median(cpu[kind]) for kind in ("adapters", "full"))
        ok = ours <= MOST * theirs and first == second
        failed = failed or not ok
        print(
            f"{method}: {ours:.1f} s of CPU from adapters, {theirs:.1f} s from full checkpoints,"
            f" {ours / theirs:.2f} times (at most {MOST}); same bytes: {first == second}:"
            f" {'ok' if ok else 'FAILED'}"
        )
    sys.exit(failed)


def written(folder: Path) -> bytes:
    """All weight files of a folder."""
    return b"".join(p.read_bytes() for p in sorted(folder.glob("*.safetensors")))


if __name__ == "__main__":
    main()
