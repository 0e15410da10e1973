"""Tokens added to a tokenizer.json, each with an id of its own at the end.

A token that its model matches verbatim (`added_tokens`) is matched so by the new tokenizer. Any
other is a piece of the model: of BPE with the merges that lead to it, after all that are there; of
Unigram with its score. So a text without new tokens in it is split as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.tokenizers import FILE, Tokenizer
from mowmerge.errors import CheckpointError

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Addition:
    """A new token: the tokenizer that has it, None where none does, and whether it is to be
    matched verbatim whatever it is there."""

    token: str
    origin: Tokenizer | None
    verbatim: bool = False

    @property
    def said(self) -> Mapping[str, Any] | None:
        """What added_tokens is to say of it; None for a piece."""
        known = self.origin.added.get(self.token) if self.origin else None
        if known is None and not self.verbatim:
            return None
        return {**PLAIN, "special": self.origin is None, **(known or {})}


def extended(lender: Tokenizer, additions: Sequence[Addition]) -> Tokenizer:
    """The lender's tokenizer with these tokens, whose ids follow its highest.

    Raises:
        CheckpointError: a Unigram model whose ids have holes: its pieces are numbered in order.
    """
    if not additions:
        return lender
    first = 1 + max(lender.ids.values())
    ids = {each.token: first + i for i, each in enumerate(additions)}
    added = list(lender.added.values()) + [
        {**each.said, "id": ids[each.token], "content": each.token}
        for each in additions
        if each.said is not None
    ]
    model = dict(lender.data["model"])
    # an added token that is no piece would be numbered anew by whoever loads the file
    every = {**lender.ids, **ids}
    if lender.kind == "Unigram":
        model["vocab"] = _scored(lender, additions, every)
    else:
        model["vocab"] = {**model["vocab"], **every}
    if lender.kind == "BPE":
        model["merges"] = _merges(lender, additions, model["vocab"])
    data = {**lender.data, "added_tokens": added, "model": model}
    return replace(lender, data=data)


def _scored(
    lender: Tokenizer, additions: Sequence[Addition], ids: Mapping[str, int]
) -> list[list[Any]]:
    """A Unigram model's pieces in order of id; what is matched verbatim has the lowest score."""
    vocab: list[list[Any]] = [list(pair) for pair in lender.data["model"]["vocab"]]
    lowest = min((float(score) for _, score in vocab), default=0.0)
    scores = {
        piece: score
        for each in additions
        if each.origin is not None and each.origin.kind == "Unigram" and each.said is None
        for piece, score in _own_scores(each.origin, each.token)
    }
    at = {i: token for token, i in ids.items()}
    for i in range(len(vocab), 1 + max(at)):
        if i not in at:
            raise CheckpointError(
                f"no token can be added to this Unigram model: no token has the id {i}",
                where=str(lender.folder / FILE), hint="name another model as vocabulary.source",
            )  # fmt: skip
        vocab.append([at[i], scores.get(at[i], lowest)])
    return vocab


def _own_scores(origin: Tokenizer, token: str) -> Iterable[tuple[str, float]]:
    place = origin.pieces.get(token)
    return [] if place is None else [(token, float(origin.data["model"]["vocab"][place][1]))]


def _merges(
    lender: Tokenizer, additions: Sequence[Addition], vocab: Mapping[str, int]
) -> list[list[str]]:
    """A BPE model's merges, then those of the others that lead to one of their new pieces."""
    merges = [_pair(merge) for merge in lender.data["model"].get("merges") or ()]
    wanted: dict[int, tuple[Tokenizer, set[str]]] = {}
    for each in additions:
        if each.origin is not None and each.said is None and each.origin.kind == "BPE":
            wanted.setdefault(id(each.origin), (each.origin, set()))[1].add(each.token)
    for origin, pieces in wanted.values():
        prefix = origin.data["model"].get("continuing_subword_prefix") or ""
        for merge in origin.data["model"].get("merges") or ():
            left, right = pair = _pair(merge)
            made = left + right.removeprefix(prefix)
            if made in pieces and left in vocab and right in vocab:
                merges.append(pair)
    return merges


def _pair(merge: Any) -> list[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else list(merge)


def files(
    folder: Path, lender: Tokenizer, tokenizer: Tokenizer, held: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The files of the lender's folder, or `held` in place of those, that its extended tokenizer
    changes, as they are then."""
    found = dict(held or {})
    if tokenizer is lender:
        return found
    found[FILE] = json.dumps(tokenizer.data, ensure_ascii=False) + "\n"
    file = folder / _CONFIG
    text = found.get(_CONFIG) or (file.read_text("utf-8") if file.is_file() else "{}")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(file)) from error
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):  # as transformers 4 wrote it
        new = [said for token, said in tokenizer.added.items() if token not in lender.added]
        more = {str(said["id"]): {k: v for k, v in said.items() if k != "id"} for said in new}
        settings["added_tokens_decoder"] = {**decoder, **more}
        found[_CONFIG] = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    return found
