"""Which tensors of which models an output tensor is made of, where layers are stacked anew.

A piece is a reader view: every model's tensors under the names that they have in the output.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import takewhile

from mowmerge.checkpoint import layers, naming
from mowmerge.errors import Problem
from mowmerge.recipe.layers import written
from mowmerge.recipe.model import Recipe
from mowmerge.recipe.values import Place, Setting
from mowmerge.tensors import TensorSpec

Specs = Mapping[str, Mapping[str, TensorSpec]]  # model -> name -> the tensor as it is stored
Layers = Mapping[tuple[str, int], Mapping[str, TensorSpec]]  # stack, number -> .mlp.up -> tensor


@dataclass(frozen=True)
class Piece:
    """Output tensors that are made alike.

    places: where each of them stands. specs: each model's tensors by output name. like: the model
    whose tensors say what there is, and in which shape. taking: the models of which nothing may
    be left over.
    """

    places: Mapping[str, Place]
    specs: Specs
    like: str
    taking: Collection[str]


@dataclass
class Cut:
    """The pieces of an output, its stacks of layers where those are new, and what is wrong."""

    pieces: list[Piece]
    stacks: dict[str, layers.Made] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the output, as it is stored where it is taken from."""
        return {
            name: piece.specs[piece.like][name] for piece in self.pieces for name in piece.places
        }


def cut(recipe: Recipe, donor: str, specs: Specs) -> Cut:
    """The pieces of a recipe's output: one, or with slices what is outside the layers, each slice,
    and the other stacks of layers as they are."""
    places = {name: _place(name, depth) for name, depth in naming.depths(specs[donor]).items()}
    if not recipe.slices:
        return Cut([Piece(places, specs, donor, specs)])
    return _Cutter(recipe, donor, specs).cut(places)


def absent(recipe: Recipe, piece: Piece, name: str, chosen: Setting) -> Problem | None:
    """What is wrong where a rule names models of which the tensor's slice takes nothing."""
    models = [model for model in chosen.models if model not in piece.specs]
    if not models:
        return None
    told = f"'{name}': its slice takes nothing of {', '.join(models)}"
    where = recipe.where("rules", chosen.rule or 0, "models")
    return Problem(told, where, "name models of the slice")


def _place(name: str, depth: float, index: int | None = None, within: float = 0.0) -> Place:
    stack = naming.stack(name)
    return Place(name, naming.role(name), stack[1] if stack else None, depth, index, within)


def _by_layer(held: Mapping[str, TensorSpec]) -> Layers:
    """A model's tensors by stack, number and the name that they have inside the layer."""
    found: dict[tuple[str, int], dict[str, TensorSpec]] = {}
    for name, spec in held.items():
        if place := naming.stack(name):
            inside = name[len(place[0]) :].lstrip("0123456789")
            found.setdefault(place, {})[inside] = spec
    return found


def _named(stack: str, asked: Sequence[str]) -> bool:
    """Whether a pattern fits the name of a stack, with its last dot or without."""
    return any(fnmatchcase(name, glob) for glob in asked for name in (stack, stack.rstrip(".")))


def _shared(name: str, stack: str) -> int:
    """How many parts a name and a stack's begin with alike."""
    pairs = zip(name.split("."), stack.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


class _Cutter:
    def __init__(self, recipe: Recipe, donor: str, specs: Specs) -> None:
        self.recipe, self.donor, self.specs = recipe, donor, specs
        self.layers = {model: _by_layer(held) for model, held in specs.items()}
        self.found = Cut([])

    def cut(self, places: Mapping[str, Place]) -> Cut:
        """The pieces, or what is wrong; `places` are the donor's."""
        by_stack: dict[str, list[int]] = {}
        for i in range(len(self.recipe.slices)):
            stack = self._stack(i)
            if stack and self._deep_enough(i, stack):
                by_stack.setdefault(stack, []).append(i)
        if not self.found.problems:
            self._outside(places, by_stack)
            self._others(places, by_stack)
            for stack, numbers in by_stack.items():
                self._slices(stack, numbers)
        return self.found

    def _stack(self, i: int) -> str | None:
        """The stack that a slice is of: the one it names; of several, and where it names none, the
        only one with attention in it."""
        layers, asked = self.layers[self.donor], self.recipe.slices[i].stack
        every = list(dict.fromkeys(stack for stack, _ in layers))
        named = [stack for stack in every if asked is None or _named(stack, asked)]
        attend = {
            stack
            for (stack, _), held in layers.items()
            if any(naming.role(spec.name) == "attention" for spec in held.values())
        }
        found = [stack for stack in named if stack in attend] or named
        if len(found) == 1:
            return found[0]
        told = f"slices.{i}: which stack of layers it is of is not clear"
        if asked is not None and not named:
            told = f"slices.{i}: there is no stack of layers '{', '.join(asked)}'"
        names = ", ".join(stack.rstrip(".") for stack in every) or "none"
        where = self.recipe.where("slices", i)
        self.found.problems.append(Problem(told, where, f"stack: one of {names}"))
        return None

    def _depth(self, model: str, stack: str) -> int:
        return 1 + max((n for of, n in self.layers[model] if of == stack), default=-1)

    def _deep_enough(self, i: int, stack: str) -> bool:
        """Whether models have the layers that a slice takes; a problem for each that has not."""
        piece, fine = self.recipe.slices[i], True
        for model in self._taking(i):
            count, first = self._depth(model, stack), piece.first(model)
            last = first + piece.length - 1
            if last < count or (model == "base" and "base" not in piece.layers):
                continue
            fine = False
            has = f"has {count} (0..{count - 1})" if count else f"has no '{stack.rstrip('.')}'"
            self.found.problems.append(
                Problem(
                    f"slices.{i}: layers {written((first, last))} of '{model}', which {has}",
                    self.recipe.where("slices", i, "layers", model),
                    "both ends of a range are included, and the first layer is 0",
                )
            )
        return fine

    def _taking(self, i: int) -> list[str]:
        """The models of a slice, and the base where the recipe names one."""
        models = self.recipe.slices[i].models(self.recipe.models)
        return ["base", *models] if self.recipe.base is not None else list(models)

    def _outside(self, places: Mapping[str, Place], sliced: Mapping[str, Sequence[int]]) -> None:
        """What the donor has outside the layers, by the slices of the stack that is nearest: before
        the layers by the first of them, after them by the last. Beside a stack that is not sliced
        it is no slice's. A rule may take it of any model."""
        every = dict.fromkeys([*sliced, *(stack for stack, _ in self.layers[self.donor])])
        found = {}
        for name, place in places.items():
            if naming.stack(name) is not None:
                continue
            near = {stack: _shared(name, stack) for stack in every}
            beside = [
                i for s, n in near.items() if n == max(near.values()) for i in sliced.get(s, ())
            ]
            i = (max(beside) if place.depth else min(beside)) if beside else None
            found[name] = replace(place, slice=i, within=place.depth)
        views = {
            model: {n: s for n, s in held.items() if naming.stack(n) is None}
            for model, held in self.specs.items()
        }
        taking = dict.fromkeys(
            model
            for i in dict.fromkeys(place.slice for place in found.values())
            for model in (views if i is None else self._taking(i))
        )
        self.found.pieces.append(Piece(found, views, self.donor, taking))

    def _others(self, places: Mapping[str, Place], sliced: Mapping[str, object]) -> None:
        """The stacks of layers that are not sliced."""

        def kept(name: str) -> bool:
            place = naming.stack(name)
            return place is not None and place[0] not in sliced

        found = {name: place for name, place in places.items() if kept(name)}
        if found:
            views = {m: {n: s for n, s in v.items() if kept(n)} for m, v in self.specs.items()}
            self.found.pieces.append(Piece(found, views, self.donor, views))

    def _slices(self, stack: str, numbers: Sequence[int]) -> None:
        """A piece for each slice of a stack, and what its layers were."""
        total = sum(self.recipe.slices[i].length for i in numbers)
        known: dict[str, set[tuple[int, ...]]] = {}  # the shapes in the donor's layers
        for (of, _), held in self.layers[self.donor].items():
            for inside, spec in held.items() if of == stack else ():
                known.setdefault(inside, set()).add(spec.shape)
        made: list[tuple[str, int]] = []
        for i in numbers:
            piece, start, places = self.recipe.slices[i], len(made), {}
            like = piece.models(self.recipe.models)[0]
            for k in range(piece.length):
                at = (start + k) / max(1, total - 1), k / max(1, piece.length - 1)
                for inside, spec in (
                    self.layers[like].get((stack, piece.first(like) + k), {}).items()
                ):
                    name = f"{stack}{start + k}{inside}"
                    places[name] = _place(name, at[0], i, at[1])
                    self._fits(inside, spec, like, known)
                made.append((like, piece.first(like) + k))
            views = {m: self._moved(m, stack, i, start) for m in self._taking(i)}
            views = {model: view for model, view in views.items() if view}
            self.found.pieces.append(Piece(places, views, like, views))
        self.found.stacks[stack] = made

    def _moved(self, model: str, stack: str, i: int, start: int) -> Mapping[str, TensorSpec]:
        """A model's layers of a slice by the names that they get; none of a base too short."""
        piece, layers = self.recipe.slices[i], self.layers[model]
        numbers = range(piece.first(model), piece.first(model) + piece.length)
        if self._depth(model, stack) < numbers.stop:
            return {}
        return {
            f"{stack}{start + k}{inside}": spec
            for k, number in enumerate(numbers)
            for inside, spec in layers.get((stack, number), {}).items()
        }

    def _fits(
        self, inside: str, spec: TensorSpec, model: str, known: Mapping[str, set[tuple[int, ...]]]
    ) -> None:
        """A problem where a layer is not like any of the model whose config the output has."""
        shapes = known.get(inside)
        if shapes is not None and spec.shape in shapes:
            return
        told = "and the donor's layers have none"
        if shapes is not None:
            other = " or ".join(str(list(shape)) for shape in sorted(shapes))
            told = f"and {other} in '{self.donor}', whose config the output has"
        self.found.problems.append(
            Problem(
                f"tensor '{spec.name}' has the shape {list(spec.shape)}, {told}",
                f"model '{model}'",
                "only layers of one architecture and width can be stacked",
            )
        )
