"""A document whose slices have different bases: one document for each base, and one that stacks
the layers that they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.recipe.mergekit.presets import PRESETS
from mowmerge.recipe.mergekit.reading import START, Reader, Reference, as_list, as_map, layer_range
from mowmerge.recipe.model import Loc
from mowmerge.recipe.text import Document

LEVELS = ("merge_method", "parameters")  # what each of the documents takes along


def split(document: Document, taken: Sequence[str]) -> list[Document]:
    """The documents in place of one, or itself where one base is enough; `taken` are names of
    others."""
    data = as_map(document.data)
    preset = PRESETS.get(str(data.get("merge_method")))
    _, pieces = _slices(data)
    if preset is None or not preset.apart or not all(isinstance(each, Mapping) for each in pieces):
        return [document]
    bases = [Reader(document).reference((), _based(data, piece)) for piece in pieces]
    lengths = [_length(piece) for piece in pieces]
    if len({*bases}) < 2 or None in lengths:
        return [document]
    groups: dict[Reference | None, list[int]] = {}
    for i, base in enumerate(bases):
        groups.setdefault(base, []).append(i)
    names: dict[Reference | None, str] = {}
    for base in groups:
        name = f"on-{base.name if base else 'none'}"
        others = {*taken, *names.values()}
        free = (f"{name}-{n}" for n in range(2, len(others) + 3))
        names[base] = name if name not in others else next(n for n in free if n not in others)
    found = [_one(document, names[base], numbers) for base, numbers in groups.items()]
    return [*found, _stacked(document, bases, names, lengths)]


def _slices(data: Mapping[str, Any]) -> tuple[Loc, Sequence[Any]]:
    """Where the slices of a document stand, and they; those of a module where it is the only."""
    modules = as_map(data.get("modules"))
    if len(modules) != 1:
        return ("slices",), as_list(data.get("slices"))
    ((name, module),) = modules.items()
    return ("modules", name, "slices"), as_list(as_map(module).get("slices"))


def _based(data: Mapping[str, Any], piece: Mapping[str, Any]) -> Any:
    return piece.get("base_model") or data.get("base_model")


def _length(piece: Mapping[str, Any]) -> int | None:
    """How many layers a slice gives; None where it does not say so."""
    sources = as_list(piece.get("sources"))
    found = layer_range(as_map(sources[0]).get("layer_range")) if sources else None
    return found[1] - found[0] if found else None


def _one(document: Document, name: str, numbers: Sequence[int]) -> Document:
    """The slices of one base, in the dtype of the result."""
    data, lines, (at, every) = document.data, document.lines, _slices(document.data)
    pieces, deep = [every[i] for i in numbers], len(at)
    based = _based(data, pieces[0])
    dtype = data.get("out_dtype") or data.get("dtype")
    made = {"name": name, **{key: data[key] for key in LEVELS if key in data}}
    made |= ({"base_model": based} if based else {}) | ({"dtype": dtype} if dtype else {})
    starts = [sum(_length(piece) or 0 for piece in every[:i]) for i in numbers]
    slices = [
        {START: start} | {k: v for k, v in piece.items() if k != "base_model"}
        for start, piece in zip(starts, pieces, strict=True)
    ]
    if deep == 1:
        made["slices"] = slices
    else:
        made["modules"] = {at[1]: {**data["modules"][at[1]], "slices": slices}}
    kept = {loc: line for loc, line in lines.items() if loc[:deep] != at}
    kept[("base_model",)] = lines.get((*at, numbers[0], "base_model"), lines.get((), 1))
    for j, i in enumerate(numbers):
        inside = {
            loc[deep + 1 :]: line for loc, line in lines.items() if loc[: deep + 1] == (*at, i)
        }
        kept |= {(*at, j, *loc): line for loc, line in inside.items()}
    return Document(document.file, made, kept)


def _stacked(
    document: Document, bases: Sequence[Reference | None], names: Mapping[Reference | None, str],
    lengths: Sequence[int | None],
) -> Document:  # fmt: skip
    """The layers of all of them in their order, and all else that the document says."""
    ends = dict.fromkeys(names, 0)
    slices = []
    for base, length in zip(bases, lengths, strict=True):
        start, ends[base] = ends[base], ends[base] + (length or 0)
        slices.append({"sources": [{"model": names[base], "layer_range": [start, ends[base]]}]})
    left = (*LEVELS, "modules")
    rest = {key: value for key, value in document.data.items() if key not in left}
    made = {**rest, "merge_method": "passthrough", "slices": slices}
    at, lines = _slices(document.data)[0], {**document.lines}
    lines |= {("slices", *loc[len(at) :]): n for loc, n in lines.items() if loc[: len(at)] == at}
    return Document(document.file, made, lines, document.problems)
