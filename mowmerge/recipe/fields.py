"""What the parts of a recipe are made of: closed models, lists that one item may stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    WithJsonSchema,
)


def listed(value: Any) -> Any:
    """One item is a list of one."""
    if value == []:
        raise ValueError("is an empty list")
    return value if isinstance(value, list | tuple) else [value]


def distinct(value: tuple[str, ...]) -> tuple[str, ...]:
    """No name twice."""
    for name in value:
        if value.count(name) > 1:
            raise ValueError(f"names '{name}' twice")
    return value


def one_or_more(item: Mapping[str, Any]) -> WithJsonSchema:
    """The schema of what `listed` takes."""
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]})


Globs = Annotated[tuple[str, ...], BeforeValidator(listed), one_or_more({"type": "string"})]
Names = Annotated[
    tuple[str, ...],
    BeforeValidator(listed),
    AfterValidator(distinct),
    one_or_more({"type": "string"}),
]
BENCHMARK = r"[\w.-]+/[\w.-]+:[\w./-]+"


def benchmark(value: Any) -> Any:
    """org/dataset:task_id."""
    if not (isinstance(value, str) and re.fullmatch(BENCHMARK, value)):
        raise ValueError("must be org/dataset:task_id, a data set of the Hub and its benchmark")
    return value


Benchmark = Annotated[
    str,
    BeforeValidator(benchmark),
    WithJsonSchema({"type": "string", "pattern": f"^{BENCHMARK}$"}),
]
Count = Annotated[StrictInt, Field(ge=1)]


class Strict(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
