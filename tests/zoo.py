"""Tiny checkpoints, recipes over them, and runs of the command line: what most tests start from."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mowmerge import api
from mowmerge.cli import main
from mowmerge.planner import Options

ROOT = Path(__file__).parents[1]
Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def llama(layers: int = 2, hidden: int = 16, vocab: int = 24, tied: bool = False) -> Shapes:
    """Names and shapes of a llama-shaped model with four heads and two for keys and values."""
    h, kv, wide = hidden, hidden // 2, 2 * hidden
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, h)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + "input_layernorm.weight": (h,), at + "self_attn.q_proj.weight": (h, h),
            at + "self_attn.k_proj.weight": (kv, h), at + "self_attn.v_proj.weight": (kv, h),
            at + "self_attn.o_proj.weight": (h, h), at + "post_attention_layernorm.weight": (h,),
            at + "mlp.gate_proj.weight": (wide, h), at + "mlp.up_proj.weight": (wide, h),
            at + "mlp.down_proj.weight": (h, wide),
        }  # fmt: skip
    shapes["model.norm.weight"] = (h,)
    return shapes if tied else shapes | {"lm_head.weight": (vocab, h)}


def bert(layers: int = 2, hidden: int = 16, vocab: int = 24, tied: bool = False) -> Shapes:
    """Names and shapes of a bert-shaped encoder; it has no head to tie."""
    h, shapes = hidden, Shapes()
    for name, rows in (("word", vocab), ("position", 8), ("token_type", 2)):
        shapes[f"embeddings.{name}_embeddings.weight"] = (rows, h)
    shapes |= {f"embeddings.LayerNorm.{part}": (h,) for part in ("weight", "bias")}
    for i in range(layers):
        at = f"encoder.layer.{i}."
        for name, rows, columns in (
            ("attention.self.query", h, h), ("attention.self.key", h, h),
            ("attention.self.value", h, h), ("attention.output.dense", h, h),
            ("intermediate.dense", 2 * h, h), ("output.dense", h, 2 * h),
        ):  # fmt: skip
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{at}{name}.weight": (h,), f"{at}{name}.bias": (h,)}
    return shapes | {"pooler.dense.weight": (h, h), "pooler.dense.bias": (h,)}


def gpt2(layers: int = 2, hidden: int = 16, vocab: int = 24, tied: bool = True) -> Shapes:
    """Names and shapes of a gpt2-shaped model, as it is saved: the head tied to wte."""
    h = hidden
    shapes: Shapes = {"transformer.wte.weight": (vocab, h), "transformer.wpe.weight": (8, h)}
    for i in range(layers):
        at = f"transformer.h.{i}."
        for name, rows, columns in (
            ("attn.c_attn", h, 3 * h), ("attn.c_proj", h, h),
            ("mlp.c_fc", h, 4 * h), ("mlp.c_proj", 4 * h, h),
        ):  # fmt: skip
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (columns,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{at}{name}.weight": (h,), f"{at}{name}.bias": (h,)}
    shapes |= {"transformer.ln_f.weight": (h,), "transformer.ln_f.bias": (h,)}
    return shapes if tied else shapes | {"lm_head.weight": (vocab, h)}


KINDS = {"llama": llama, "bert": bert, "gpt2": gpt2}


@dataclass(frozen=True)
class Ran:
    """What a command line left."""

    rc: int
    out: str
    err: str


@dataclass(frozen=True)
class Zoo:
    """A folder of models, recipes and outputs."""

    folder: Path

    def save(
        self, name: str, tensors: Mapping[str, Tensor], *, shards: int = 1, index: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> Path:  # fmt: skip
        """A checkpoint of these tensors with config, tokenizer, generation config and licence."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        held = {key: value.contiguous() for key, value in tensors.items()}
        files = ["model.safetensors"]
        if shards > 1:
            files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
        where = {key: files[i % shards] for i, key in enumerate(held)}
        for file in files:
            part = {key: value for key, value in held.items() if where[key] == file}
            save_file(part, folder / file, {"format": "pt"})
        if shards > 1 and index:
            total = sum(value.nbytes for value in held.values())
            listing = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
        dtype = str(next(iter(held.values())).dtype).removeprefix("torch.")
        settings = {"model_type": "llama", "dtype": dtype} if config is None else config
        for file, text in (
            ("config.json", json.dumps(settings, indent=2) + "\n"),
            ("generation_config.json", '{"eos_token_id": 2}\n'),
            ("tokenizer.json", '{"version": "1.0"}\n'),
            ("tokenizer_config.json", '{"model_max_length": 8}\n'),
            ("chat_template.jinja", "{{ messages }}\n"),
            ("LICENSE", "Apache-2.0\n"),
        ):
            (folder / file).write_text(text)
        return folder

    def family(
        self, kind: str | Shapes = "llama", n: int = 3, *, dtype: torch.dtype = torch.float32,
        shards: int = 1, tied: bool | None = None, seed: int = 0, step: float = 0.05,
    ) -> dict[str, Tensors]:  # fmt: skip
        """A base and n experts a step away, saved as base, a, b, c ...; their tensors."""
        draws = torch.Generator().manual_seed(seed)
        if isinstance(kind, str):
            kind = KINDS[kind](**({} if tied is None else {"tied": tied}))
        base = {name: torch.randn(shape, generator=draws) for name, shape in kind.items()}
        models = {"base": {name: value.to(dtype) for name, value in base.items()}}
        for expert in "abcdefgh"[:n]:
            models[expert] = {
                name: (value + step * torch.randn(value.shape, generator=draws)).to(dtype)
                for name, value in base.items()
            }
        for name, tensors in models.items():
            self.save(name, tensors, shards=shards)
        return models

    def recipe(self, content: str | Mapping[str, Any], name: str = "recipe") -> Path:
        """A recipe file; without `models` it takes the family that is there, base and all."""
        if not isinstance(content, str):
            filled = dict(content)
            if "models" not in filled:
                there = [p.name for p in sorted(self.folder.glob("?")) if p.is_dir()]
                filled["models"] = {each: f"./{each}" for each in there}
                filled.setdefault("base", "./base")
            content = json.dumps({k: v for k, v in filled.items() if v is not None}, indent=1)
        file = self.folder / f"{name}.yaml"
        file.write_text(content)
        return file

    def merge(
        self, content: str | Mapping[str, Any], out: str = "out", *, name: str = "recipe",
        hashes: bool = False, force: bool = False, **options: Any,
    ) -> tuple[Tensors, dict[str, Any]]:  # fmt: skip
        """Merges in this process; the output's tensors and the report."""
        result = api.merge(
            self.recipe(content, name), self.folder / out, options=Options(**options),
            hashes=hashes, force=force,
        )  # fmt: skip
        return load(result.path), result.report

    def here(self, *args: Any, stdin: str = "") -> Ran:
        """Runs the command line in this folder and in this process, where torch is loaded."""
        given, out, err = (io.StringIO(text) for text in (stdin, "", ""))
        before, sys.argv, sys.stdin = (sys.argv, sys.stdin), ["mowmerge", *map(str, args)], given
        with chdir(self.folder), redirect_stdout(out), redirect_stderr(err):
            try:
                main()
                rc: Any = 0
            except SystemExit as end:
                rc = end.code or 0
            finally:
                sys.argv, sys.stdin = before
        return Ran(rc, out.getvalue(), err.getvalue())

    def cli(self, *args: Any, stdin: str = "", **kwargs: Any) -> Ran:
        """Runs the command line in this folder."""
        command = [sys.executable, "-m", "mowmerge", *map(str, args)]
        return run(command, self.folder, stdin, **kwargs)

    def python(self, code: str, *args: Any, **kwargs: Any) -> Ran:
        """Runs a piece of Python in this folder."""
        return run([sys.executable, "-c", code, *map(str, args)], self.folder, "", **kwargs)


def run(
    command: Sequence[str], folder: Path, stdin: str = "", env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Ran:  # fmt: skip
    """Runs a command with the package importable; its exit code, stdout and stderr."""
    done = subprocess.run(
        command, cwd=folder, env=environment(**(env or {})), input=stdin, text=True,
        capture_output=True, timeout=120, **kwargs,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: this one's, with the package importable and plain output."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", **extra}


def load(folder: Path) -> Tensors:
    """Every tensor of every safetensors file of a folder."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def raw(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Each tensor's bytes."""
    return {
        name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in tensors.items()
    }


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any], data: bytes | None = None) -> None:
    """Changes a safetensors file's header, and its data where that is given."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    rest = content[8 + length :] if data is None else data
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def left(folder: Path) -> list[str]:
    """What a merge may have left beside its output: stages and replaced folders."""
    return sorted(p.name for p in folder.glob(".*.partial*")) + sorted(
        p.name for p in folder.glob(".*.replaced*")
    )
