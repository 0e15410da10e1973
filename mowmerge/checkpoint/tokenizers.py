"""Where a model reads texts otherwise than the tokenizer that is written, which is the donor's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LISTS = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def differences(donor: Path, folder: Path) -> Iterator[str]:
    """What in a folder's tokenizer is not as the donor's, a clause each: ids and chat template.

    Files that are absent on either side say nothing; a damaged one says nothing here.
    """
    ours, theirs = _vocabulary(donor), _vocabulary(folder)
    changed = sorted(i for i in theirs if ours and ours.get(i) != theirs[i])
    if changed:
        i, more = changed[0], f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        here = repr(ours[i]) if i in ours else "nothing"
        yield f"id {i} is {theirs[i]!r} in its tokenizer and {here} in the one written{more}"
    for name in () if ours and theirs else _LISTS:
        pair = donor / name, folder / name
        if all(map(Path.exists, pair)) and len({file.read_bytes() for file in pair}) > 1:
            yield f"its {name} is not the one written"
    own, written = template(folder), template(donor)
    if own and own != written:
        yield f"its chat template is not the one written{'' if written else ', as there is none'}"


def _vocabulary(folder: Path) -> dict[int, str]:
    """The token of each id that tokenizer.json says, empty where there is none."""
    held = _json(folder / "tokenizer.json")
    try:
        words = held["model"]["vocab"]
        if isinstance(words, list):  # of a unigram model: pairs of token and score, in order
            words = {pair[0]: i for i, pair in enumerate(words)}
        found = {int(i): str(word) for word, i in words.items()}
        return found | {int(t["id"]): str(t["content"]) for t in held.get("added_tokens", ())}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return {}


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
