"""Layers in a recipe: numbers and ranges of them, and the slices that stack them anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator

from mowmerge.recipe.fields import Globs, Strict, listed, one_or_more

SPAN = r"[0-9]+\.\.[0-9]*"
CLOSED = r"[0-9]+\.\.[0-9]+"
LAST = sys.maxsize  # where a range has no end

Span = tuple[int, int]


def span(value: Any) -> Span:
    """3 is (3, 3); "0..11" is (0, 11); "8.." has no end."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value, value
    if not isinstance(value, str) or not re.fullmatch(SPAN, value):
        raise ValueError("must be a layer such as 3, a range such as 0..11, or a list of those")
    low, _, high = value.partition("..")
    first, last = int(low), int(high or LAST)
    if first > last:
        raise ValueError(f"runs backwards: {value}")
    return first, last


def written(value: Span) -> int | str:
    """The span as a recipe has it."""
    first, last = value
    if first == last:
        return first
    return f"{first}.." if last == LAST else f"{first}..{last}"


def _closed(value: Any) -> Span:
    found = span(value)
    if found[1] == LAST:
        raise ValueError(f"needs its last layer too: {value}")
    return found


def _spans(value: Any) -> Any:
    """One span is that of every model."""
    if isinstance(value, Mapping) and not value:
        raise ValueError("must name at least one model")
    return value if isinstance(value, Mapping) else {"": value}


def _node(pattern: str) -> dict[str, Any]:
    return {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": pattern}]}


Layers = Annotated[
    tuple[Annotated[Span, BeforeValidator(span)], ...],
    BeforeValidator(listed),
    one_or_more(_node(f"^{SPAN}$")),
]
Taken = Annotated[
    Mapping[str, Annotated[Span, BeforeValidator(_closed)]],
    BeforeValidator(_spans),
    WithJsonSchema(
        {
            "anyOf": [
                *_node(f"^{CLOSED}$")["anyOf"],
                {"type": "object", "additionalProperties": _node(f"^{CLOSED}$"),
                 "minProperties": 1},
            ]
        }
    ),
]  # fmt: skip


class Slice(Strict):
    """Layers of the output: which layers of which models they are made of, and how."""

    layers: Taken = Field(
        description="The layers of each model, both ends included: {a: 0..11, b: 4..15}; one range"
        " is that of every model. `base` says which are the base's, if not the first model's."
    )
    stack: Globs | None = Field(
        default=None,
        description="Of models with several stacks of layers: which, such as model.layers; a"
        " pattern for its name, or a list.",
    )
    method: str | None = Field(
        default=None, description="Another method; it starts from its own defaults."
    )
    parameters: Mapping[str, Any] = Field(
        default_factory=dict,
        description="Parameters of the method for these layers; a gradient runs over the slice.",
    )

    @field_validator("layers")
    @classmethod
    def _alike(cls, value: Mapping[str, Span]) -> Mapping[str, Span]:
        lengths = {last - first + 1 for first, last in value.values()}
        if len(lengths) > 1:
            told = ", ".join(f"{model} {written(given)}" for model, given in value.items())
            raise ValueError(f"must be as many of every model: {told}")
        return value

    @property
    def length(self) -> int:
        """How many layers it gives."""
        first, last = next(iter(self.layers.values()))
        return last - first + 1

    def models(self, every: Mapping[str, Any]) -> tuple[str, ...]:
        """The models that take part, of all that the recipe has."""
        return tuple(every) if "" in self.layers else tuple(m for m in self.layers if m != "base")

    def first(self, model: str) -> int:
        """The first layer that is taken of a model; the base's, where none is said, is that of
        the first model."""
        given = self.layers.get(model) or next(iter(self.layers.values()))
        return given[0]
