"""YAML text to plain data with the line of every key; overrides by dotted path."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from mowmerge.errors import Problem, RecipeError
from mowmerge.recipe.model import Loc

LIMIT = 100_000  # values in a recipe, aliases expanded
TAG = "tag:yaml.org,2002:"
SCALARS = (  # YAML 1.2's core schema: 1e-5 is a number; on, off, yes, no and dates are text
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)

CONVERT: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    "bool": lambda text: text.lower() == "true",
    "null": lambda text: None,
}


def _old(kind: str) -> Callable[[str], Any]:
    """What PyYAML makes of a scalar by YAML 1.1."""

    def convert(text: str) -> Any:
        made = getattr(yaml.SafeLoader(""), f"construct_yaml_{kind}")
        return made(yaml.ScalarNode(TAG + kind, text))

    return convert


CONVERT_OLD: dict[str, Callable[[str], Any]] = {
    **CONVERT, "timestamp": str, "value": str,
    **{kind: _old(kind) for kind in ("bool", "int", "float")},
}  # fmt: skip


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads back as the same data."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _name, _pattern, _first in SCALARS:
    for _side in (Loader, Dumper):
        _side.add_implicit_resolver(TAG + _name, re.compile(f"(?:{_pattern})$"), list(_first))


@dataclass
class Document:
    """A text's data, the line of each key or list item, what is wrong with the text, and the keys
    in it that are `repeated`, of which the last holds."""

    file: str
    data: Any = None
    lines: dict[Loc, int | str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    convert: Mapping[str, Callable[[str], Any]] = field(default_factory=lambda: CONVERT, repr=False)
    repeated: list[Problem] = field(default_factory=list)


def dotted(loc: Loc) -> str:
    """rules.0.match: a key path as --set takes it."""
    return ".".join(str(part) for part in loc)


def dump(data: Any) -> str:
    """The data as YAML, small collections on one line."""
    text: str = yaml.dump(
        data, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    return text


def read(text: str, file: str) -> Document:
    """Text to data; a syntax error is a RecipeError with its line, other faults are collected."""
    return alone(read_all(text, file))


def alone(documents: Sequence[Document]) -> Document:
    """The document of a text that has to be the only one, and has to have each key once."""
    if len(documents) > 1:
        where = f"{documents[1].file}:{documents[1].lines.get((), 1)}"
        raise RecipeError("not a recipe: several documents in one file", where=where)
    documents[0].problems += documents[0].repeated
    return documents[0]


def read_all(text: str, file: str, *, old: bool = False) -> list[Document]:
    """The same of every document that is not empty; of an empty text the empty one. What is `old`
    is YAML 1.1: on, 010 and 0x8 are true, 8 and 8."""
    found = []
    try:
        for node in yaml.compose_all(text, yaml.SafeLoader if old else Loader):
            document = Document(file, convert=CONVERT_OLD if old else CONVERT)
            document.data = _build(node, (), document, ())
            found.append(document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise RecipeError(f"not YAML: {error.problem or error.context}", where=where) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {str(error).splitlines()[0]}", where=file) from None
    except RecursionError:
        raise RecipeError("not a recipe: nested too deeply", where=file) from None
    return (
        [document for document in found if document.data is not None]
        or found[:1]
        or [Document(file)]
    )


def _build(node: yaml.Node, loc: Loc, document: Document, above: tuple[int, ...]) -> Any:
    """The node's data; records its line where its parent has not."""
    line = node.start_mark.line + 1
    document.lines.setdefault(loc, line)
    if id(node) in above:
        raise RecipeError("an anchor contains itself", where=f"{document.file}:{line}")
    if len(document.lines) > LIMIT:
        raise RecipeError(f"not a recipe: over {LIMIT:,} values", where=f"{document.file}:{line}")
    above = (*above, id(node))
    if isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
        return _mapping(node, loc, document, above)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
        return [_build(n, (*loc, i), document, above) for i, n in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, document)
    return _fault(node, document, f"the tag '{node.tag}' is not known")


def _mapping(
    node: yaml.MappingNode, loc: Loc, document: Document, above: tuple[int, ...]
) -> dict[str, Any]:
    """A mapping's data; merged keys (<<) give way to its own."""
    merged: dict[str, Any] = {}
    for part in _merged(node):
        found = _build(part, loc, document, above)
        if isinstance(found, dict):
            merged = found | merged
        else:
            _fault(part, document, "'<<' takes a mapping")
    own: dict[str, Any] = {}
    first: dict[str, int] = {}
    for key_node, value in node.value:
        if key_node.tag == f"{TAG}merge":
            continue
        key, line = _key(key_node, document), key_node.start_mark.line + 1
        if not key:
            continue
        if key in first:
            message = f"the key '{dotted((*loc, key))}' is already on line {first[key]}"
            document.repeated.append(Problem(message, f"{document.file}:{line}"))
        if key in own or key in merged:
            _forget(document, (*loc, key))
        first[key] = line
        document.lines[*loc, key] = line
        own[key] = _build(value, (*loc, key), document, above)
    return merged | own


def _merged(node: yaml.MappingNode) -> list[yaml.Node]:
    """The nodes that `<<` names."""
    values = [value for key, value in node.value if key.tag == f"{TAG}merge"]
    return [
        part
        for value in values
        for part in (value.value if isinstance(value, yaml.SequenceNode) else [value])
    ]


def _key(node: yaml.Node, document: Document) -> str:
    """The key, which must be text; empty where it is not even a word."""
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        _fault(node, document, "a key must be a word")
        return ""
    if not isinstance(_scalar(node, document), str):
        _fault(node, document, f"the key {node.value} is not text", "put it in quotes")
    return str(node.value)


def _scalar(node: yaml.ScalarNode, document: Document) -> Any:
    text, kind = node.value, node.tag.removeprefix(TAG)
    if "\0" in text:
        return _fault(node, document, "a text holds a NUL character, which no name or path may")
    try:
        return document.convert[kind](text)
    except KeyError:
        return _fault(node, document, f"the tag '{node.tag}' is not known")
    except ValueError:
        return _fault(node, document, f"{text[:40]} is not a number")


def _fault(node: yaml.Node, document: Document, message: str, hint: str = "") -> None:
    where = f"{document.file}:{node.start_mark.line + 1}"
    document.problems.append(Problem(message, where, hint))


def _forget(document: Document, loc: Loc) -> None:
    """Drops the lines of what stood at `loc` and below."""
    for old in [known for known in document.lines if known[: len(loc)] == loc]:
        del document.lines[old]


def override(document: Document, assignments: Sequence[str]) -> None:
    """Puts each KEY.PATH=VALUE into the data; what cannot be set is a problem."""
    for assignment in assignments:
        where = f"--set {assignment}"
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip("."):
            hint = "write KEY.PATH=VALUE, such as parameters.density=0.3"
            document.problems.append(Problem("not an assignment", where, hint))
            continue
        try:
            value = read(text, where)
        except RecipeError as error:
            document.problems.append(Problem(error.problems[0].message, where))
            continue
        document.problems += [Problem(p.message, where, p.hint) for p in value.problems]
        fault = _put(document, path.split("."), value, where)
        if fault:
            document.problems.append(Problem(fault, where))


def _put(document: Document, path: list[str], value: Document, where: str) -> str:
    """Sets one value, makes the mappings on the way; returns why it cannot."""
    here: Any = document.data
    loc: Loc = ()
    while True:
        key: str | int
        place = dotted(loc) or "the recipe"
        if isinstance(here, dict):
            # a key may itself hold dots
            size = next((n for n in range(len(path), 0, -1) if ".".join(path[:n]) in here), 1)
            key, path = ".".join(path[:size]), path[size:]
        elif isinstance(here, list):
            if not path[0].isdecimal() or int(path[0]) >= len(here):
                return f"{place} has {len(here)} item(s), so there is no '{path[0]}'"
            key, path = int(path[0]), path[1:]
        else:
            return f"{place} is neither a mapping nor a list"
        loc = (*loc, key)
        if not path:
            break
        if isinstance(here, dict) and key not in here:
            here[key] = {}
            document.lines[loc] = where
        if isinstance(here[key], str) and _names_source(loc):
            here[key] = {"source": here[key]}
            document.lines[*loc, "source"] = document.lines[loc]
        here = here[key]
    here[key] = value.data
    _forget(document, loc)
    document.lines.update({loc + below: where for below in value.lines} | {loc: where})
    return ""


def _names_source(loc: Loc) -> bool:
    """Whether a string there is the short form of a mapping with a `source`."""
    return loc[-2:-1] in (("models",), ("adapter",)) or loc[-1] == "adapter"
