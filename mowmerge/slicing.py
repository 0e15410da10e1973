"""Which tensors of which models an output tensor is made of, where layers are stacked anew.

A piece is a reader view: every model's tensors under the names that they have in the output.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mowmerge.checkpoint import layers, naming
from mowmerge.errors import Problem
from mowmerge.recipe.layers import written
from mowmerge.recipe.model import Recipe
from mowmerge.recipe.values import Place, Setting
from mowmerge.tensors import TensorSpec

Specs = Mapping[str, Mapping[str, TensorSpec]]  # model -> name -> the tensor as it is stored


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


def cut(recipe: Recipe, donor: str, specs: Specs) -> Cut:
    """The pieces of a recipe's output: one, or with slices what is outside the layers, each slice,
    and the other stacks of layers as they are."""
    places = {name: _place(name, depth) for name, depth in naming.depths(specs[donor]).items()}
    if not recipe.slices:
        return Cut([Piece(places, specs, donor, specs)])
    found = Cut([])
    by_stack: dict[str, list[int]] = {}
    for i in range(len(recipe.slices)):
        stack = _stack(recipe, i, specs[donor], found)
        if stack and _deep_enough(recipe, i, stack, specs, found):
            by_stack.setdefault(stack, []).append(i)
    if found.problems:
        return found
    found.pieces.append(_outside(recipe, places, donor, specs))
    others = {n: p for n, p in places.items() if _whole(n, by_stack)}
    if others:
        views = {m: {n: s for n, s in v.items() if _whole(n, by_stack)} for m, v in specs.items()}
        found.pieces.append(Piece(others, views, donor, views))
    for stack, numbers in by_stack.items():
        _layers(recipe, stack, numbers, donor, specs, found)
    return found


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


def _outside(recipe: Recipe, places: Mapping[str, Place], donor: str, specs: Specs) -> Piece:
    """What the donor has before the layers, by the first slice's models; after them, the last's."""
    last = len(recipe.slices) - 1
    found = {
        name: replace(place, slice=last if place.depth else 0, within=place.depth)
        for name, place in places.items()
        if naming.stack(name) is None
    }
    views = {m: {n: s for n, s in v.items() if naming.stack(n) is None} for m, v in specs.items()}
    return Piece(
        found,
        views,
        donor,
        dict.fromkeys([*_taking(recipe, 0, specs), *_taking(recipe, last, specs)]),
    )


def _whole(name: str, sliced: Mapping[str, object]) -> bool:
    """Whether a tensor is of a stack that is not sliced."""
    place = naming.stack(name)
    return place is not None and place[0] not in sliced


def _taking(recipe: Recipe, index: int, specs: Specs) -> list[str]:
    """The models of a slice, and the base where the recipe names one."""
    models = recipe.slices[index].models(recipe.models)
    return [*(["base"] if "base" in specs and "base" not in models else []), *models]


def _stack(recipe: Recipe, i: int, held: Mapping[str, TensorSpec], found: Cut) -> str | None:
    """The stack that a slice is of: the one it names, or the only one with attention in it."""
    places = {name: naming.stack(name) for name in held}
    every = list(dict.fromkeys(place[0] for place in places.values() if place))
    asked = recipe.slices[i].stack
    if asked is not None:
        named = [stack for stack in every if stack.rstrip(".") == asked.rstrip(".")]
    else:
        attend = {p[0] for n, p in places.items() if p and naming.role(n) == "attention"}
        named = [stack for stack in every if stack in attend or not attend]
    if len(named) == 1:
        return named[0]
    names = ", ".join(stack.rstrip(".") for stack in every) or "none"
    told = f"slices.{i}: which stack of layers it is of is not clear"
    told = f"slices.{i}: there is no stack of layers '{asked}'" if asked else told
    found.problems.append(Problem(told, recipe.where("slices", i), f"stack: one of {names}"))
    return None


def _deep_enough(recipe: Recipe, i: int, stack: str, specs: Specs, found: Cut) -> bool:
    """Whether every model has the layers that a slice takes of it; a problem for each that has
    not."""
    piece, fine = recipe.slices[i], True
    for model in _taking(recipe, i, specs):
        count = naming.layers(specs[model], stack)
        last = piece.first(model) + piece.length - 1
        if last < count or (model == "base" and "base" not in piece.layers):
            continue
        fine = False
        has = f"has {count} (0..{count - 1})" if count else f"has no '{stack.rstrip('.')}'"
        wanted = written((piece.first(model), last))
        found.problems.append(
            Problem(
                f"slices.{i}: layers {wanted} of '{model}', which {has}",
                recipe.where("slices", i, "layers", model),
                "both ends of a range are included, and the first layer is 0",
            )
        )
    return fine


def _layers(
    recipe: Recipe, stack: str, numbers: Sequence[int], donor: str, specs: Specs, found: Cut
) -> None:
    """A piece for each slice of a stack, and what its layers were."""
    known = _shapes(stack, specs[donor])
    total = sum(recipe.slices[i].length for i in numbers)
    made: list[tuple[str, int]] = []
    for i in numbers:
        piece, start = recipe.slices[i], len(made)
        views: dict[str, Mapping[str, TensorSpec]] = {}
        for model in _taking(recipe, i, specs):
            moved = {piece.first(model) + k: start + k for k in range(piece.length)}
            if naming.layers(specs[model], stack) > max(
                moved
            ):  # else a base that nobody has asked for
                views[model] = _moved(stack, specs[model], moved)
        like = piece.models(recipe.models)[0]
        places = {}
        for name, spec in views[like].items():
            layer = int((naming.stack(name) or ("", 0))[1])
            within = (layer - start) / max(1, piece.length - 1)
            places[name] = _place(name, layer / max(1, total - 1), i, within)
            _fits(name, stack, spec, known, (like, donor), found)
        found.pieces.append(Piece(places, views, like, views))
        made += [(like, piece.first(like) + k) for k in range(piece.length)]
    found.stacks[stack] = made


def _moved(
    stack: str, held: Mapping[str, TensorSpec], moved: Mapping[int, int]
) -> Mapping[str, TensorSpec]:
    """A model's tensors of some layers of a stack, by the names of the layers that they become."""
    view = {}
    for name, spec in held.items():
        place = naming.stack(name)
        if place and place[0] == stack and place[1] in moved:
            view[f"{stack}{moved[place[1]]}{_inside(name, stack)}"] = spec
    return dict(sorted(view.items(), key=lambda item: (naming.stack(item[0]) or ("", 0))[1]))


def _inside(name: str, stack: str) -> str:
    """What follows the number of the layer: .mlp.up_proj.weight."""
    return name[len(stack) :].lstrip("0123456789")


def _shapes(stack: str, held: Mapping[str, TensorSpec]) -> Mapping[str, set[tuple[int, ...]]]:
    """The shapes that a tensor has in the layers of a stack."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, spec in held.items():
        if (place := naming.stack(name)) and place[0] == stack:
            shapes.setdefault(_inside(name, stack), set()).add(spec.shape)
    return shapes


def _fits(
    name: str,
    stack: str,
    spec: TensorSpec,
    known: Mapping[str, set[tuple[int, ...]]],
    models: tuple[str, str],
    found: Cut,
) -> None:
    """A problem where a layer is not like any of the model whose config the output has."""
    shapes, (model, donor) = known.get(_inside(name, stack)), models
    if shapes is not None and spec.shape in shapes:
        return
    told = "and the donor's layers have none"
    if shapes is not None:
        other = " or ".join(str(list(shape)) for shape in sorted(shapes))
        told = f"and {other} in '{donor}', whose config the output has"
    found.problems.append(
        Problem(
            f"tensor '{spec.name}' has the shape {list(spec.shape)}, {told}",
            f"model '{model}'",
            "only layers of one architecture and width can be stacked",
        )
    )
