"""Checkpoints with tokenizers: tiny models whose rows say which token they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo import Tensors, Zoo

from mowmerge.engine import Engine
from mowmerge.plan import Plan
from mowmerge.tensors import DTYPES

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def words(vocab: Mapping[str, int], added: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A tokenizer.json of whole words."""
    model = {"type": "WordLevel", "vocab": dict(vocab), "unk_token": "<unk>"}
    return tokenizer(model, added, pre_tokenizer={"type": "WhitespaceSplit"})


def tokenizer(
    model: Mapping[str, Any], added: Mapping[str, int] | None = None, **parts: Any
) -> dict[str, Any]:
    """A tokenizer.json around a model."""
    tokens = [{"id": i, "content": t, **PLAIN, "special": True} for t, i in (added or {}).items()]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    rest = dict.fromkeys(("post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": tokens, **empty, **rest, **parts, "model": model}


def save(zoo: Zoo, name: str, said: Mapping[str, Any], tensors: Tensors, **config: Any) -> Path:
    """A checkpoint of these tensors with this tokenizer and no other file of one."""
    rows = len(next(value for key, value in tensors.items() if "embed" in key or "wte" in key))
    settings = {"model_type": "llama", "dtype": "float32", "vocab_size": rows, **config}
    folder = zoo.save(name, tensors, config=settings)
    for file in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        (folder / file).unlink()
    (folder / "tokenizer.json").write_text(json.dumps(said), "utf-8")
    return folder


def rows(*values: float, width: int = 2, tied: bool = False) -> Tensors:
    """An embedding whose rows are these numbers, repeated, and a head of a hundred times those."""
    embed = torch.tensor(values, dtype=torch.float32).unsqueeze(1).repeat(1, width)
    return {EMBED: embed} if tied else {EMBED: embed, HEAD: 100 * embed}


def view(plan: Plan, model: str, name: str = EMBED) -> Tensor:
    """A model's tensor as the merge reads it."""
    reader = Engine(plan).readers[model]
    spec = reader.specs[name]
    value = torch.empty(spec.shape, dtype=DTYPES[spec.dtype].torch)
    with closing(reader.open(name)) as handle:
        handle.read(0, spec.numel, value.view(-1).view(torch.uint8).numpy().data)
    return value


def firsts(value: Tensor) -> list[float]:
    """The first number of each row."""
    return [float(number) for number in value.reshape(len(value), -1)[:, 0]]


def written(folder: Path) -> dict[str, int]:
    """The ids of the tokenizer.json in a folder, as the library that loads it has them."""
    from tokenizers import Tokenizer

    found: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return found


def listed(vocab: Sequence[str]) -> dict[str, int]:
    """Tokens with the ids 0, 1, 2 ..."""
    return {token: i for i, token in enumerate(vocab)}
