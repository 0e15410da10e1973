"""mergekit's files: known by their keys, turned into recipes of ours. Its words are only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.errors import Problem, RecipeError
from mowmerge.recipe.mergekit import rebasing
from mowmerge.recipe.mergekit.converting import Converter
from mowmerge.recipe.mergekit.reading import Reader
from mowmerge.recipe.text import Document

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
REFUSED = {
    "mergekit-moe": "merge the same experts with a dynamic method, which routes between them:"
    " `mowmerge methods mow`",
    "mergekit-pytorch": "write a recipe: any files of tensors merge that have the same names,"
    " `models: {a: a.safetensors, b: b.safetensors}`",
    "mergekit-evolve": "name the data under `tasks:` and find coefficients by a fit: `mowmerge"
    " methods adamerging`",
}


def recognised(documents: Sequence[Document]) -> bool:
    """Whether a file is one of mergekit's; a native recipe has `method` and no `merge_method`."""
    data = [document.data for document in documents]
    return all(isinstance(each, Mapping) for each in data) and any(
        _kind(each) or ("merge_method" in each and "method" not in each) for each in data
    )


def converted(documents: Sequence[Document]) -> tuple[Document, list[Problem]]:
    """The recipe that a file of mergekit's is, and what in it mergekit ignores.

    Of several documents, those that are named are nested recipes of what uses them; the recipe is
    the one without a name, or the only one that no other uses.

    Raises:
        RecipeError: a file of another of mergekit's tools; or documents that cannot be one recipe.
    """
    for document in documents:
        kind = _kind(document.data)
        if kind:
            raise RecipeError(
                f"this is a file of {kind}, which is not merged here", where=_at(document),
                hint=REFUSED[kind],
            )  # fmt: skip
    ignored = [
        Problem(f"{p.message}; the last holds, as in mergekit", p.where, "leave the others away")
        for document in documents
        for p in document.repeated
    ]
    names = [str(document.data.get("name")) for document in documents]
    documents = [each for document in documents for each in rebasing.split(document, names)]
    named = _named(documents)
    final = _final(documents, named)
    made: dict[str, Document] = {}
    for document in _in_order(final, named):
        reader = Reader(document, several=len(documents) > 1)
        found = Converter(reader, made).convert()
        ignored += reader.ignored
        if document is final:
            for inner in made.values():
                found.problems = [*inner.problems, *found.problems]
            return found, ignored
        made[str(document.data["name"])] = found
    raise AssertionError


def _kind(data: Mapping[str, Any]) -> str:
    """Which other tool of mergekit's a file is for; empty where it is for none."""
    experts = data.get("experts")
    if isinstance(experts, list) and any("source_model" in e for e in experts if _is_map(e)):
        return "mergekit-moe"
    if _is_map(data.get("genome")):
        return "mergekit-evolve"
    models = data.get("models") if "merge_method" in data else None
    files = [e.get("model") for e in models if _is_map(e)] if isinstance(models, list) else []
    if files and all(str(file).endswith(WEIGHTS) for file in files):
        return "mergekit-pytorch"
    return ""


def _is_map(given: Any) -> bool:
    return isinstance(given, Mapping)


def _named(documents: Sequence[Document]) -> dict[str, Document]:
    """The documents that have a name, where there are several."""
    named: dict[str, Document] = {}
    for document in documents if len(documents) > 1 else ():
        name = document.data.get("name")
        if name is None:
            continue
        if str(name) in named:
            raise RecipeError(f"two documents are named '{name}'", where=_at(document))
        named[str(name)] = document
    return named


def _uses(document: Document, named: Mapping[str, Document]) -> list[str]:
    """The names of the documents whose merges another takes as models."""
    found: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if key in ("model", "base_model") and isinstance(inner, str):
                    path = inner.partition("+")[0].partition("@")[0].strip()
                    found.extend([path] if path in named else [])
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(document.data)
    return list(dict.fromkeys(found))


def _final(documents: Sequence[Document], named: Mapping[str, Document]) -> Document:
    """The document that is the recipe itself."""
    unnamed = [each for each in documents if each not in named.values()]
    used = {name for document in documents for name in _uses(document, named)}
    left = unnamed or [named[name] for name in named if name not in used]
    if len(left) != 1:
        told = f"{len(left)} documents give a model that no other uses"
        raise RecipeError(
            f"{told}, and a recipe gives one" if left else "the documents use each other",
            where=_at(documents[-1]), hint="leave the name away from the one that is wanted",
        )  # fmt: skip
    return left[0]


def _in_order(final: Document, named: Mapping[str, Document]) -> list[Document]:
    """What a document uses, before it; those that nothing uses are left out."""
    order: list[Document] = []

    def visit(document: Document, above: tuple[str, ...]) -> None:
        for name in _uses(document, named):
            if name in above:
                chain = " -> ".join([*above[above.index(name) :], name])
                raise RecipeError(f"documents use each other: {chain}", where=_at(document))
            if named[name] not in order:
                visit(named[name], (*above, name))
        order.append(document)

    visit(final, (str(final.data.get("name")),))
    return order


def _at(document: Document) -> str:
    return f"{document.file}:{document.lines.get((), 1)}"
