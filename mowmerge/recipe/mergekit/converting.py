"""One document of mergekit's as a recipe of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from mowmerge.errors import Problem
from mowmerge.methods.registry import get
from mowmerge.recipe.layers import written
from mowmerge.recipe.mergekit import beside
from mowmerge.recipe.mergekit.presets import MODULES, Preset, Word
from mowmerge.recipe.mergekit.reading import Reader, Reference, Slice, Source
from mowmerge.recipe.mergekit.values import Range, Unsaid, replaced, value
from mowmerge.recipe.model import Loc
from mowmerge.recipe.text import Document


@dataclass
class Converter:
    """Makes the recipe of one document: its data, and the line that each key comes from.

    made: the recipes of the documents that it may take models from, by name. names: what each
    model is called, and the second of one that a slice takes twice.
    """

    reader: Reader
    made: Mapping[str, Document]
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Loc, int | str] = field(default_factory=dict)
    names: dict[tuple[Reference, int], str] = field(default_factory=dict)

    def convert(self) -> Document:
        """The document as a recipe of ours, as far as it is right."""
        reader, given = self.reader, self.reader.document.data
        preset, body = reader.preset(), reader.kind()
        if preset and body:
            self._put(("method",), preset.method, ("merge_method",))
            base = reader.reference(("base_model",), given.get("base_model"))
            parts = reader.parts(base)
            if any(parts.values()) and not reader.problems:
                self._merge(preset, base, parts)
        for key, (told, origin) in beside.found(reader, self.names).items():
            self._put((key,), told, origin)
        found = Document(reader.document.file, self.data, self.lines)
        found.problems = [*reader.document.problems, *reader.problems]
        return found

    def _merge(
        self, preset: Preset, base: Reference | None, parts: Mapping[str, Sequence[Slice]]
    ) -> None:
        """Models, base, parameters and slices of the recipe; of several modules a rule for each,
        and what is in none is dropped, as mergekit does not write it."""
        slices = [piece for part in parts.values() for piece in part]
        if preset.apart and not self._apart(slices):
            return
        self._name(preset, slices[0].base if preset.apart else base, slices)
        if preset.defaults:
            self._put(("parameters",), preset.defaults, ("parameters",))
        for piece in slices:
            self.reader.check_words(preset, piece)
        if "" in parts and slices[0].length is None:
            self._whole(preset, slices[0])
            return
        if any(piece.length for piece in slices):
            self._put(("slices",), [], slices[0].loc[:-1])
        rules: list[Any] = []
        for name in (n for n in ("", *MODULES) if n in parts):
            for piece in parts[name]:
                if piece.length:
                    self._slice(preset, piece, name)
            if name:
                self.lines["rules", len(rules)] = self.reader.line(("modules", name))
                rules.append(self._rule(preset, name, parts[name][0]))
        if rules:
            self.data["rules"] = [*rules, {"match": {}, "drop": True}]

    def _apart(self, slices: Sequence[Slice]) -> bool:
        """Puts the base that all slices have; false, with a fault, where that is not one."""
        fault, bases = self.reader.fault, {piece.base for piece in slices}
        for piece in slices:
            if piece.base and all(source.reference != piece.base for source in piece.sources):
                hint = "mergekit needs it there, with the layers that are taken of it"
                fault(piece.loc, "the base_model is not among the sources of the slice", hint)
            if not piece.others:
                fault(piece.loc, "nothing but the base is merged here", "name a model beside it")
        if len(bases) > 1:
            fault(slices[0].loc, "the base_model has to be one for all modules")
        (base, *_) = bases
        if base:
            self._put(("base",), self._base(base), ("base_model",))
        for piece in slices:
            for source in piece.sources:
                if source.reference == base:
                    self.reader.unread(source.loc, source.parameters, ())
        return not self.reader.problems

    def _base(self, base: Reference) -> Any:
        """The base as a recipe has it; with a LoRA on it, it is one of its own."""
        source = self._entry(base)
        if isinstance(source, Mapping) and "adapter" in source:
            return {"models": {"model": source}, "method": "passthrough"}
        return source["source"] if isinstance(source, Mapping) else source

    def _entry(self, reference: Reference) -> Any:
        """A model as an entry of `models`; another document's merge is a nested recipe."""
        path, _, revision = reference.model.partition("@")
        made = self.made.get(path) if not revision else None
        source: Any = deepcopy(made.data) if made else reference.model
        if reference.lora:
            if source == "base" and self.data.get("base") != "base":
                source = "./base"  # a folder of that name, and not the base that the recipe has
            return {"source": source, "adapter": reference.lora}
        return {"source": source} if made else source

    def _name(self, preset: Preset, base: Reference | None, slices: Sequence[Slice]) -> None:
        """Names for the models, and their entries; the first gives config and tokenizer."""
        self._put(("models",), {}, slices[0].loc)
        taking = [piece.others if preset.apart else piece.sources for piece in slices]
        if base and not preset.apart:
            if any(source.reference == base for sources in taking for source in sources):
                self._called(base, 0, ("base_model",))
            else:  # of slices: config and tokenizer are its
                self._put(("base",), self._base(base), ("base_model",))
        for sources in taking:
            seen: Counter[Reference] = Counter()
            for source in sources:
                source.name = self._called(source.reference, seen[source.reference], source.loc)
                seen[source.reference] += 1
        if base and "base" in self.data:
            self._nest(("base",), base)

    def _called(self, reference: Reference, number: int, origin: Loc) -> str:
        """The name of a model, the second of one that a slice takes twice; its entry is made."""
        key = reference, number
        if key not in self.names:
            taken, name = {*self.names.values(), "base"}, reference.name
            others = (f"{name}-{n}" for n in range(2, len(taken) + 3))
            name = name if name not in taken else next(n for n in others if n not in taken)
            self.names[key] = name
            self._put(("models", name), self._entry(reference), origin)
            self._nest(("models", name, "source"), reference)
        return self.names[key]

    def _nest(self, loc: Loc, reference: Reference) -> None:
        """The lines of a nested recipe, which another document is."""
        made = self.made.get(reference.model)
        if made:
            self.lines.update({(*loc, *at): line for at, line in made.lines.items()})

    def _whole(self, preset: Preset, piece: Slice) -> None:
        """The parameters of a merge of whole models: in `models` where each has its own."""
        sources = self._ordered(preset, piece)
        for ours, given in self._parameters(preset, piece).items():
            if isinstance(given, dict):
                for source in sources:
                    if source.name not in given:
                        continue
                    entry = self.data["models"][source.name]
                    entry = entry if isinstance(entry, dict) else {"source": entry}
                    self.data["models"][source.name] = {**entry, ours: given[source.name]}
                    self.lines["models", source.name, ours] = self.reader.line(source.loc)
            else:
                self.data.setdefault("parameters", {})
                self._put(("parameters", ours), given, piece.loc)
        if preset.base == "first":
            self.data["models"] = {s.name: self.data["models"][s.name] for s in sources}

    def _slice(self, preset: Preset, piece: Slice, module: str) -> None:
        """One slice, with every parameter in it: gradients run over it."""
        taken, i = {}, len(self.data["slices"])
        for source in self._ordered(preset, piece):
            taken[source.name] = self._span(source)
        for source in piece.sources:
            if source not in self._ordered(preset, piece):
                taken["base"] = self._span(source)
        made: dict[str, Any] = {"layers": taken}
        if module:
            made["stack"] = list(MODULES[module])
        parameters = self._parameters(preset, piece)
        if parameters:
            made["parameters"] = parameters
        self.data["slices"].append(made)
        self.lines["slices", i] = self.reader.line(piece.loc)
        for source in piece.sources:
            self.lines["slices", i, "layers", source.name or "base"] = self.reader.line(source.loc)

    def _span(self, source: Source) -> int | str:
        return written((source.first, source.first + (source.length or 1) - 1))

    def _ordered(self, preset: Preset, piece: Slice) -> list[Source]:
        """The inputs in the order in which the method takes them."""
        if preset.base == "first":
            first = [source for source in piece.sources if source.reference == piece.base]
            return [*first, *piece.others]
        return piece.sources if preset.base == "listed" else piece.others

    def _parameters(self, preset: Preset, piece: Slice) -> dict[str, Any]:
        """Every parameter that some level sets: one value, or a map where models differ."""
        found: dict[str, Any] = {}
        sources = self._ordered(preset, piece)
        for theirs, word in preset.words.items():
            if word.ours == "axis":
                found |= self._axis(preset, piece)
                continue
            if not word.each:
                at = Range(piece.start, piece.length, piece.final)
                given = self._value(theirs, word, piece.levels, at, piece.loc)
                found |= {} if given is None else {word.ours: given}
                continue
            each = {}
            for source in sources:
                at = Range(piece.start, piece.length, source.first)
                levels = [source.parameters, *piece.levels]
                given = self._value(theirs, word, levels, at, source.loc)
                if given is not None:
                    each[source.name] = given
            values = list(each.values())
            if len(values) == len(sources) and all(v == values[0] for v in values):
                found[word.ours] = values[0]
            elif each:
                found[word.ours] = each
        return found

    def _axis(self, preset: Preset, piece: Slice) -> dict[str, Any]:
        """nuslerp's two flags are one word here."""
        at = Range(piece.start, piece.length, piece.final)
        flat, across = (
            self._value(theirs, preset.words[theirs], piece.levels, at, piece.loc)
            for theirs in ("nuslerp_flatten", "nuslerp_row_wise")
        )
        if flat in (None, "all"):
            return {}
        if not isinstance(across, list):
            return {"axis": replaced(flat, {"rows": across or "rows"})}
        if isinstance(flat, list):
            told = "nuslerp_flatten and nuslerp_row_wise both depend on the tensor"
            self.reader.fault(piece.loc, told, "one of them is to hold for all tensors")
        return {"axis": [*across, *([{"value": "rows"}] if "match" in across[-1] else [])]}

    def _value(
        self, theirs: str, word: Word, levels: Sequence[Mapping[str, Any]], at: Range, loc: Loc
    ) -> Any:
        """A parameter at all levels; a fault where mergekit has to have one and has none."""
        given = [level[theirs] for level in levels if theirs in level]
        try:
            found, everywhere = value(given, word, at)
        except Unsaid as error:
            self.reader.fault(loc, f"'{theirs}' {error}")
            return None
        if word.required and found is None:
            self.reader.fault(loc, f"mergekit needs '{theirs}' here, and no level gives it")
        elif found is not None and not everywhere and word.default is not None:
            found = [*found, {"value": word.default}]
        elif word.required and not everywhere:
            told = f"'{theirs}' is ours by default where no filter matches; mergekit stops there"
            self.reader.ignored.append(
                Problem(told, self.reader.where(loc), "end with a value without filter")
            )
        return found

    def _rule(self, preset: Preset, name: str, piece: Slice) -> dict[str, Any]:
        """The rule that keeps a module's tensors: merged whole, or as its slices say."""
        match = {"tensors": list(MODULES[name])}
        if piece.length:
            return {"match": match}
        sliced = [key for each in self.data.get("slices", ()) for key in each.get("parameters", {})]
        ours = {key: spec.default for key, spec in get(preset.method).parameters.items()}
        ours |= preset.defaults  # said, since beside a slice's layers its values would hold
        parameters = {key: ours[key] for key in sliced} | self._parameters(preset, piece)
        models = [source.name for source in self._ordered(preset, piece)]
        rule = {"match": match, "models": models, "parameters": parameters}
        return {key: given for key, given in rule.items() if given}

    def _put(self, loc: Loc, found: Any, origin: Loc) -> None:
        """Puts a value into the recipe, and remembers the line that it comes from."""
        here: Any = self.data
        for part in loc[:-1]:
            here = here[part]
        here[loc[-1]] = found
        self.lines[loc] = self.reader.line(origin)
