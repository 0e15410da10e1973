"""Any transformers architecture: merged, loaded with every key in its place, names as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from zoo import Zoo

from mowmerge import api
from mowmerge.checkpoint import naming
from mowmerge.methods import registry

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
LM: dict[str, Any] = {
    **SMALL, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
PIXELS = {"pixel_values": torch.ones(1, 3, 8, 8)}
VISION: dict[str, Any] = {**SMALL, "image_size": 8, "patch_size": 4}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LM)), IDS),
    "llama-tied": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LM, tie_word_embeddings=True)), IDS,
    ),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LM)), IDS),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LM, head_dim=4)), IDS),
    "qwen3-moe": (
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **LM, head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12
            )
        ),
        IDS,
    ),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**LM, head_dim=4)), IDS),
    "gemma3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LM, head_dim=4)), IDS),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**LM)), IDS),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**LM, num_local_experts=4, num_experts_per_tok=2)
        ),
        IDS,
    ),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**LM)), IDS),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=32, bos_token_id=1,
                eos_token_id=2,
            )
        ),
        IDS,
    ),
    "gpt-neox": (
        lambda: hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(**SMALL, vocab_size=40, bos_token_id=1, eos_token_id=2)
        ),
        IDS,
    ),
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, vocab_size=40)), IDS),
    "roberta": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL, vocab_size=40)), IDS,
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                d_model=16, d_ff=24, d_kv=4, num_layers=2, num_heads=4, vocab_size=40,
                decoder_start_token_id=0,
            )
        ),
        {**IDS, "decoder_input_ids": torch.tensor([[0, 3]])},
    ),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), PIXELS),
    "clip": (
        lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**SMALL, "vocab_size": 40, "eos_token_id": 2, "bos_token_id": 1},
                vision_config=VISION, projection_dim=8,
            )
        ),
        {**IDS, **PIXELS},
    ),
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40,
                num_mel_bins=8, max_source_positions=16, max_target_positions=16, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )
        ),
        {"input_features": torch.ones(1, 8, 32), "decoder_input_ids": torch.tensor([[1, 3]])},
    ),
    "llava": (
        lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**LM),
                image_token_id=39, vision_feature_layer=-1,
            )
        ),
        {"input_ids": torch.tensor([[3, 39, 39, 39, 39, 5]]), **PIXELS},
    ),
    "qwen2-vl": (
        lambda: hf.Qwen2VLForConditionalGeneration(
            hf.Qwen2VLConfig(
                text_config={
                    **LM, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0],
                                              "rope_theta": 1e4},
                },
                vision_config={
                    "depth": 2, "embed_dim": 16, "num_heads": 4, "hidden_size": 16, "patch_size": 4,
                },
                image_token_id=37, video_token_id=38, vision_start_token_id=36,
            )
        ),
        IDS,
    ),
    "dinov2": (
        lambda: hf.Dinov2Model(
            hf.Dinov2Config(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=8,
                patch_size=4,
            )
        ),
        PIXELS,
    ),
    "mamba": (
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=40)
        ),
        IDS,
    ),
}  # fmt: skip


def family(folder: Path, make: Callable[[], Any]) -> Any:
    """A base and two experts a little away from it; the model's class."""
    for i, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = make().eval()
        torch.manual_seed(i)
        with torch.no_grad():
            for value in model.parameters() if i else ():
                value.add_(torch.randn_like(value) * 0.02)
        model.save_pretrained(folder / name)
    return type(model)


def names(folder: Path) -> dict[str, list[int]]:
    """What a checkpoint's files hold: shapes by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            found |= {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118
    return found


def check(folder: Path, cls: Any, given: dict[str, Any]) -> None:
    """It loads with every key in its place, and gives finite numbers."""
    model, told = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    assert names(folder) == names(folder.parent / "base")
    with torch.inference_mode():
        said = model.eval()(**given)
    value = next(iter(v for k, v in said.items() if k.startswith(("logits", "last_hidden"))))
    assert torch.isfinite(value).all()


@pytest.mark.parametrize("name", MODELS)
def test_merges_and_loads(zoo: Zoo, name: str) -> None:
    make, given = MODELS[name]
    cls = family(zoo.folder, make)
    _, report = zoo.merge({"method": "ties", "parameters": {"density": 0.5}})
    check(zoo.folder / "out", cls, given)
    assert {t["action"] for t in report["tensors"] if "weight" in t["name"]} == {"merged"}
    settings = [json.loads((zoo.folder / n / "config.json").read_text()) for n in ("base", "out")]
    assert settings[0] == settings[1]


WHOLE = ["mixtral", "llava"]  # grouped queries, experts and routers; a vision tower and a projector


@pytest.mark.parametrize("method", sorted(
    m for m in registry.names() if registry.get(m).family == "static"
))  # fmt: skip
@pytest.mark.parametrize("name", WHOLE)
def test_every_method_merges_experts_and_towers(zoo: Zoo, name: str, method: str) -> None:
    make, given = MODELS[name]
    cls = family(zoo.folder, make)
    spec = registry.get(method)
    if spec.needs_factors(spec.complete({})):
        pytest.skip("for adapters alone")
    models = ["a", "b", "base"][: spec.count or 2]
    content = {"models": {m: f"./{m}" for m in models}, "method": method}
    api.merge(zoo.recipe({**content, "base": "./base"}), zoo.folder / "out", hashes=False)
    check(zoo.folder / "out", cls, given)


def test_roles_of_what_is_no_plain_decoder(zoo: Zoo) -> None:
    family(zoo.folder, MODELS["mixtral"][0])
    roles = {name: naming.role(name) for name in names(zoo.folder / "base")}
    of = {r: [n for n, found in roles.items() if found == r] for r in set(roles.values())}
    assert len(of["router"]) == 2 and all(n.endswith("gate.weight") for n in of["router"])
    assert len(of["mlp"]) == 2 * 4 * 3 and all("experts" in n for n in of["mlp"])
    assert len(of["attention"]) == 2 * 4 and of["head"] == ["lm_head.weight"]
