"""What config.json and generation_config.json say of the vocabulary: its size, and tokens by id."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

GENERATION = "generation_config.json"
_IDS = re.compile(r"(?:^|_)token_(?:id|index)s?$|^(?:begin_)?suppress_tokens$|^bad_words_ids$")

Moved = Callable[[int], int | None]
Path_ = tuple[str, ...]


def sizes(settings: Mapping[str, Any]) -> set[int]:
    """Every vocab_size that a config names, of its parts too."""
    return {value for path, value in _leaves(settings) if path[-1] == "vocab_size"}


def resized(settings: Mapping[str, Any], before: int, rows: int) -> dict[Path_, Any]:
    """The config's vocab_size for so many rows: its own, or that of the part which has it."""
    paths = [p for p, value in _leaves(settings) if p[-1] == "vocab_size" and value == before]
    return dict.fromkeys(paths or [("vocab_size",)], rows) if settings else {}


def renamed(
    settings: Mapping[str, Any], lender: Mapping[str, Any], moved: Moved
) -> tuple[dict[Path_, Any], list[str]]:
    """Ids in a config that is to go with another model's tokens, by path; the names of those left.

    What the lender's own config says holds; any other id is looked up by its token, and where the
    lender has no such token, None.
    """
    theirs = {p: value for p, value in _leaves(lender) if _IDS.search(p[-1])}
    found: dict[Path_, Any] = {
        path: value for path, value in theirs.items() if _inside(settings, path[:-1])
    }
    lost = []
    for path, value in _leaves(settings):
        if _IDS.search(path[-1]) and path not in found and value is not None:
            found[path] = _mapped(value, moved)
            lost += [".".join(path)] if found[path] is None else []
    return found, lost


def generation(folder: Path, moved: Moved) -> str | None:
    """A generation_config.json whose ids are looked up by token; None where there is none."""
    file = folder / GENERATION
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text("utf-8"))
        changed = {
            key: _mapped(value, moved) if _IDS.search(key) and value is not None else value
            for key, value in settings.items()
        }
    except (ValueError, AttributeError):
        return None
    kept = {k: v for k, v in changed.items() if v is not None or settings[k] is None}
    return json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def _mapped(value: Any, moved: Moved) -> Any:
    """An id, or lists of them, by where its token is; None where one is nowhere."""
    if isinstance(value, list):
        each = [_mapped(one, moved) for one in value]
        return None if None in each else each
    return moved(value) if isinstance(value, int) and value >= 0 else value


def _leaves(settings: Mapping[str, Any], above: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _inside(settings: Mapping[str, Any], path: Path_) -> bool:
    here: Any = settings
    for key in path:
        here = here.get(key) if isinstance(here, Mapping) else None
    return isinstance(here, Mapping)
