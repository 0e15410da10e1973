"""Writes a synthetic llama-shaped family: a base and experts a small delta away, bf16, sharded.

    python -m tests.bench.family DIR [--layers 16] [--experts 3] [--scale full|small]

`full` with 16 layers has Llama-3.2-1B's shapes: 1.24 B parameters, 2.5 GB a model.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from mowmerge.tensors import TensorSpec

BLOCK = 1 << 22  # elements drawn at a time


@dataclass(frozen=True)
class Llama:
    """The shape of a llama checkpoint; the defaults are Llama-3.2-1B's."""

    hidden: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 8192
    vocab: int = 128256
    tied: bool = True
    shard_bytes: int = 10**9

    @property
    def specs(self) -> list[TensorSpec]:
        """Every tensor, in the model's own order."""
        h, wide, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        layer = {
            "input_layernorm": (h,),
            "mlp.down_proj": (h, wide),
            "mlp.gate_proj": (wide, h),
            "mlp.up_proj": (wide, h),
            "post_attention_layernorm": (h,),
            "self_attn.k_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "self_attn.q_proj": (h, h),
            "self_attn.v_proj": (kv, h),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocab, h)}
        for i in range(self.layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm"] = (h,)
        if not self.tied:
            shapes["lm_head"] = (self.vocab, h)
        return [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]

    @property
    def shards(self) -> dict[str, list[TensorSpec]]:
        """Tensors by file, filled in order up to `shard_bytes`."""
        filled: list[list[TensorSpec]] = []
        room = 0
        for spec in self.specs:
            if spec.nbytes > room:
                filled.append([])
                room = self.shard_bytes
            filled[-1].append(spec)
            room -= spec.nbytes
        n = len(filled)
        return {f"model-{i:05d}-of-{n:05d}.safetensors": s for i, s in enumerate(filled, 1)}

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }


FULL = Llama()
SMALL = Llama(
    hidden=256, layers=2, heads=8, kv_heads=4, intermediate=704, vocab=2048, shard_bytes=2_000_000
)


def header(specs: Sequence[TensorSpec]) -> bytes:
    """A shard's first bytes: length and JSON, padded to 8, tensors in the order given."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def describe(folder: Path, shape: Llama) -> None:
    """Writes the index and, last, config.json: a folder that has it is complete."""
    shards = shape.shards
    index = {
        "metadata": {"total_size": sum(s.nbytes for s in shape.specs)},
        "weight_map": {s.name: file for file, specs in shards.items() for s in specs},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(shape.config, indent=1))


def complete(folder: Path, shape: Llama) -> bool:
    """Whether the folder holds a finished checkpoint of this shape."""
    config = folder / "config.json"
    if not config.is_file() or json.loads(config.read_text()) != shape.config:
        return False
    sizes = {f: len(header(s)) + sum(t.nbytes for t in s) for f, s in shape.shards.items()}
    return all(
        (folder / f).is_file() and (folder / f).stat().st_size == n for f, n in sizes.items()
    )


def _values(spec: TensorSpec, experts: int, key: Sequence[int]) -> Iterator[list[memoryview]]:
    """The base's bytes and each expert's, block by block."""
    import numpy as np
    import torch

    draw = np.random.Generator(np.random.SFC64(list(key)))
    block = min(BLOCK, spec.numel)
    base, delta = torch.empty(block), torch.empty(block)
    out = torch.empty(block, dtype=torch.bfloat16)
    is_norm = len(spec.shape) == 1
    spreads = [5e-4 * (1 + i / 8) * (0.5 + draw.random()) for i in range(experts)]  # 1-5 %
    for start in range(0, spec.numel, block):
        n = min(block, spec.numel - start)

        def rounded(values: torch.Tensor, n: int = n) -> memoryview:
            out[:n].copy_(values[:n])
            return memoryview(out[:n].view(torch.uint8).numpy().tobytes())

        draw.standard_normal(n, dtype=np.float32, out=base[:n].numpy())
        base[:n].mul_(0.02).add_(1.0 if is_norm else 0.0)
        made = [rounded(base)]
        for spread in spreads:
            draw.standard_normal(n, dtype=np.float32, out=delta[:n].numpy())
            made.append(rounded(delta[:n].mul_(spread).add_(base[:n])))
        yield made


def write_family(folder: Path, shape: Llama, experts: int = 3, seed: int = 0) -> list[Path]:
    """Writes base and expert-1..n in one pass over the tensors; returns their folders."""
    folders = [folder / "base", *(folder / f"expert-{i}" for i in range(1, experts + 1))]
    if all(complete(f, shape) for f in folders):
        return folders
    for f in folders:
        f.mkdir(parents=True, exist_ok=True)
        for old in [f / "config.json", *f.glob("model-*.safetensors")]:
            old.unlink(missing_ok=True)
    count = 0
    for name, specs in shape.shards.items():
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(open(f / name, "wb")) for f in folders]
            for file in files:
                file.write(header(specs))
            for spec in specs:
                for blocks in _values(spec, experts, (seed, count)):
                    for file, block in zip(files, blocks, strict=True):
                        file.write(block)
                count += 1
    for f in folders:
        describe(f, shape)
    return folders


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a synthetic llama-shaped family.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--scale", choices=["full", "small"], default="full")
    asked = parser.parse_args()
    chosen = FULL if asked.scale == "full" else SMALL
    if asked.layers:
        chosen = replace(chosen, layers=asked.layers)
    for made in write_family(asked.folder, chosen, asked.experts):
        size = sum(p.stat().st_size for p in made.iterdir())
        print(f"{made}  {size / 1e9:.2f} GB")
