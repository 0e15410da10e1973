"""Adapters that were trained with more tokens than their base, as peft saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import Zoo

from mowmerge.errors import CheckpointError
from tests.peft_models import library, llama, quiet, transformers
from tests.tokenized import EMBED, HEAD, listed, words

TOKENS = ["<unk>", *(f"w{i}" for i in range(39))]
MORE = {"more": ["x1", "x2"], "other": ["x2", "y1"]}


@pytest.fixture
def adapters(zoo: Zoo) -> dict[str, dict[str, torch.Tensor]]:
    """A base, two adapters with tokens of their own, and what peft makes of base and adapter."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(zoo.folder / "base")
    (zoo.folder / "base/tokenizer.json").write_text(json.dumps(words(listed(TOKENS))))
    merged = {}
    for name, new in MORE.items():
        merged[name] = trained(zoo.folder, name, [*TOKENS, *new])
    return merged


def trained(folder: Path, name: str, tokens: list[str]) -> dict[str, torch.Tensor]:
    with quiet():
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        model.resize_token_embeddings(len(tokens), mean_resizing=False)
        config = library.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"],
            task_type="CAUSAL_LM",
        )  # fmt: skip
        wrapped = library.get_peft_model(model, config)
        with torch.no_grad():
            for key, value in wrapped.named_parameters():
                if "lora_" in key or "modules_to_save" in key:
                    value.add_(torch.randn_like(value))
        wrapped.save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text(json.dumps(words(listed(tokens))))
        found: dict[str, torch.Tensor] = wrapped.merge_and_unload().state_dict()
        return found


def on_base(*names: str) -> dict[str, Any]:
    return {name: {"source": "base", "adapter": f"./{name}"} for name in names}


@pytest.mark.parametrize("name", MORE)
def test_an_adapter_s_vocabulary_is_that_of_its_folder(
    zoo: Zoo, adapters: dict[str, Any], name: str
) -> None:
    content = {"base": "./base", "models": on_base(name), "method": "linear"}
    found, _ = zoo.merge({**content, "vocabulary": {"source": name}})
    for key, value in found.items():
        torch.testing.assert_close(value, adapters[name][key])
    out = zoo.folder / "out"
    tokens = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert tokens == listed([*TOKENS, *MORE[name]])
    with quiet():
        model, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.vocab_size == 42


def test_a_union_of_the_tokens_of_adapters(zoo: Zoo, adapters: dict[str, Any]) -> None:
    content = {"base": "./base", "models": on_base("more", "other"), "method": "linear"}
    found, report = zoo.merge({**content, "vocabulary": {}})
    assert report["vocabulary"]["added"] == 3
    more, other = adapters["more"], adapters["other"]
    for name in (EMBED, HEAD):
        wanted = torch.stack([more[name][40], (more[name][41] + other[name][40]) / 2,
                              other[name][41]])  # fmt: skip
        torch.testing.assert_close(found[name][40:], wanted)
        torch.testing.assert_close(found[name][:40], (more[name][:40] + other[name][:40]) / 2)


def test_without_the_key_it_is_refused(zoo: Zoo, adapters: dict[str, Any]) -> None:
    content: dict[str, Any] = {"models": on_base("more"), "method": "linear"}
    with pytest.raises(CheckpointError, match="has the shape .42, 16., but .40, 16. in the base"):
        zoo.merge({**content, "base": "./base"})
    content["models"]["more"]["source"] = "./base"
    with pytest.raises(CheckpointError, match="its adapter has 42 rows of 'lm_head.weight'"):
        zoo.merge({**content, "base": None})
