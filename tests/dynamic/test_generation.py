"""Gates are taken from the prompt once and kept while tokens are decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import K, Made, inputs, model, one, write
from torch import Tensor

from mowmerge.dynamic.format import Gate, Router

torch.set_num_threads(1)
NEW = 5
ROUTERS = {"0": Router("linear", 32, K, layer=1, pool="statistics")}
BLOCKS = {"0": Router("mlp", 32, K, hidden=8, activation="none")}


def _made(folder: Path, name: str, scope: str) -> tuple[Made, Any]:
    """A checkpoint and its model, with a router that tells inputs apart."""

    def inside(tensor: str) -> bool:
        return any(part.isdigit() for part in tensor.split("."))

    block = scope == "block"
    made = write(
        folder, model(name), gates={"0": Gate(scope, "0")}, routers=BLOCKS if block else ROUTERS,
        pick=inside if block else lambda name: True,
    )  # fmt: skip
    dynamic, draw = made.load(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in dynamic.mow_router["0"].parameters():
            if value.dim() > 1:
                value.normal_(generator=draw)
    return made, dynamic


def _prompt(name: str) -> dict[str, Tensor]:
    return {k: v for k, v in inputs(name).items() if not k.startswith("decoder")}


def _generate(dynamic: Any, batch: Any, **kwargs: Any) -> Tensor:
    found: Tensor = dynamic.generate(
        **batch, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **kwargs
    )
    return found[:, -NEW:]


@pytest.mark.parametrize("scope", ["sample", "block"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_decoding_is_a_loop_with_the_prompts_gates(name: str, scope: str, tmp_path: Path) -> None:
    _, dynamic = _made(tmp_path, name, scope)
    batch = _prompt(name)
    gates = dynamic.route(**dynamic._prompt(None, batch))
    assert gates.std(0).max() > 0.01
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(NEW):  # no cache, no generate: the whole text at each step
        place = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            out = dynamic(input_ids=ids, attention_mask=mask, position_ids=place, gates=gates)
        logits = out.logits[:, -1].clone()
        logits[:, dynamic.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    want = ids[:, -NEW:]
    assert torch.equal(_generate(dynamic, batch, do_sample=False), want)
    assert torch.equal(_generate(dynamic, batch, do_sample=False, use_cache=False), want)
    assert torch.equal(_generate(dynamic, batch, do_sample=False, gates=gates), want)


@pytest.mark.parametrize("scope", ["sample", "block"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_batches_beams_and_sequences_equal_singles(name: str, scope: str, tmp_path: Path) -> None:
    _, dynamic = _made(tmp_path, name, scope)
    batch = _prompt(name)
    for kwargs in (
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
    ):
        whole = _generate(dynamic, batch, do_sample=False, **kwargs)
        n = kwargs.get("num_return_sequences", 1)
        for b in range(4):
            alone = one(batch, b)
            if b == 0:  # the padded one, without its padding
                alone = {key: value[:, 3:] for key, value in alone.items()}
            found = _generate(dynamic, alone, do_sample=False, **kwargs)
            assert torch.equal(found, whole[b * n : b * n + n]), (kwargs, b)


def test_padding_is_seen_without_a_mask(tmp_path: Path) -> None:
    _, dynamic = _made(tmp_path, "llama", "sample")
    batch = _prompt("llama")
    want = _generate(dynamic, batch, do_sample=False)
    assert torch.equal(_generate(dynamic, {"inputs": batch["input_ids"]}, do_sample=False), want)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_forced_expert_generates_as_itself(name: str, tmp_path: Path) -> None:
    made, dynamic = _made(tmp_path, name, "sample")
    batch, ids = _prompt(name), torch.tensor([1, 1, 1, 1])
    found = _generate(dynamic, batch, do_sample=False, task_ids=ids)
    plain = model(name)
    plain.load_state_dict(made.experts[1], strict=False)
    plain.tie_weights()
    assert torch.equal(found, _generate(plain, batch, do_sample=False))
    sampled = _generate(dynamic, batch, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (12, NEW)
