"""Finds every model that a recipe names: checkpoints, nested recipes, adapters on either."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from mowmerge.checkpoint import encoder, peft, source
from mowmerge.errors import CheckpointError, Problem, SourceError, did_you_mean
from mowmerge.plan import Adapted, Plan, Source, Stored
from mowmerge.recipe.model import AdapterRef, Loc, ModelRef, Recipe, existing


@dataclass
class Search:
    """A recipe's sources by name, base first; `nested` plans the recipes among them."""

    recipe: Recipe
    download: bool
    allow_pickle: bool
    nested: Callable[[str, Recipe], Plan]
    warnings: list[str] = field(default_factory=list)

    def sources(self) -> dict[str, Source]:
        """All of them; CheckpointError or SourceError with everything that is wrong with any."""
        models = self.recipe.models
        wanted = {name: ref.source for name, ref in models.items() if not self.on_base(ref)}
        if self.recipe.base is not None:  # no model is named base: the recipe's check saw to it
            wanted = {"base": self.recipe.base, **wanted}
        plain: dict[str, Stored | Plan] = {}
        problems: list[Problem] = []
        for name, origin in wanted.items():
            try:
                plain[name] = self.plain(name, origin)
            except (CheckpointError, SourceError) as error:
                if isinstance(origin, Recipe):
                    raise
                key = ("base",) if name == "base" else ("models", name)
                problems += _placed(self.recipe.where(*key), error.problems)
                kind = type(error)
        if problems:
            raise kind(problems)
        found: dict[str, Source] = {"base": plain["base"]} if "base" in wanted else {}
        for name, ref in models.items():
            model = plain["base" if self.on_base(ref) else name]
            found[name] = self.adapted(name, model, ref.adapter) if ref.adapter else model
        return found

    def encoder(self, donor: Path) -> encoder.Named | None:
        """The model that classifiers look at, where the recipe names one, as it reads what is made
        for the donor."""
        if self.recipe.encoder is None:
            return None
        try:
            return encoder.described(self._find(self.recipe.encoder), donor)
        except (CheckpointError, SourceError) as error:
            raise type(error)(_placed(self.recipe.where("encoder"), error.problems)) from error

    def tokenizer(self) -> Stored | None:
        """The files of a tokenizer that is none of the models', where `vocabulary` names one."""
        asked = self.recipe.vocabulary and self.recipe.vocabulary.outside
        if not asked:
            return None
        try:
            return self._find(asked, "tokenizer")
        except SourceError as error:
            at = self.recipe.where("vocabulary", "source", "tokenizer")
            raise SourceError(_placed(at, error.problems)) from error

    def on_base(self, ref: ModelRef) -> bool:
        """Whether a model is adapters on the recipe's base, which `source: base` then means."""
        return bool(ref.adapter) and ref.source == "base" and self.recipe.base is not None

    def plain(self, name: str, origin: str | Recipe) -> Stored | Plan:
        """A model without its adapters."""
        if isinstance(origin, Recipe):
            return self.nested(name, origin)
        stored = self._find(origin)
        source.refuse_dynamic(stored)
        return stored

    def _find(self, origin: str, kind: source.Kind = "checkpoint") -> Stored:
        where = os.path.expanduser(self.recipe.locate(origin))
        try:
            return source.find(
                where, download=self.download, allow_pickle=self.allow_pickle, kind=kind
            )
        except SourceError as error:
            near = _near(self.recipe, origin)
            told = [replace(problem, hint=near or problem.hint) for problem in error.problems]
            raise SourceError(told) from error

    def adapted(self, name: str, model: Stored | Plan, refs: Iterable[AdapterRef]) -> Adapted:
        """The model with the adapters that the recipe puts on it."""
        try:
            adapters = [peft.read(self._find(r.source, "adapter"), r.weight) for r in refs]
            wide = self.recipe.output.format == "adapter"
            found, told = peft.adapted(model, adapters, wide=wide)
        except (CheckpointError, SourceError) as error:
            at = self.recipe.where("models", name, "adapter")
            raise type(error)(_placed(at, error.problems)) from error
        self.warnings += [f"{name}: {line}" for line in told]
        return found


def here(recipe: Recipe) -> bool:
    """Whether every model that a recipe names is a path on this machine.

    Raises:
        SourceError: those that can be nothing but paths, and are not there.
    """
    if lost := list(_lost(recipe)):
        raise SourceError(lost)
    return all(
        here(each) if isinstance(each, Recipe) else bool(existing(each, recipe.folder))
        for _, each in _named(recipe)
    )


def _lost(recipe: Recipe) -> Iterator[Problem]:
    for loc, each in _named(recipe):
        if isinstance(each, Recipe):
            yield from _lost(each)
        elif not existing(each, recipe.folder) and source.is_path(each):
            message, hint = f"there is no folder or file '{each}'", _near(recipe, each)
            yield Problem(message, recipe.where(*loc), hint or source.WANTED)


def _named(recipe: Recipe) -> Iterator[tuple[Loc, str | Recipe]]:
    """Every source that a recipe names, and where."""
    if recipe.base is not None:
        yield ("base",), recipe.base
    if recipe.encoder is not None:
        yield ("encoder",), recipe.encoder
    for name, ref in recipe.models.items():
        if not (ref.adapter and ref.source == "base"):
            yield ("models", name), ref.source
        for each in ref.adapter:
            yield ("models", name, "adapter"), each.source
    if recipe.vocabulary and recipe.vocabulary.outside:
        yield ("vocabulary", "source", "tokenizer"), recipe.vocabulary.outside


def _near(recipe: Recipe, origin: str) -> str:
    """The hint that names what lies where a path is not, and is called nearly so."""
    path = recipe.folder / Path(origin).expanduser()
    if existing(origin, recipe.folder) or not path.parent.is_dir():
        return ""
    hint = did_you_mean(path.name, [beside.name for beside in path.parent.iterdir()])
    return hint if hint.startswith("did") else ""


def adapted(recipe: Recipe, name: str) -> Adapted:
    """A model of the recipe that is a checkpoint with adapters on it.

    Raises:
        CheckpointError, SourceError: what is not there, or does not fit.
    """

    def nested(name: str, inner: Recipe) -> Plan:
        raise CheckpointError("it is itself a recipe", hint="merge it first")

    ref, search = recipe.models[name], Search(recipe, True, False, nested)
    below = recipe.base if search.on_base(ref) else ref.source
    assert below is not None
    found = search.adapted(name, search.plain(name, below), ref.adapter)
    return replace(found, wide=False)


def _placed(at: str, problems: Iterable[Problem]) -> list[Problem]:
    """The problems with the recipe's line before where they are."""
    return [Problem(p.message, f"{at}: {p.where}" if p.where else at, p.hint) for p in problems]
