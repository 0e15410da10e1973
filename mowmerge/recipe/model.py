"""A recipe as frozen data: what the YAML may hold, with every default filled in."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    WithJsonSchema,
    model_validator,
)

from mowmerge.errors import Problem
from mowmerge.recipe.fields import Globs, Names, Strict, listed, one_or_more
from mowmerge.recipe.layers import Layers, Slice
from mowmerge.recipe.task import Task
from mowmerge.recipe.task_types import TYPES
from mowmerge.recipe.vocabulary import Vocabulary

Loc = tuple[str | int, ...]
Role = Literal["embedding", "attention", "mlp", "norm", "head", "router", "other"]
BESIDE = ("source", "adapter")  # what an entry of `models` holds beside parameters
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
SIZE = r"([0-9]+(?:\.[0-9]+)?) ?([KMGTkmgt]?)([Ii]?)[Bb]"


def parse_size(value: Any) -> int:
    """ "5GB" is 5,000,000,000; "1GiB" is 1,073,741,824; an integer is itself."""
    found = re.fullmatch(SIZE, value) if isinstance(value, str) else None
    if found:
        number, prefix, binary = found.groups()
        value = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper()))
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("must be a number of bytes such as 5GB, 500MB or 1GiB")
    return value


def _version(value: Any) -> int:
    if type(value) is not int or value != 1:
        raise ValueError("must be 1, the only version there is")
    return value


def _source(value: Any) -> Any:
    if not isinstance(value, Recipe) and not (isinstance(value, str) and value.strip()):
        raise ValueError("must be a Hub id, a path or a nested recipe")
    return value


def _some(value: Mapping[str, Any]) -> Mapping[str, Any]:
    if not value:
        raise ValueError("must name at least one model")
    return value


Source = Annotated["str | Recipe", BeforeValidator(_source)]
Roles = Annotated[
    tuple[Role, ...],
    BeforeValidator(listed),
    one_or_more({"enum": list(get_args(Role))}),
]
Bytes = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": f"^{SIZE}$"}]}
    ),
]
Version = Annotated[int, BeforeValidator(_version), WithJsonSchema({"const": 1})]


@dataclass(frozen=True)
class Origin:
    """Where a recipe was read: name, folder, text as run, and the line (or --set) of each key;
    `ignored` is what in a file of another tool's grammar says nothing."""

    name: str = "recipe"
    folder: Path = field(default_factory=Path)
    text: str = ""
    file: str = "<recipe>"
    lines: Mapping[Loc, int | str] = field(default_factory=dict)
    overridden: bool = False
    ignored: tuple[Problem, ...] = ()

    def known(self, loc: Loc) -> Loc:
        """The longest part of `loc` that stands in the text."""
        return next(loc[:n] for n in range(len(loc), -1, -1) if not n or loc[:n] in self.lines)

    def line(self, loc: Loc) -> int | str:
        """The line of the longest part of `loc` that stands in the text."""
        return self.lines.get(self.known(loc), 1)

    def where(self, loc: Loc) -> str:
        """`file.yaml:12`, or `--set key=value` where an override put it there."""
        line = self.line(loc)
        return f"{self.file}:{line}" if isinstance(line, int) else line


class Match(Strict):
    """Which tensors: all given criteria must hold; none given matches all."""

    role: Roles | None = Field(default=None, description="Role of the tensor, or a list of roles.")
    layers: Layers | None = Field(
        default=None,
        description="A layer, a range with both ends included (0..11, 8..), or a list of those.",
    )
    tensors: Globs | None = Field(
        default=None,
        description="Pattern for the tensor's name (* ? [a-z], case matters), or a list.",
    )

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(translate(glob) for glob in self.tensors or ("*",)))

    def names(self, name: str) -> bool:
        """Whether the tensor's name fits."""
        return self.tensors is None or self._pattern.match(name) is not None

    def accepts(self, name: str, role: str, layer: int | None) -> bool:
        """Whether the tensor is meant."""
        if self.role is not None and role not in self.role:
            return False
        if self.layers is not None and not (
            layer is not None and any(low <= layer <= high for low, high in self.layers)
        ):
            return False
        return self.names(name)


class AdapterRef(Strict):
    """One adapter on a model, and the weight with which what it adds is taken."""

    source: str = Field(min_length=1, description="Hub id (org/name@revision) or path.")
    weight: StrictFloat | StrictInt = Field(
        default=1.0, description="Multiplies what the adapter adds."
    )

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


Adapters = Annotated[tuple[AdapterRef, ...], BeforeValidator(listed)]


class ModelRef(Strict):
    """One model: its source, adapters on it, and parameters of the method for this model alone."""

    source: Source = Field(description="Hub id (org/name@revision), path, or a nested recipe.")
    adapter: Adapters = Field(
        default=(), description="A LoRA on it: a source, {source: ..., weight: ...}, or a list."
    )
    parameters: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _beside(cls, value: Any) -> Any:
        """In the text the parameters stand beside `source`."""
        if isinstance(value, str | Recipe):
            return {"source": value}
        if not isinstance(value, Mapping):
            raise ValueError("must be a source, or a mapping with 'source' and parameters")
        rest = {key: v for key, v in value.items() if key not in BESIDE}
        return {k: v for k, v in value.items() if k in BESIDE} | {"parameters": rest}


class Rule(Strict):
    """What is different for some tensors; the first rule that matches wins."""

    match: Match = Field(description="Which tensors; all given criteria must hold.")
    method: str | None = Field(
        default=None, description="Another method; it starts from its own defaults."
    )
    parameters: Mapping[str, Any] = Field(
        default_factory=dict, description="Parameters of the method for these tensors."
    )
    models: Names | None = Field(
        default=None, description="Only these models take part, in this order."
    )
    drop: StrictBool = Field(default=False, description="Do not write these tensors.")

    @model_validator(mode="after")
    def _alone(self) -> Rule:
        given = [k for k in ("method", "parameters", "models") if k in self.model_fields_set]
        if self.drop and given:
            raise ValueError(f"drops its tensors, so it takes no {' and no '.join(given)}")
        return self


class Heads(Strict):
    """Tensors that are not merged: each model keeps its own."""

    match: Globs = Field(description="Pattern for the names of the head's tensors, or a list.")
    policy: Literal["per_task"] = Field(
        default="per_task", description="per_task: each goes to heads/<model>.safetensors."
    )


class Rest(Strict):
    """The static method of a dynamic checkpoint's anchor, and of what is not dynamic."""

    method: str = Field(description="A static method; see `mowmerge methods`.")
    parameters: Mapping[str, Any] = Field(
        default_factory=dict, description="Parameters of that method."
    )

    def __hash__(self) -> int:
        """Identity, as a recipe's."""
        return id(self)


class Output(Strict):
    """Where the result goes, and how it is stored."""

    path: str | None = Field(default=None, description="Folder; ./merged/<recipe name> if absent.")
    dtype: Literal["float64", "float32", "float16", "bfloat16", "fp8"] | None = Field(
        default=None, description="Element type of merged tensors; absent that of the inputs."
    )
    shard_size: Bytes = Field(
        default=5_000_000_000, description="Largest weight file: 5GB, 500MB, 1GiB, or bytes."
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="auto: that of most models; the name of a model, or base: that one's; or the"
        " Jinja text itself. Absent that of the donor.",
    )
    format: Literal["checkpoint", "adapter"] = Field(
        default="checkpoint", description="adapter: what differs from the base, as a LoRA for peft."
    )
    rank: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="Of an adapter: the rank that updates are cut to."
    )
    energy: Annotated[StrictFloat, Field(gt=0, le=1)] | None = Field(
        default=None, description="Of an adapter: the kept share of an update's squared norm."
    )


class Digest(Strict):
    """One file: its length, and its sha256 where that was taken."""

    bytes: StrictInt
    sha256: str | None = None


class Lock(Strict):
    """What a recipe.lock.yaml says of the run that wrote it."""

    name: str = Field(description="The recipe's name.")
    folder: str = Field(
        default=".", description="Where the recipe lay, seen from the lock: its paths start there."
    )
    mowmerge: str = Field(description="Version that made the merge.")
    torch: str = Field(description="Build of torch that made the merge.")
    device: str = Field(description="Device type that made the merge.")
    inputs: Mapping[str, Mapping[str, Digest]] = Field(description="The files read, by model.")
    outputs: Mapping[str, Digest] = Field(description="The weight files written.")


class Recipe(Strict):
    """A merge: models, a method, its parameters, and exceptions by rule."""

    version: Version = Field(default=1, description="Version of the recipe grammar.")
    base: Source | None = Field(
        default=None,
        description="The model that the others were fine-tuned from: Hub id, path or recipe.",
    )
    models: Annotated[Mapping[str, ModelRef], AfterValidator(_some)] = Field(
        description="The models to merge: name: source, or name: {source: ..., weight: ...}."
    )
    method: str = Field(description="The merge method; see `mowmerge methods`.")
    parameters: Mapping[str, Any] = Field(
        default_factory=dict, description="Parameters of the method."
    )
    rules: tuple[Rule, ...] = Field(
        default=(), description="Exceptions for some tensors; the first rule that matches wins."
    )
    slices: tuple[Slice, ...] = Field(
        default=(),
        description="The output's layers, from the first to the last; absent those of the models.",
    )
    missing: Literal["error", "base"] = Field(
        default="error",
        description="Where a model lacks a tensor of the base: stop, or take the base's.",
    )
    vocabulary: Vocabulary | None = Field(default=None, description="Rows are placed by token.")
    rest: Rest | None = Field(
        default=None,
        description="With a dynamic method: the static one for what stays static.",
    )
    encoder: str | None = Field(
        default=None, description="Hub id or path of a model that classifiers look at instead."
    )
    heads: Heads | None = Field(default=None, description="Tensors that are not merged.")
    tasks: Mapping[str, Task] = Field(
        default_factory=dict, description="Tasks for fitting, router training and evaluation."
    )
    coefficients: str | None = Field(
        default=None,
        description="coefficients.json of an earlier fit: replayed, and nothing is fitted.",
    )
    output: Output = Field(default=Output(), description="Where the result goes, and how.")
    lock: Lock | None = Field(
        default=None, description="In a recipe.lock.yaml: the run that it replays."
    )
    _origin: Origin = PrivateAttr(default_factory=Origin)

    def __hash__(self) -> int:
        """Identity: what is worked out from a recipe is kept for that recipe."""
        return id(self)

    def model_post_init(self, context: Any) -> None:
        """Takes the origin from the validation context."""
        if isinstance(context, Origin):
            self._origin = context

    @property
    def trained(self) -> Mapping[str, tuple[str, Task]]:
        """The tasks that routers and coefficients are trained on, each with its expert: neither
        held out, nor of a type that is only scored."""
        return {
            name: (task.expert, task)
            for name, task in self.tasks.items()
            if task.expert is not None and TYPES[task.type].trains
        }

    @property
    def unfit(self) -> str:
        """Why no default method is fitted on the recipe's tasks; empty where one can be."""
        experts = {expert for expert, _ in self.trained.values()}
        if self.coefficients:
            return ""
        if lacking := [name for name in self.models if name not in experts]:
            return f"model '{lacking[0]}' has no task" if experts else "there are no tasks"
        for name, (_, task) in self.trained.items():
            if task.type == "causal-lm":
                return f"task '{name}' is no classification"
            if task.splits.router is None:
                return f"task '{name}' has no router split"
        remade = self.vocabulary or any(isinstance(m.source, Recipe) for m in self.models.values())
        return "models are made as they are read" if remade else "" if self.heads else "no heads"

    @property
    def name(self) -> str:
        """The file's stem, or a nested recipe's key."""
        return self._origin.name

    @property
    def folder(self) -> Path:
        """The folder that relative sources are looked up in first."""
        return self._origin.folder

    @property
    def text(self) -> str:
        """The YAML as run: verbatim, or with the overrides in it, or as it was converted."""
        return self._origin.text

    @property
    def overridden(self) -> bool:
        """Whether overrides changed what the file says."""
        return self._origin.overridden

    @property
    def ignored(self) -> tuple[Problem, ...]:
        """What in a file of another tool's grammar says nothing."""
        return self._origin.ignored

    @property
    def file(self) -> str:
        """The file as errors name it."""
        return self._origin.file

    def where(self, *loc: str | int) -> str:
        """`file.yaml:12` for a key path such as ("rules", 0, "match")."""
        return self._origin.where(loc)

    def locate(self, source: str) -> str:
        """The path that `source` means, from the recipe's folder or here; else `source` itself."""
        return str(next(iter(existing(source, self.folder)), source))


def existing(source: str, folder: Path) -> Sequence[Path]:
    """The existing paths that `source` may mean, the recipe's folder first."""
    path = Path(source).expanduser()
    return [p for p in (folder / path, path) if os.path.exists(p)]
