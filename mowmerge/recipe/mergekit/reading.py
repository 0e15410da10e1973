"""What one document of mergekit's says: its models, slices and parameters at every level."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mowmerge.errors import Problem, did_you_mean
from mowmerge.recipe.mergekit.presets import MODULES, PRESETS, Preset
from mowmerge.recipe.model import Loc
from mowmerge.recipe.text import Document, dotted

TOP = ("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype",
       "out_dtype", "tokenizer", "tokenizer_source", "chat_template")  # fmt: skip
MODULE = ("models", "slices", "parameters")
SLICE = ("sources", "base_model", "parameters")
SOURCE = ("model", "layer_range", "parameters")
MODEL = ("model", "parameters")
START = 0  # of a slice, a key that no text has: the number that its first layer gets in the end
BODIES = ("models", "slices", "modules")
UNNAMED = re.compile(r"[^A-Za-z0-9_.-]+|^[^A-Za-z0-9]+")


@dataclass(frozen=True)
class Reference:
    """A model as mergekit names it: a path or Hub id with a revision, and a LoRA on it."""

    model: str
    lora: str = ""

    @property
    def name(self) -> str:
        """What it may be called."""
        parts = [part.partition("@")[0].rstrip("/").rpartition("/")[2] for part in
                 (self.model, self.lora) if part]  # fmt: skip
        return UNNAMED.sub("-", "-".join(parts)).strip("-.") or "model"


@dataclass
class Source:
    """One input of a slice."""

    reference: Reference
    parameters: Mapping[str, Any]
    loc: Loc
    first: int = 0
    length: int | None = None
    name: str = ""


@dataclass
class Slice:
    """What is merged together: all of the models, or some layers of each.

    start: the number that its first layer gets. final: in the stack that the document is of.
    """

    sources: list[Source]
    base: Reference | None
    levels: list[Mapping[str, Any]]
    loc: Loc
    start: int = 0
    final: int = 0

    @property
    def length(self) -> int | None:
        """How many layers; None for all there are."""
        return self.sources[0].length

    @property
    def others(self) -> list[Source]:
        """The inputs but for the base."""
        return [source for source in self.sources if source.reference != self.base]


@dataclass
class Reader:
    """Reads one document; collects what is wrong with it and what in it is ignored."""

    document: Document
    several: bool = False
    problems: list[Problem] = field(default_factory=list)
    ignored: list[Problem] = field(default_factory=list)

    def preset(self) -> Preset | None:
        """What its method is here."""
        name = self.document.data.get("merge_method")
        preset = PRESETS.get(name) if isinstance(name, str) else None
        if preset is None:
            hint = did_you_mean(str(name), list(PRESETS))
            self.fault(("merge_method",), f"mergekit has no method '{name}'", hint)
        return preset

    def kind(self) -> str:
        """Which of models, slices and modules it has; empty where that is not one of them."""
        given = self.document.data
        self.known((), given, TOP + ("name",) * self.several)
        bodies = [key for key in BODIES if given.get(key)]
        if len(bodies) == 1:
            (body,) = bodies
            if isinstance(given[body], Mapping if body == "modules" else list):
                return body
            what = "a mapping of modules" if body == "modules" else "a list"
            self.fault((body,), f"{body} must be {what}")
            return ""
        told = f"has {' and '.join(bodies)}" if bodies else "has none"
        self.fault((), f"mergekit takes one of models, slices and modules, and this {told}")
        return ""

    def parts(self, base: Reference | None) -> dict[str, list[Slice]]:
        """The slices of each module where there are several; without a name those of all."""
        given = self.document.data
        top, modules = as_map(given.get("parameters")), as_map(given.get("modules"))
        if not modules:
            return {"": list(self.slices((), given, [top], base))}
        found = {}
        for name, module in modules.items():
            loc: Loc = ("modules", name)
            self.known(loc, module, MODULE)
            if len(modules) > 1 and name not in MODULES:
                told = f"which tensors are of the module '{name}' is not known here"
                self.fault(loc, told, f"one of {', '.join(MODULES)}; or write a recipe with rules")
            bodies = [as_map(module)[key] for key in BODIES[:2] if as_map(module).get(key)]
            if len(bodies) != 1 or not isinstance(bodies[0], list):
                self.fault(loc, f"{dotted(loc)} takes one list, of models or of slices")
            levels = [as_map(as_map(module).get("parameters")), top]
            slices = list(self.slices(loc, as_map(module), levels, base))
            found[name if len(modules) > 1 else ""] = slices
        return found

    def slices(
        self, loc: Loc, body: Mapping[str, Any], levels: list[Mapping[str, Any]],
        base: Reference | None,
    ) -> Iterator[Slice]:  # fmt: skip
        """The slices of a body; one without layers for `models`."""
        start = 0
        for i, entry in enumerate(as_list(body.get("slices"))):
            given: Mapping[Any, Any] = as_map(entry)
            here: Loc = (*loc, "slices", i)
            final, piece = given.get(START, start), {k: given[k] for k in given if k != START}
            self.known(here, piece, SLICE)
            own = self.reference((*here, "base_model"), piece.get("base_model")) or base
            sources = list(self._sources((*here, "sources"), piece.get("sources"), SOURCE))
            lengths = {source.length for source in sources}
            if len(lengths) != 1:
                told = "has no sources" if not sources else "takes other numbers of layers of each"
                self.fault(here, f"a slice {told}")
                continue
            levels_here = [as_map(piece.get("parameters")), *levels]
            found = Slice(sources, own, levels_here, here, start, final)
            start += found.length or 0
            yield found
        if body.get("models"):
            sources = list(self._sources((*loc, "models"), body["models"], MODEL))
            if base and all(source.reference != base for source in sources):
                sources.append(Source(base, {}, ("base_model",)))  # it is one more input
            yield Slice(sources, base, levels, (*loc, "models"))

    def _sources(self, loc: Loc, given: Any, known: Sequence[str]) -> Iterator[Source]:
        if not isinstance(given, list):
            self.fault(loc, f"{dotted(loc)} must be a list")
        for i, entry in enumerate(map(as_map, as_list(given))):
            here: Loc = (*loc, i)
            self.known(here, entry, known)
            reference = self.reference((*here, "model"), entry.get("model"))
            if reference is None:
                if entry.get("model") is None:
                    self.fault(here, f"'{dotted((*here, 'model'))}' is missing")
                continue
            source = Source(reference, as_map(entry.get("parameters")), here)
            if "layer_range" in known:
                source.first, source.length = self._range(here, entry.get("layer_range"))
            yield source

    def _range(self, loc: Loc, given: Any) -> tuple[int, int | None]:
        """The first layer of a range, and how many there are; the last is one before its end."""
        here, found = (*loc, "layer_range"), layer_range(given)
        if found is None:
            hint = "[first, end]: the layer at the end is not taken, as in [0, 16]"
            self.fault(here, f"{dotted(here)} must be two layers, the first below the end", hint)
            return 0, None
        return found[0], found[1] - found[0]

    def reference(self, loc: Loc, given: Any) -> Reference | None:
        """A model's reference: text, or a mapping of its parts."""
        if given is None:
            return None
        if isinstance(given, str):
            model, _, lora = given.partition("+")
            return Reference(model.strip(), lora.strip())
        if isinstance(given, Mapping) and given.get("model"):
            self.known(loc, given, ("model", "lora", "override_architecture"))
            if given.get("override_architecture"):
                self.note((*loc, "override_architecture"), "names of tensors come from the files")
            return Reference(_path(given["model"]), _path(given.get("lora")))
        self.fault(loc, f"{dotted(loc)} must be a model: a Hub id or a path")
        return None

    def check_words(self, preset: Preset, piece: Slice) -> None:
        """Parameters that the method does not read, where they stand."""
        each = tuple(word for word, how in preset.words.items() if how.each)
        for source in piece.sources:
            if not preset.apart or source.reference != piece.base:
                self.unread(source.loc, source.parameters, each)
        above: list[Loc] = [()]
        if piece.loc[0] == "modules":
            above.append(piece.loc[:2])
        if "slices" in piece.loc:
            above.append(piece.loc)
        for loc, level in zip(reversed(above), piece.levels, strict=True):
            self.unread(loc, level, (*preset.words, *preset.idle))

    def unread(self, loc: Loc, given: Mapping[str, Any], read: Sequence[str]) -> None:
        """Notes what of `parameters` nothing reads."""
        for key in given:
            if key not in read:
                self.note((*loc, "parameters", key), did_you_mean(key, list(read)))

    def known(self, loc: Loc, given: Any, known: Sequence[str]) -> None:
        """Notes keys that say nothing; a fault where it is no mapping."""
        if not isinstance(given, Mapping):
            self.fault(loc, f"{dotted(loc) or 'the file'} must be a mapping")
        for key in as_map(given):
            if key not in known:
                self.note((*loc, key), did_you_mean(key, list(known)))

    def note(self, loc: Loc, hint: str) -> None:
        """Tells of a key that mergekit ignores."""
        told = f"mergekit ignores '{dotted(loc)}', and so does this"
        note = Problem(told, self.where(loc), hint)
        if note not in self.ignored:
            self.ignored.append(note)

    def fault(self, loc: Loc, message: str, hint: str = "") -> None:
        """Tells of what cannot be converted."""
        problem = Problem(message, self.where(loc), hint)
        if problem not in self.problems:
            self.problems.append(problem)

    def line(self, loc: Loc) -> int | str:
        """The line of a key, or of what it stands in."""
        lines = self.document.lines
        return next((lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in lines), 1)

    def where(self, loc: Loc) -> str:
        """The file and the line of a key."""
        line = self.line(loc)
        return f"{self.document.file}:{line}" if isinstance(line, int) else line


def layer_range(given: Any) -> tuple[int, int] | None:
    """The first layer and the end of a range, [0, 16] or ["0", 16.0]; None for what is none."""
    try:
        first, end = map(float, given) if isinstance(given, list) else (0.0, 0.0)
    except (TypeError, ValueError):
        return None
    whole = first.is_integer() and end.is_integer()
    return (int(first), int(end)) if whole and 0 <= first < end else None


def as_map(given: Any) -> Mapping[str, Any]:
    """The mapping, or an empty one for what should have been one."""
    return given if isinstance(given, Mapping) else {}


def as_list(given: Any) -> Sequence[Any]:
    """The list, or an empty one."""
    return given if isinstance(given, list) else []


def _path(given: Any) -> str:
    """A model's path as text: path@revision."""
    if isinstance(given, Mapping):
        revision = given.get("revision")
        return f"{given.get('path', '')}" + (f"@{revision}" if revision else "")
    return str(given or "")
