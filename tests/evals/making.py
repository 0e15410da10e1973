"""Tiny language and CLIP models with tokenizers of their own, data files, and recipes over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

WORDS = ["the", "cat", "dog", "hen", "sat", "ran", "on", "a", "mat", "and", "then", "of", "photo"]
LM: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "vocab_size": 64,
}  # fmt: skip


def tokenizer(folder: Path) -> None:
    """Words, one token each; what is unknown is spelled out letter by letter as one token <unk>."""
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS, ".", "|"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", model_max_length=64,
        chat_template="{% for m in messages %}| {{ m.content }} {% endfor %}the",
    ).save_pretrained(folder)  # fmt: skip


def lms(folder: Path, *names: str) -> None:
    """A base and experts a little away from it."""
    for i, name in enumerate(("base", *names)):
        torch.manual_seed(0)
        config = LlamaConfig(**LM, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model = LlamaForCausalLM(config)
        torch.manual_seed(i)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * (0.3 if value.dim() > 1 else 0.0))
        model.save_pretrained(folder / name)
        tokenizer(folder / name)


def clips(folder: Path, *names: str) -> None:
    """A whole CLIP, and experts of its vision tower; `tower` is the base of these."""
    text = {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    vision = {"image_size": 8, "patch_size": 4, "projection_dim": 8}
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    whole = CLIPModel(
        CLIPConfig(text_config=text | sizes, vision_config=vision | sizes, projection_dim=8)
    ).eval()
    whole.save_pretrained(folder / "clip")
    tower = CLIPVisionModelWithProjection(whole.config.vision_config)
    tower.load_state_dict(whole.state_dict(), strict=False)
    for i, name in enumerate(("tower", *names)):
        torch.manual_seed(i)
        with torch.no_grad():
            for value in tower.parameters() if i else ():
                value.add_(torch.randn_like(value) * 0.02)
        tower.save_pretrained(folder / name)
    for name in ("clip", "tower", *names):
        tokenizer(folder / name)
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / name)


def rows(file: Path, *held: dict[str, Any]) -> dict[str, Any]:
    """A file of JSON lines, as a task's `data` names it."""
    file.write_text("".join(json.dumps(row) + "\n" for row in held))
    return {"path": "json", "data_files": {"test": f"./{file.name}"}}


def recipe(folder: Path, base: str, experts: list[str], tasks: dict[str, Any], **more: Any) -> Path:
    """A recipe that merges the experts by task arithmetic, with these tasks."""
    content = {
        "version": 1, "base": f"./{base}", "models": {name: f"./{name}" for name in experts},
        "method": "task_arithmetic", "parameters": {"scale": 0.5},
        "tasks": {n: {"splits": {"eval": "test"}} | t for n, t in tasks.items()},
    } | more  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))
    return file
