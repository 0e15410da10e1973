"""A tokenizer.json as data: which token has which id, and where two tokenizers differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mowmerge.errors import CheckpointError

FILE = "tokenizer.json"
_LISTS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What a tokenizer.json says, and the folder whose it is."""

    folder: Path
    data: Mapping[str, Any]

    @cached_property
    def pieces(self) -> Mapping[str, int]:
        """The id of each piece of the model, added tokens that are none of them left out."""
        words = self.data["model"]["vocab"]
        if isinstance(words, list):  # of a unigram model: pairs of piece and score, in order
            return {str(pair[0]): i for i, pair in enumerate(words)}
        return {str(word): int(i) for word, i in words.items()}

    @cached_property
    def added(self) -> Mapping[str, Mapping[str, Any]]:
        """The tokens that are matched before a text is split: what is said of each."""
        return {str(token["content"]): token for token in self.data.get("added_tokens") or ()}

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each token."""
        return {**self.pieces, **{token: int(said["id"]) for token, said in self.added.items()}}

    @property
    def kind(self) -> str:
        """BPE | WordPiece | Unigram | WordLevel; old files leave it to be seen."""
        model = self.data["model"]
        guess = "Unigram" if isinstance(model["vocab"], list) else "WordLevel"
        guess = "WordPiece" if "continuing_subword_prefix" in model else guess
        return str(model.get("type") or ("BPE" if "merges" in model else guess))

    @cached_property
    def spelling(self) -> str:
        """How its pieces stand for text: what two tokenizers need in common to share any."""
        if self.kind == "WordPiece":
            prefix = self.data["model"].get("continuing_subword_prefix", "##")
            return f"words whose later pieces begin with '{prefix}'"
        held = json.dumps([self.data.get(k) for k in ("normalizer", "pre_tokenizer", "decoder")])
        what = "text with '▁' for spaces" if '"Metaspace"' in held or "\\u2581" in held else "text"
        what = "bytes" if '"ByteLevel"' in held else what
        end = self.data["model"].get("end_of_word_suffix")
        return f"{what} in words that end in '{end}'" if end else what

    def splits_as(self, other: Tokenizer) -> bool:
        """Whether both change and split a text alike before its pieces are looked up."""
        parts = ("normalizer", "pre_tokenizer")
        return all(self.data.get(part) == other.data.get(part) for part in parts)


def read(folder: Path, text: str | None = None) -> Tokenizer:
    """The tokenizer of a folder, or of the text of a tokenizer.json that would lie there.

    Raises:
        CheckpointError: there is no tokenizer.json, or it cannot be understood.
    """
    return understood(folder, content(folder) if text is None else text.encode())


def content(folder: Path) -> bytes:
    """The bytes of a folder's tokenizer.json; CheckpointError where there is none."""
    file = folder / FILE
    if not file.is_file():
        raise CheckpointError(
            f"there is no {FILE}, which placing rows by token needs", where=str(folder),
            hint="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one",
        )  # fmt: skip
    return file.read_bytes()


def understood(folder: Path, held: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.json's bytes; CheckpointError where they are none."""
    try:
        found = Tokenizer(folder, json.loads(held))
        if not found.kind or min(found.ids.values()) < 0:
            raise ValueError("its kind, or an id")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"it says no token and id that can be understood: {error!r}", where=str(folder / FILE),
            hint="download it again, or save the tokenizer again",
        ) from error  # fmt: skip
    return found


def apart(one: Tokenizer, two: Tokenizer, *, joined: bool) -> str:
    """Why tokens of two tokenizers cannot be told apart by their strings, or not be `joined` in
    one; empty where they can."""
    if one.spelling != two.spelling:
        return f"its tokens stand for {two.spelling}, and the output's for {one.spelling}"
    if joined and one.kind != two.kind:
        return f"its tokenizer is {two.kind}, and the one that is added to is {one.kind}"
    return ""


def moved(ours: Mapping[str, int], theirs: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Tokens of both whose ids differ: each with our id and theirs, in order of ours."""
    both = ((t, i, theirs[t]) for t, i in ours.items() if t in theirs)
    return sorted((each for each in both if each[1] != each[2]), key=lambda each: each[1])


def known(folder: Path) -> Mapping[str, int]:
    """The id of each token that tokenizer.json says, or where there is none a plain list of words
    (vocab.json, vocab.txt); empty where there is nothing to understand."""
    try:
        return read(folder).ids
    except CheckpointError:
        return _words(folder)


def _words(folder: Path) -> Mapping[str, int]:
    try:
        if (folder / "vocab.json").is_file():
            held = json.loads((folder / "vocab.json").read_text("utf-8"))
            return {str(token): int(i) for token, i in held.items()}
        lines = (folder / "vocab.txt").read_text("utf-8").splitlines()
        return {token: i for i, token in enumerate(lines)}
    except (OSError, AttributeError, TypeError, ValueError):
        return {}


def differences(
    donor: Path, folder: Path, ours: Mapping[str, int], theirs: Mapping[str, int]
) -> Iterator[str]:
    """What in a folder's tokenizer is not as the donor's, a clause each: ids and chat template.

    `ours` and `theirs` are the ids of donor and folder. Files that are absent on either side say
    nothing; a damaged one says nothing here.
    """
    yield from renamed(ours, theirs)
    for name in () if ours and theirs else _LISTS:  # which only bytes compare
        pair = donor / name, folder / name
        if all(map(Path.exists, pair)) and not alike(*pair):
            yield f"its {name} is not the one written"
    yield from retold(donor, folder)


def renamed(ours: Mapping[str, int], theirs: Mapping[str, int]) -> Iterator[str]:
    """That ids mean other tokens in a tokenizer than in the one written, `ours`, if any do."""
    here, there = ({i: token for token, i in ids.items()} for ids in (ours, theirs))
    changed = sorted(i for i in there if here and here.get(i) != there[i])
    if changed:
        i, more = changed[0], f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        said = repr(here[i]) if i in here else "nothing"
        yield f"id {i} is {there[i]!r} in its tokenizer and {said} in the one written{more}"


def retold(donor: Path, folder: Path) -> Iterator[str]:
    """That the chat template is not the donor's, if there is one."""
    own, written = template(folder), template(donor)
    if own and own != written:
        yield f"its chat template is not the one written{'' if written else ', as there is none'}"


def alike(one: Path, two: Path) -> bool:
    """Whether two files are there with the same bytes."""
    return one.is_file() and two.is_file() and one.read_bytes() == two.read_bytes()


def template(folder: Path) -> Any:
    """The chat template: of its own file, or of the tokenizer's config."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text("utf-8")
    return _json(folder / "tokenizer_config.json").get("chat_template")


def _json(file: Path) -> Mapping[str, Any]:
    try:
        held = json.loads(file.read_bytes()) if file.exists() else {}
    except ValueError:
        held = {}
    return held if isinstance(held, dict) else {}
