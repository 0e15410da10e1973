"""fp8 output as transformers reads it: loaded and taken apart on the CPU, and what a GPU expects.

transformers computes in fp8 on GPUs only, by kernels from the Hub: that is not run here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zoo import Zoo

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **more}))


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, head_dim=64
    )
    return transformers.Qwen3MoeForCausalLM(config)


def deepseek() -> Any:
    heads = {"qk_rope_head_dim": 128, "qk_nope_head_dim": 64, "v_head_dim": 64}
    config = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, **heads, moe_intermediate_size=128,
        first_k_dense_replace=1, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, q_lora_rank=128, kv_lora_rank=128, n_shared_experts=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


MODELS: dict[str, Callable[..., Any]] = {
    "llama": llama, "qwen3_moe": qwen3_moe, "deepseek_v3": deepseek,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def written(zoo: Zoo, model: Any) -> Any:
    """The model in bf16, merged into fp8; its folder."""
    model.to(torch.bfloat16).save_pretrained(zoo.folder / "m")
    recipe = {"models": {"m": "./m"}, "method": "passthrough", "output": {"dtype": "fp8"}}
    zoo.merge(recipe, "fp8")
    return zoo.folder / "fp8"


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_takes_apart_what_was_written_as_this_tool_does(zoo: Zoo, kind: str) -> None:
    """Each weight to the bit, so the logits too; they are near those of the model in bf16."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    out = written(zoo, model)
    zoo.merge({"models": {"m": "./fp8"}, "method": "passthrough"}, "back")
    with torch.inference_mode():
        theirs, info = type(model).from_pretrained(out, output_loading_info=True)
        ours = type(model).from_pretrained(zoo.folder / "back")
        assert not any(info.values()), info
        assert theirs.state_dict().keys() == ours.state_dict().keys()
        for name, value in ours.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], value), name
        tokens = torch.arange(24)[None]
        got, want, exact = (m.eval()(tokens).logits.float() for m in (theirs, ours, model))
    assert torch.equal(got, want)
    assert float((got - exact).norm() / exact.norm()) < 0.15
    assert not torch.equal(got, exact)


def test_layers_stacked_beyond_the_donor_s_are_in_fp8_too(zoo: Zoo) -> None:
    """Of a model in fp8, by slices and by a nested recipe of them, as transformers reads it."""
    torch.manual_seed(0)
    out = written(zoo, llama())
    slices = {"models": {"m": f"./{out.name}"}, "method": "passthrough",
              "slices": [{"layers": "0..1"}, {"layers": 1}, {"layers": "0..1"}]}  # fmt: skip
    zoo.merge({**slices, "output": {"dtype": "fp8"}}, "deep")
    nested = {"models": {"m": {"source": slices}}, "method": "passthrough"}
    zoo.merge({**nested, "output": {"dtype": "fp8"}}, "nested")
    zoo.merge(slices, "wide")
    deep, again = (
        load_file(zoo.folder / name / "model.safetensors") for name in ("deep", "nested")
    )
    assert deep.keys() == again.keys()
    for i in range(5):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        assert deep[name].dtype == torch.float8_e4m3fn
        assert torch.equal(deep[name].view(torch.uint8), again[name].view(torch.uint8))
        assert f"{name}_scale_inv" in deep
    kind = type(llama())
    with torch.inference_mode():
        theirs, info = kind.from_pretrained(zoo.folder / "deep", output_loading_info=True)
        assert not any(info.values()), info
        wide = kind.from_pretrained(zoo.folder / "wide")
        tokens = torch.arange(24)[None]
        got, want = (m.eval()(tokens).logits.float() for m in (theirs, wide))
    assert float((got - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize(
    "sizes", [{}, {"hidden_size": 192, "intermediate_size": 320}], ids=["whole", "cut"]
)
def test_names_and_shapes_are_those_of_its_fp8_modules(zoo: Zoo, sizes: dict[str, int]) -> None:
    """Of blocks that the sides of a matrix cut off, too."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
    from transformers.utils.quantization_config import FineGrainedFP8Config

    model = llama(**sizes)
    out = written(zoo, model)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    config = FineGrainedFP8Config.from_dict(settings)
    assert (config.weight_block_size, config.activation_scheme) == ([128, 128], "dynamic")
    with torch.device("meta"):
        expected = replace_with_fp8_linear(
            type(model)(model.config), config.modules_to_not_convert, config, pre_quantized=True
        )
    want = {name: list(value.shape) for name, value in expected.state_dict().items()}
    held = load_file(out / "model.safetensors")
    assert {name: list(value.shape) for name, value in held.items()} == want
    fp8 = {name for name, value in held.items() if value.dtype == torch.float8_e4m3fn}
    assert fp8 == {
        name for name, value in expected.state_dict().items() if value.dtype == torch.float8_e4m3fn
    }
    assert all(held[f"{name}_scale_inv"].dtype == torch.float32 for name in fp8)
