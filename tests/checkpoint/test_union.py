"""Tokens added to tokenizers of every kind: what loads, and how texts are split then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mowmerge.checkpoint import tokenizers as ours
from mowmerge.checkpoint.union import Addition, extended, files
from mowmerge.errors import CheckpointError
from tests.tokenized import listed, tokenizer

theirs = pytest.importorskip("tokenizers")
trainers = pytest.importorskip("tokenizers.trainers")
TEXTS = ["the quick brown fox jumps over the lazy dog", "a lazy fox, and the other dogs"]
OTHERS = ["zorblax quibbles zorblax", "quibbling zorblaxes quibble"]


def trained(kind: str, texts: list[str], size: int, special: list[str]) -> dict[str, Any]:
    """A tokenizer of that kind, as its library trains and saves it."""
    model = getattr(theirs.models, kind)
    made = theirs.Tokenizer(model() if kind in ("BPE", "Unigram") else model(unk_token="<unk>"))
    options: dict[str, Any] = {
        "vocab_size": size,
        "special_tokens": special,
        "show_progress": False,
    }
    if kind == "BPE":
        made.pre_tokenizer = theirs.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = theirs.decoders.ByteLevel()
        options["initial_alphabet"] = theirs.pre_tokenizers.ByteLevel.alphabet()
    elif kind == "Unigram":
        made.pre_tokenizer = theirs.pre_tokenizers.Metaspace()
        made.decoder = theirs.decoders.Metaspace()
        options["unk_token"] = "<unk>"
    else:
        made.pre_tokenizer = theirs.pre_tokenizers.Whitespace()
        if kind == "WordPiece":
            made.decoder = theirs.decoders.WordPiece()
    made.train_from_iterator(
        texts, getattr(trainers, f"{kind.replace('BPE', 'Bpe')}Trainer")(**options)
    )
    return json.loads(made.to_str())


def read(folder: Path, said: dict[str, Any]) -> ours.Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(said), "utf-8")
    return ours.read(folder)


def loaded(tokenizer_: ours.Tokenizer) -> Any:
    return theirs.Tokenizer.from_str(json.dumps(tokenizer_.data))


def everything(one: ours.Tokenizer, two: ours.Tokenizer) -> list[Addition]:
    return [Addition(token, two) for token in two.ids if token not in one.ids]


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_a_union_splits_old_texts_as_before_and_knows_new_words(tmp_path: Path, kind: str) -> None:
    one = read(tmp_path / "one", trained(kind, TEXTS, 320, ["<unk>", "<s>"]))
    two = read(tmp_path / "two", trained(kind, OTHERS, 320, ["<unk>", "<chat>"]))
    both = extended(one, everything(one, two))
    before, after, other = map(loaded, (one, both, two))
    assert after.get_vocab() == both.ids
    assert {t: i for t, i in both.ids.items() if t in one.ids} == one.ids
    assert both.ids.keys() == one.ids.keys() | two.ids.keys()
    for text in TEXTS:
        assert after.encode(text).ids == before.encode(text).ids
    for text in OTHERS:
        if kind != "BPE":  # whose old merges come first, and may leave a new piece in parts
            assert after.encode(text).tokens == other.encode(text).tokens
        assert after.decode(after.encode(text).ids) == text
    assert after.encode("lazy<chat>").tokens[-1] == "<chat>"
    assert [t.strip("▁") for t in after.encode("zorblax").tokens] == ["zorblax"]
    assert "zorblax" not in before.encode("zorblax").tokens[0]


def test_ids_are_kept_though_an_added_token_is_no_piece(tmp_path: Path) -> None:
    """The library numbers such a token by the count of pieces: more pieces would move it."""
    words = {"type": "WordLevel", "vocab": {"<unk>": 0, "x": 1, "y": 4}, "unk_token": "<unk>"}
    one = read(tmp_path / "one", tokenizer(words, {"<s>": 3}))
    two = read(tmp_path / "two", tokenizer({**words, "vocab": {"<unk>": 0, "z": 1}}, {"<t>": 2}))
    both = extended(one, everything(one, two))
    assert loaded(both).get_vocab() == both.ids == {
        "<unk>": 0, "x": 1, "y": 4, "<s>": 3, "z": 5, "<t>": 6
    }  # fmt: skip
    assert [t["content"] for t in both.data["added_tokens"]] == ["<s>", "<t>"]


def test_merges_follow_those_that_are_there(tmp_path: Path) -> None:
    """By hand: a text is split by ab first, as before; bc and abc come after."""

    def bpe(vocab: list[str], merges: list[Any]) -> dict[str, Any]:
        return tokenizer({"type": "BPE", "vocab": listed(vocab), "merges": merges})

    one = read(tmp_path / "one", bpe(["a", "b", "c", "ab"], [["a", "b"]]))
    two = read(tmp_path / "two", bpe(["b", "c", "d", "bc", "bcd"], ["b c", "bc d"]))
    both = extended(one, everything(one, two))
    assert both.data["model"]["merges"] == [["a", "b"], ["b", "c"], ["bc", "d"]]
    found = loaded(both)
    assert found.encode("abc").tokens == ["ab", "c"]
    assert found.encode("bcd").tokens == ["bcd"]
    assert found.encode("abcd").tokens == ["ab", "c", "d"]
    # a piece alone is matched verbatim, since the merges that lead to it are not there
    lone = extended(one, [Addition("bcd", two, verbatim=True)])
    assert lone.data["model"]["merges"] == [["a", "b"]]
    assert loaded(lone).encode("abcd").tokens == ["a", "bcd"]


def test_unigram_scores_and_holes(tmp_path: Path) -> None:
    def unigram(pieces: list[tuple[str, float]], added: dict[str, int]) -> dict[str, Any]:
        return tokenizer({"type": "Unigram", "unk_id": 0, "vocab": pieces}, added)

    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0)]
    one = read(tmp_path / "one", unigram(pieces, {"<s>": 3}))
    two = read(tmp_path / "two", unigram([*pieces, ("ab", -0.5)], {"<t>": 4}))
    both = extended(one, everything(one, two))
    assert both.data["model"]["vocab"] == [
        *map(list, pieces), ["<s>", -2.0], ["ab", -0.5], ["<t>", -2.0]
    ]  # fmt: skip
    assert loaded(both).get_vocab() == both.ids
    assert loaded(both).encode("ab<t>a").tokens == ["ab", "<t>", "a"]
    holed = read(tmp_path / "three", unigram(pieces, {"<s>": 5}))
    with pytest.raises(CheckpointError, match="no token has the id 3"):
        extended(holed, everything(holed, two))


def test_the_files_that_follow(tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    one = read(tmp_path / "one", tokenizer(words))
    assert files(one.folder, one, one) == {}
    both = extended(one, [Addition("<new>", None, verbatim=True)])
    assert list(files(one.folder, one, both)) == ["tokenizer.json"]
    config = {"added_tokens_decoder": {"0": {"content": "<unk>"}}, "eos_token": "</s>"}
    (tmp_path / "one/tokenizer_config.json").write_text(json.dumps(config))
    said = json.loads(files(one.folder, one, both)["tokenizer_config.json"])
    assert said["eos_token"] == "</s>"
    assert said["added_tokens_decoder"]["1"] == {
        "content": "<new>", "special": True, "normalized": False, "single_word": False,
        "lstrip": False, "rstrip": False,
    }  # fmt: skip


@pytest.mark.parametrize(("model", "kind"), [
    ({"type": "BPE", "vocab": {"a": 0}}, "BPE"), ({"vocab": {"a": 0}, "merges": []}, "BPE"),
    ({"vocab": {"a": 0}, "continuing_subword_prefix": "##"}, "WordPiece"),
    ({"vocab": [["a", 0.0]]}, "Unigram"), ({"vocab": {"a": 0}}, "WordLevel"),
])  # fmt: skip
def test_kinds(tmp_path: Path, model: dict[str, Any], kind: str) -> None:
    assert read(tmp_path / "one", tokenizer(model)).kind == kind


@pytest.mark.parametrize(("change", "said"), [
    ({}, ""),
    ({"pre_tokenizer": {"type": "ByteLevel"}}, "its tokens stand for bytes"),
    ({"decoder": {"type": "Sequence", "decoders": [{"type": "Metaspace", "replacement": "▁"}]}},
     "its tokens stand for text with '▁' for spaces"),
    ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}},
     "its tokens stand for text with '▁' for spaces"),
    ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}},
     "its tokens stand for words whose later pieces begin with '##'"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "end_of_word_suffix": "</w>"}},
     "its tokens stand for text in words that end in '</w>'"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "end_of_word_suffix": "</w>"},
      "pre_tokenizer": {"type": "ByteLevel"}},
     "its tokens stand for bytes in words that end in '</w>'"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "its tokenizer is BPE"),
])  # fmt: skip
def test_what_cannot_be_reconciled(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    one = read(tmp_path / "one", tokenizer(words))
    two = read(tmp_path / "two", {**tokenizer(words), **change})
    assert ours.apart(one, two, joined=True).startswith(said)
    assert bool(ours.apart(one, two, joined=True)) == bool(said)
    assert bool(ours.apart(one, two, joined=False)) == (said not in ("", "its tokenizer is BPE"))
