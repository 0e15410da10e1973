"""Roles, layers and depths of the tensor names of fourteen families, and what is tied to what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mowmerge.checkpoint.naming import by_token, depths, role, stack, tied_to
from mowmerge.tensors import TensorSpec

FAMILIES: dict[str, dict[str, str]] = {
    "llama": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.3.self_attn.q_proj.weight": "attention",
        "model.layers.3.self_attn.o_proj.weight": "attention",
        "model.layers.3.mlp.gate_proj.weight": "mlp",
        "model.layers.3.mlp.down_proj.weight": "mlp",
        "model.layers.3.input_layernorm.weight": "norm",
        "model.layers.3.post_attention_layernorm.weight": "norm",
        "model.norm.weight": "norm",
        "lm_head.weight": "head",
    },
    "qwen2": {
        "model.layers.11.self_attn.q_proj.bias": "attention",
        "model.layers.11.mlp.up_proj.weight": "mlp",
    },
    "qwen2_moe": {
        "model.layers.0.mlp.gate.weight": "router",
        "model.layers.0.mlp.shared_expert_gate.weight": "router",
        "model.layers.0.mlp.experts.17.gate_proj.weight": "mlp",
        "model.layers.0.mlp.shared_expert.up_proj.weight": "mlp",
    },
    "qwen3": {"model.layers.0.self_attn.q_norm.weight": "norm"},
    "gemma2": {
        "model.layers.0.pre_feedforward_layernorm.weight": "norm",
        "model.layers.0.post_feedforward_layernorm.weight": "norm",
        "model.layers.0.mlp.gate_proj.weight": "mlp",
    },
    "mixtral": {
        "model.layers.2.block_sparse_moe.gate.weight": "router",
        "model.layers.2.block_sparse_moe.experts.7.w1.weight": "mlp",
        "model.layers.2.block_sparse_moe.experts.7.w2.weight": "mlp",
        "model.layers.2.self_attn.k_proj.weight": "attention",
    },
    "gpt2": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "embedding",
        "transformer.h.5.attn.c_attn.weight": "attention",
        "transformer.h.5.attn.c_proj.bias": "attention",
        "transformer.h.5.mlp.c_fc.weight": "mlp",
        "transformer.h.5.mlp.c_proj.weight": "mlp",
        "transformer.h.5.ln_1.weight": "norm",
        "transformer.ln_f.bias": "norm",
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight": "embedding",
        "bert.embeddings.LayerNorm.weight": "norm",
        "bert.encoder.layer.1.attention.self.query.weight": "attention",
        "bert.encoder.layer.1.attention.output.dense.weight": "attention",
        "bert.encoder.layer.1.attention.output.LayerNorm.weight": "norm",
        "bert.encoder.layer.1.intermediate.dense.weight": "mlp",
        "bert.encoder.layer.1.output.dense.bias": "mlp",
        "bert.encoder.layer.1.output.LayerNorm.bias": "norm",
        "bert.pooler.dense.weight": "other",
        "cls.predictions.bias": "head",
        "classifier.weight": "head",
    },
    "t5": {
        "shared.weight": "embedding",
        "encoder.block.0.layer.0.SelfAttention.q.weight": "attention",
        "encoder.block.0.layer.0.layer_norm.weight": "norm",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": "mlp",
        "decoder.block.3.layer.1.EncDecAttention.v.weight": "attention",
        "decoder.final_layer_norm.weight": "norm",
        "lm_head.weight": "head",
    },
    "vit": {
        "vit.embeddings.cls_token": "embedding",
        "vit.embeddings.patch_embeddings.projection.weight": "embedding",
        "vit.encoder.layer.0.attention.attention.query.weight": "attention",
        "vit.encoder.layer.0.intermediate.dense.weight": "mlp",
        "vit.encoder.layer.0.layernorm_before.weight": "norm",
        "vit.layernorm.weight": "norm",
        "classifier.bias": "head",
    },
    "clip": {
        "text_model.embeddings.token_embedding.weight": "embedding",
        "text_model.encoder.layers.0.self_attn.k_proj.weight": "attention",
        "text_model.encoder.layers.0.mlp.fc1.weight": "mlp",
        "text_model.encoder.layers.0.layer_norm1.weight": "norm",
        "text_model.final_layer_norm.weight": "norm",
        "vision_model.embeddings.class_embedding": "embedding",
        "vision_model.pre_layrnorm.weight": "norm",
        "visual_projection.weight": "other",
        "text_projection.weight": "head",
        "logit_scale": "other",
    },
    "whisper": {
        "model.encoder.conv1.weight": "other",
        "model.encoder.embed_positions.weight": "embedding",
        "model.encoder.layers.0.self_attn.v_proj.weight": "attention",
        "model.encoder.layers.0.self_attn_layer_norm.weight": "norm",
        "model.encoder.layers.0.fc1.weight": "mlp",
        "model.decoder.layers.1.encoder_attn.out_proj.weight": "attention",
        "model.decoder.layers.1.final_layer_norm.weight": "norm",
        "proj_out.weight": "head",
    },
    "gpt_neox": {
        "gpt_neox.embed_in.weight": "embedding",
        "gpt_neox.layers.0.attention.query_key_value.weight": "attention",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "mlp",
        "embed_out.weight": "head",
    },
    "bart": {
        "model.shared.weight": "embedding",
        "classification_head.dense.weight": "head",
        "classification_head.out_proj.weight": "head",
    },
    "distilbert": {
        "distilbert.transformer.layer.0.attention.q_lin.weight": "attention",
        "distilbert.transformer.layer.0.ffn.lin1.weight": "mlp",
        "distilbert.transformer.layer.0.sa_layer_norm.weight": "norm",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles(family: str) -> None:
    names = FAMILIES[family]
    assert {name: role(name) for name in names} == names


def test_stacks_and_layers() -> None:
    assert stack("model.layers.11.mlp.up_proj.weight") == ("model.layers.", 11)
    assert stack("encoder.block.3.layer.1.DenseReluDense.wi.weight") == ("encoder.block.", 3)
    experts = "model.layers.2.block_sparse_moe.experts.7.w1.weight"
    assert stack(experts) == ("model.layers.", 2)
    assert stack("model.embed_tokens.weight") is None
    assert stack("transformer.h.0.ln_1.weight") == ("transformer.h.", 0)
    assert stack("model.encoder.conv1.weight") is None


def test_depth_is_relative_to_the_stack() -> None:
    names = [
        "model.embed_tokens.weight", *(f"model.layers.{i}.mlp.w1.weight" for i in range(5)),
        "model.norm.weight", "lm_head.weight",
    ]  # fmt: skip
    assert list(depths(names).values()) == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_two_stacks_have_depths_of_their_own() -> None:
    encoder = [f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(2)]
    decoder = [f"decoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(3)]
    found = depths(["shared.weight", *encoder, *decoder, "lm_head.weight"])
    assert list(found.values()) == [0.0, 0.0, 1.0, 0.0, 0.5, 1.0, 1.0]


def test_depths_outside_the_layers() -> None:
    for name in (
        "transformer.wpe.weight", "vit.embeddings.cls_token", "model.encoder.conv1.weight",
        "vision_model.pre_layrnorm.weight", "bert.embeddings.LayerNorm.weight", "shared.weight",
    ):  # fmt: skip
        assert depths([name])[name] == 0.0, name
    for name in (
        "transformer.ln_f.weight", "vit.layernorm.weight", "classifier.weight", "logit_scale",
        "bert.pooler.dense.weight", "model.norm.weight", "visual_projection.weight",
    ):  # fmt: skip
        assert depths([name])[name] == 1.0, name


def test_the_only_layer_of_a_stack_has_depth_zero() -> None:
    assert depths(["h.0.mlp.weight", "h.0.attn.weight"]) == {
        "h.0.mlp.weight": 0.0, "h.0.attn.weight": 0.0
    }  # fmt: skip


def specs(*names: str) -> Mapping[str, TensorSpec]:
    return {name: TensorSpec(name, "F32", (2, 3)) for name in names}


@pytest.mark.parametrize(("name", "source"), [
    ("lm_head.weight", "model.embed_tokens.weight"), ("lm_head.weight", "transformer.wte.weight"),
    ("lm_head.weight", "shared.weight"), ("model.lm_head.weight", "model.embed_tokens.weight"),
    ("proj_out.weight", "model.decoder.embed_tokens.weight"),
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("encoder.embed_tokens.weight", "shared.weight"),
    ("embed_out.weight", "gpt_neox.embed_in.weight"),
    ("lm_head.weight", "transformer.word_embeddings.weight"),
    ("lm_head.weight", "backbone.embeddings.weight"),
    ("lm_head.weight", "transformer.tokens_embed.weight"),
    ("lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"),
    ("decoder.weight", "model.embeddings.tok_embeddings.weight"),
    ("predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),
    ("predictions.decoder.bias", "predictions.bias"),
    ("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
    ("lm_loss.weight", "transformer.word_embedding.weight"),
])  # fmt: skip
def test_tied_to(name: str, source: str) -> None:
    held = specs("a.b.weight", source)
    assert tied_to(name, held) == held[source]
    assert tied_to(name, specs(name, source)) == held[source]
    assert tied_to(name, specs("a.b.weight")) is None
    assert tied_to("a.b.weight", held) is None


MODELS = {
    "LlamaForCausalLM": "LlamaConfig", "Qwen2ForCausalLM": "Qwen2Config",
    "Gemma2ForCausalLM": "Gemma2Config", "MixtralForCausalLM": "MixtralConfig",
    "GPT2LMHeadModel": "GPT2Config", "BertForMaskedLM": "BertConfig",
    "T5ForConditionalGeneration": "T5Config", "ViTForImageClassification": "ViTConfig",
    "CLIPModel": "CLIPConfig", "WhisperForConditionalGeneration": "WhisperConfig",
    "Qwen2MoeForCausalLM": "Qwen2MoeConfig", "Olmo2ForCausalLM": "Olmo2Config",
    "RobertaForSequenceClassification": "RobertaConfig", "GPTNeoXForCausalLM": "GPTNeoXConfig",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_class", MODELS)
def test_the_names_of_real_models(model_class: str) -> None:
    import torch
    import transformers as hf

    config: Any = getattr(hf, MODELS[model_class])()
    for part in (config, *(getattr(config, f"{k}_config", None) for k in ("text", "vision"))):
        for key in (
            "num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers",
            "decoder_layers",
        ):  # fmt: skip
            if part is not None and hasattr(part, key):
                setattr(part, key, 3)
    with torch.device("meta"):
        model = getattr(hf, model_class)(config)
    names = list(model.state_dict())
    roles = {name: role(name) for name in names}
    assert {"attention", "norm", "embedding", "mlp"} <= set(roles.values())
    for name, found in roles.items():
        low = name.lower()
        if "attn" in low.rpartition(".")[0] and "norm" not in low:
            assert found == "attention", name
        if ".mlp.experts" in low or low.endswith(("up_proj.weight", "down_proj.weight")):
            assert found == "mlp", name
        if "norm" in low:
            assert found == "norm", name
    in_layers = [name for name in names if stack(name)]
    assert len(in_layers) > len(names) / 2
    assert all(0 <= d <= 1 for d in depths(names).values())
    assert {depths(names)[n] for n in in_layers} == {0.0, 0.5, 1.0}


@pytest.mark.parametrize(("name", "fits"), [
    ("model.embed_tokens.weight", True), ("transformer.wte.weight", True),
    ("shared.weight", True), ("bert.embeddings.word_embeddings.weight", True),
    ("text_model.embeddings.token_embedding.weight", True), ("lm_head.weight", True),
    ("lm_head.bias", True), ("cls.predictions.bias", True), ("embed_out.weight", True),
    ("cls.predictions.decoder.weight", True), ("vocab_projector.bias", True),
    ("proj_out.weight", True), ("final_logits_bias", True), ("generator_lm_head.weight", True),
    ("transformer.wpe.weight", False), ("model.embed_positions.weight", False),
    ("bert.embeddings.position_embeddings.weight", False), ("cls.seq_relationship.weight", False),
    ("bert.embeddings.token_type_embeddings.weight", False), ("score.weight", False),
    ("cls.predictions.transform.dense.weight", False), ("lm_head.layer_norm.weight", False),
    ("vision_model.embeddings.patch_embedding.weight", False), ("classifier.weight", False),
    ("model.layers.0.mlp.up_proj.weight", False), ("model.norm.weight", False),
    ("text_projection.weight", False), ("classification_head.dense.weight", False),
])  # fmt: skip
def test_what_may_have_a_row_for_each_token(name: str, fits: bool) -> None:
    assert by_token(name) == fits
