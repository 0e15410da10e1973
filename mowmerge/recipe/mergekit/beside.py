"""What a document of mergekit's says beside the merge: dtype, chat template and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mowmerge.recipe.mergekit.presets import DTYPES
from mowmerge.recipe.mergekit.reading import Reader, Reference, as_map
from mowmerge.recipe.mergekit.templates import TEMPLATES
from mowmerge.recipe.model import Loc
from mowmerge.recipe.text import dotted

Names = Mapping[tuple[Reference, int], str]
Found = dict[str, tuple[Any, Loc]]  # what a key of the recipe holds, and where it comes from


def found(reader: Reader, names: Names) -> Found:
    """`output` and `vocabulary`, where the document says anything of them."""
    return _output(reader) | _vocabulary(reader, names)


def _output(reader: Reader) -> Found:
    """The dtype that is written, which out_dtype says, else dtype; and the chat template."""
    given, output = reader.document.data, {}
    at: Loc = ()
    for key in ("dtype", "out_dtype"):
        named = given.get(key)
        dtype = str(named).removeprefix("torch.")
        if named is None:
            continue
        if dtype not in DTYPES:
            reader.fault((key,), f"{key} must be one of {', '.join(DTYPES)}, not '{named}'")
            continue
        output["dtype"], at = dtype, (key,)
    template = given.get("chat_template")
    if template:
        output["chat_template"], at = TEMPLATES.get(str(template), template), ("chat_template",)
    return {"output": (output, at)} if output else {}


def _vocabulary(reader: Reader, names: Names) -> Found:
    """tokenizer, or the tokenizer_source that it replaces."""
    given = reader.document.data
    block, at = given.get("tokenizer"), ("tokenizer",)
    if given.get("tokenizer_source"):
        if block is not None:
            reader.fault(("tokenizer_source",), "tokenizer and tokenizer_source are two for one")
        block, at = {"source": given["tokenizer_source"]}, ("tokenizer_source",)
    if block is None:
        return {}
    if not isinstance(block, Mapping):
        reader.fault(at, "tokenizer must be a mapping: {source: union}")
        return {}
    reader.known(at, block, ("source", "tokens", "pad_to_multiple_of"))
    told = _source(reader, names, at, block.get("source") or "union")
    based = given.get("base_model") and _named(reader, names, at, given["base_model"])
    if based and based != "base":  # whose rows stand in for those that lack, as a base's would
        told["missing"] = {"model": based}
    tokens = {
        token: _token(reader, names, (*at, "tokens", token), as_map(asked))
        for token, asked in as_map(block.get("tokens")).items()
    }
    told |= {"tokens": tokens} if tokens else {}
    if block.get("pad_to_multiple_of"):
        told["pad_to_multiple_of"] = block["pad_to_multiple_of"]
    return {"vocabulary": (told, at)}


def _source(reader: Reader, names: Names, loc: Loc, given: Any) -> dict[str, Any]:
    """Whose tokens the output has; of one that is not merged some may have no row, then zeros."""
    top = reader.document.data.get("base_model")
    if given == "union" or (given == "base" and top is None):
        return {"source": given if given == "union" else next(iter(names.values()), "base")}
    named = top if given == "base" else given
    reference, base = reader.reference(loc, named), reader.reference(loc, top)
    if reference is None or reference == base or (reference, 0) in names:
        return {"source": _named(reader, names, loc, named)}
    return {"source": {"tokenizer": reference.model}, "unseen": "zero"}


def _named(reader: Reader, names: Names, loc: Loc, given: Any) -> str:
    """What a model is called in the recipe: base, or its name."""
    reference = reader.reference(loc, given)
    if reference is None:
        reader.fault(loc, f"{dotted(loc)} names no model")
        return "base"
    if (reference, 0) in names:
        return names[reference, 0]
    if reference == reader.reference(loc, reader.document.data.get("base_model")):
        return "base"
    known = dict.fromkeys(each.model for each, _ in names)
    hint = f"its tokens are read of a model that is merged: {', '.join(known)}"
    reader.fault(loc, f"'{reference.model}' is none of the models that are merged", hint)
    return next(iter(names.values()), "base")


def _token(reader: Reader, names: Names, loc: Loc, asked: Mapping[str, Any]) -> dict[str, Any]:
    """One token's exception: whose row models take that lack it, or with `force` all models."""
    reader.known(loc, asked, ("source", "force"))
    given = asked.get("source")
    parts = as_map(given)
    kind = parts.get("kind")
    told: dict[str, Any] = {"force": True} if asked.get("force") else {}
    if kind == "zero":
        return {"source": "zero", **told}
    if kind == "model_token":
        row: dict[str, Any] = {"model": _named(reader, names, loc, parts.get("model"))}
        for theirs, ours in (("token", "token"), ("token_id", "id")):
            if parts.get(theirs) is not None:
                row[ours] = parts[theirs]
        return {"source": row, **told}
    if given is not None:
        return {"source": {"model": _named(reader, names, loc, given)}, **told}
    return told
