"""Tiny models of real architectures, LoRA adapters on them, and what peft makes of the two."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("peft")


@contextmanager
def quiet() -> Iterator[None]:
    """peft and transformers warn of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama(**settings: Any) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1,
            **{"tie_word_embeddings": False, **settings},
        )
    )  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    )


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=4, num_labels=3,
        )
    )  # fmt: skip


def gpt_oss() -> Any:
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
            num_experts_per_tok=2, tie_word_embeddings=False,
        )
    )  # fmt: skip


def qwen2_moe() -> Any:
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
            shared_expert_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
        )
    )  # fmt: skip


def bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)
    )


def falcon() -> Any:
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    )


MODELS = {
    "llama": llama, "gpt2": gpt2, "vit": vit, "gpt_oss": gpt_oss, "qwen2_moe": qwen2_moe,
    "bloom": bloom, "falcon": falcon,
}  # fmt: skip


def save(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A model of random weights."""
    torch.manual_seed(0)
    with quiet():
        model = MODELS[kind](**settings).to(dtype)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    return folder


def held(base: Path) -> Any:
    """The model in a folder, in its own dtype."""
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    with quiet():
        return getattr(transformers, name).from_pretrained(base, dtype="auto")


def adapt(base: Path, out: Path, seed: int = 1, **settings: Any) -> Path:
    """A LoRA of random factors on it."""
    torch.manual_seed(seed)
    asked = {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj"], **settings}
    with quiet():
        model = library.get_peft_model(held(base), library.LoraConfig(**asked))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(out)
    return out


def merged(base: Path, adapters: Sequence[Path], out: Path) -> dict[str, Tensor]:
    """What peft's merge_and_unload makes of them, as saved."""
    with quiet():
        names = [f"a{i}" for i in range(len(adapters))]
        model = library.PeftModel.from_pretrained(held(base), adapters[0], adapter_name=names[0])
        for name, adapter in list(zip(names, adapters, strict=True))[1:]:
            model.load_adapter(adapter, adapter_name=name)
        if len(adapters) > 1:
            model.base_model.set_adapter(names)
        model.merge_and_unload(adapter_names=names).save_pretrained(out)
    return load_file(out / "model.safetensors")
