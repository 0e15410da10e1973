"""A parameter of mergekit's, as it stands at every level, as one value of ours.

There, levels are asked from the source's to the top's, a filter is a substring of a tensor's name,
and a list of values a gradient over the slice: its first value holds outside the layers too, and
its last where the slice is one layer. Here the same is one list of filtered values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mowmerge.recipe.mergekit.presets import Word

_NUMBERED = re.compile(r"(.*(?:^|\.)(?:layers?|h|blocks?)\.)(\d+)(|\..*)")
_SAID = {  # words that are read as true and false there
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}
Item = tuple[dict[str, Any], Any]  # a match, and the value where it holds


class Unsaid(ValueError):
    """A setting that cannot be said here."""


@dataclass(frozen=True)
class Range:
    """The layers that a slice becomes, and the first of those that a source gives it; all of the
    model where there are no slices."""

    start: int = 0
    length: int | None = None
    first: int = 0

    @property
    def layers(self) -> int | str:
        """The layers as a recipe of ours names them."""
        if self.length is None:
            return "0.."
        last = self.start + self.length - 1
        return self.start if self.length == 1 else f"{self.start}..{last}"


def value(levels: Sequence[Any], word: Word, at: Range) -> tuple[Any, bool]:
    """The settings of all levels as one value of ours, None where there is none; and whether that
    holds for every tensor."""
    items: list[Item] = []
    for setting in levels:
        for match, found in _items(setting, word, at):
            items.append((match, found))
            if not match:
                return _one(items), True
    return _one(items) if items else None, False


def _one(items: Sequence[Item]) -> Any:
    """The value itself, or filtered values."""
    if len(items) == 1 and not items[0][0]:
        return items[0][1]
    return [{"match": match, "value": v} if match else {"value": v} for match, v in items]


def _items(setting: Any, word: Word, at: Range) -> Iterator[Item]:
    """What one level says: filtered values, of which the first that matches holds."""
    conditions = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(conditions, list):
        yield from _graded(setting, word, at, {})
    elif conditions and all(isinstance(each, Mapping) for each in conditions):
        for each in conditions:
            if "value" not in each:
                raise Unsaid("has a filter without a value")
            given = each.get("filter")
            match = {} if given in (None, "*") else _match(str(given), at)
            if match is not None:
                yield from _graded(each["value"], word, at, match)
    elif any(isinstance(each, Mapping | list) for each in conditions):
        raise Unsaid("mixes values and filters, which mergekit refuses")
    else:
        yield from _graded(conditions, word, at, {})


def _graded(setting: Any, word: Word, at: Range, match: Mapping[str, Any]) -> Iterator[Item]:
    """One value, or a gradient over the layers and its first value outside them."""
    if not isinstance(setting, list):
        found = plain(setting, word)
        yield {**match}, found if word.most is None else min(found, word.most)
        return
    values = [plain(each, word) for each in setting]
    if not values:
        return
    if any(each != values[0] for each in values):
        inside = values if at.length != 1 else values[-1]
        yield {**match, "layers": at.layers}, inside
    yield {**match}, values[0]


def plain(setting: Any, word: Word) -> Any:
    """One number or word of ours for one of theirs."""
    if word.flag is not None:
        setting = _SAID.get(setting.lower(), setting) if isinstance(setting, str) else setting
        if not isinstance(setting, bool | int | float):
            raise Unsaid(f"must be true or false, not {setting!r}")
        return word.flag[bool(setting)]
    if isinstance(setting, bool):
        return float(setting)
    if isinstance(setting, str):
        try:
            return float(setting)
        except ValueError:
            raise Unsaid(f"must be a number, not {setting!r}") from None
    if not isinstance(setting, int | float):
        raise Unsaid("must be a number, a gradient or a list of filters")
    return setting


def replaced(given: Any, words: Mapping[str, str]) -> Any:
    """A value of ours with other words in it, filtered and in gradients too."""
    if isinstance(given, list):
        return [replaced(each, words) for each in given]
    if isinstance(given, Mapping):
        return {**given, "value": replaced(given["value"], words)}
    return words.get(given, given)


def _match(given: str, at: Range) -> dict[str, Any] | None:
    """The tensors whose name holds a substring; None where no layer of the slice has one.

    A filter is asked of the source's name, where layers have the numbers that they had there.
    """
    numbered = _NUMBERED.fullmatch(given)
    if not numbered or at.length is None or at.first == at.start:
        return {"tensors": f"*{_literal(given)}*"}
    head, digits, tail = numbered.groups()
    globs = []
    for k in range(at.length):
        was = str(at.first + k)
        if was == digits or (not tail and was.startswith(digits)):
            globs.append(f"*{_literal(head)}{at.start + k}{_literal(tail) or '.'}*")
    return {"tensors": globs if len(globs) > 1 else globs[0]} if globs else None


def _literal(text: str) -> str:
    """The text as a glob that matches only itself."""
    return re.sub(r"([*?[])", r"[\1]", text)
