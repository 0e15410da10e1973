"""Rows of single tokens that adapters bring (trainable_token_indices), against peft's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import adapt, held, library, merged, quiet, save
from safetensors.torch import load_file
from test_adapter import assert_equal, ours, write
from zoo import Zoo

from mowmerge.errors import CheckpointError
from tests.tokenized import EMBED, HEAD, listed, words

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a list": ("llama", {}, {"trainable_token_indices": [11, 3, 7]}),
    "a mapping": ("llama", {}, {"trainable_token_indices": {"embed_tokens": [3, 39]}}),
    "both ends": ("llama", {}, {"trainable_token_indices": {"embed_tokens": [0], "lm_head": [2]}}),
    "saved head": ("llama", {}, {"trainable_token_indices": [3], "modules_to_save": ["lm_head"]}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"trainable_token_indices": [3, 7]}),
    "tied, other rows": ("llama", {"tie_word_embeddings": True}, {
        "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [2]}}),
    "tied, by the head": ("llama", {"tie_word_embeddings": True}, {
        "trainable_token_indices": {"lm_head": [3, 7]}}),
    "gpt2": ("gpt2", {}, {"trainable_token_indices": [5], "target_modules": ["c_attn"]}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_is_what_merge_and_unload_makes(zoo: Zoo, case: str, dtype: torch.dtype) -> None:
    kind, shape, settings = CASES[case]
    base = save(zoo.folder / "base", kind, dtype, **shape)
    adapter = adapt(base, zoo.folder / "adapter", **settings)
    want, got = merged(base, [adapter], zoo.folder / "theirs"), ours(zoo, base, str(adapter))
    assert_equal(got, want)
    before = load_file(base / "model.safetensors")
    moved = [i for i in range(40) if not torch.equal(got[name(got)][i], before[name(got)][i])]
    rows = settings["trainable_token_indices"]
    lists = [*rows.values()] if isinstance(rows, dict) else [rows]
    named = [i for each in (lists if shape else lists[:1]) for i in each]  # where tied, of both
    assert moved == sorted(named)


def name(tensors: Any) -> str:
    return EMBED if EMBED in tensors else "transformer.wte.weight"


def test_several_adapters_change_several_tokens(zoo: Zoo) -> None:
    base = save(zoo.folder / "base", "llama")
    adapters = [
        adapt(base, zoo.folder / f"a{i}", seed=i, trainable_token_indices=rows)
        for i, rows in enumerate(([1, 2], [3]))
    ]
    got = ours(zoo, base, [str(a) for a in adapters])
    merged(base, adapters[:1], zoo.folder / "first")
    assert_equal(got, merged(zoo.folder / "first", adapters[1:], zoo.folder / "both"))
    with pytest.raises(CheckpointError, match=f"the row 1 of '{EMBED}' is replaced twice"):
        ours(zoo, base, [str(adapters[0])] * 2, "twice")


def test_a_weight_is_that_of_what_changes(zoo: Zoo) -> None:
    """Row 1 from 1 to 5, a quarter of the way; and in bf16 rounded once."""
    base = zoo.save("base", {"x.embed_tokens.weight": torch.ones(3, 2)})
    rows = {"x.embed_tokens.token_adapter.trainable_tokens_delta": [[5.0, 3.0]]}
    adapter = write(zoo.folder / "a", rows, trainable_token_indices=[1])
    got = ours(zoo, base, {"source": str(adapter), "weight": 0.25})
    assert got["x.embed_tokens.weight"].tolist() == [[1, 1], [2, 1.5], [1, 1]]


@pytest.mark.parametrize(("indices", "says"), [
    ([1, 2], "names 2 tokens, 2 of them among the 3 rows"),
    ([3], "names 1 tokens, 0 of them among the 3 rows"),
    ([-1], "names 1 tokens, 0 of them"),
    ({"lm_head": [1]}, "names rows of lm_head, and the file has none"),
    ({"embed_tokens": [1], "lm_head": [2]}, "names rows of lm_head, and the file has none"),
    (None, "names 0 tokens"),
])  # fmt: skip
def test_indices_that_do_not_fit(zoo: Zoo, indices: Any, says: str) -> None:
    base = zoo.save("base", {"x.embed_tokens.weight": torch.ones(3, 2)})
    rows = {"x.embed_tokens.token_adapter.trainable_tokens_delta": [[5.0, 3.0]]}
    adapter = write(zoo.folder / "a", rows, trainable_token_indices=indices)
    with pytest.raises(CheckpointError, match=says):
        ours(zoo, base, str(adapter))


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_replaced_in_whatever_run_they_lie(zoo: Zoo, workers: int) -> None:
    """A matrix of several runs, rows at their ends."""
    rows, numbers = 3000, [0, 1365, 1366, 2999, 17]
    base = zoo.save("base", {"x.embed_tokens.weight": torch.full((rows, 96), 1e9)})
    value = torch.arange(5.0).add(1).unsqueeze(1).repeat(1, 96)
    key = "x.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = write(zoo.folder / "a", {key: value}, trainable_token_indices=numbers)
    got = ours(zoo, base, str(adapter), workers=workers)["x.embed_tokens.weight"]
    wanted = torch.full((rows, 96), 1e9)
    wanted[numbers] = value
    assert torch.equal(got, wanted)


def test_rows_of_tokens_that_were_added(zoo: Zoo) -> None:
    """The embedding that peft saves resized, and the trained rows in it; placed by token."""
    folder, tokens = zoo.folder, ["<unk>", *(f"w{i}" for i in range(39))]
    base = save(folder / "base", "llama")
    (base / "tokenizer.json").write_text(json.dumps(words(listed(tokens))))
    with quiet():
        model = held(base)
        model.resize_token_embeddings(42, mean_resizing=False)
        asked = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [40, 41, 5]}
        wrapped = library.get_peft_model(model, library.LoraConfig(**asked))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter)
        wrapped.save_pretrained(folder / "adapter")
        want = wrapped.merge_and_unload().state_dict()
    keys = load_file(folder / "adapter/adapter_model.safetensors")
    assert any(key.endswith("token_adapter.base_layer.weight") for key in keys)
    (folder / "adapter/tokenizer.json").write_text(json.dumps(words(listed([*tokens, "x", "y"]))))
    content = {
        "models": {"m": {"source": "./base", "adapter": "./adapter"}}, "method": "passthrough",
        "vocabulary": {"source": "m"},
    }  # fmt: skip
    got, _ = zoo.merge(content)
    assert_equal(got, {key: want[key] for key in got})
    assert HEAD in got


def test_a_plan_counts_the_rows(zoo: Zoo) -> None:
    from mowmerge.planner import build
    from mowmerge.recipe import parse

    base = zoo.save("base", {"x.embed_tokens.weight": torch.zeros(400, 512)})
    key = "x.embed_tokens.token_adapter.trainable_tokens_delta"
    peak = []
    for i, numbers in enumerate(([1], range(300))):
        value = torch.zeros(len(numbers), 512)
        write(zoo.folder / f"a{i}", {key: value}, trainable_token_indices=[*numbers])
        models = {"m": {"source": str(base), "adapter": f"./a{i}"}}
        recipe = zoo.recipe({"models": models, "method": "passthrough"})
        peak.append(build(parse.load(Path(recipe))).peak_bytes)
    assert peak[1] - peak[0] == 299 * 512 * 4
