"""Vocabulary rows that were given new places: which row of whose tensor stands where, and why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mowmerge.tensors import TensorSpec

if TYPE_CHECKING:
    from numpy import int32
    from numpy.typing import NDArray

    from mowmerge.plan import Adapted, Plan, Stored

NONE, MEAN = -1, -2  # entries of an index that are no row


@dataclass(frozen=True, eq=False)
class Rows:
    """How one tensor is placed: row i is the mean of the rows index[d, i] of the inputs d.

    An input is the number of a lender and the name of its tensor; the first is the model's own. An
    entry NONE takes no part; a row in which nothing does is zero. MEAN, in the first line, is the
    mean of all rows of the model's own tensor. index: int32 [inputs, rows].
    """

    spec: TensorSpec
    inputs: tuple[tuple[int, str], ...]
    index: NDArray[int32]

    @property
    def columns(self) -> int:
        """Elements in a row."""
        return self.spec.numel // max(1, len(self.index[0]))


@dataclass(frozen=True)
class Placed:
    """A model whose vocabulary rows stand where the output has them; its names are the model's.

    `lenders` are the model and those that lend it rows of tokens it lacks. `rows` also has, by the
    output's name, what the model ties to a tensor of its own, and the output does not.
    """

    model: Stored | Adapted | Plan
    lenders: tuple[Stored | Adapted | Plan, ...]
    rows: Mapping[str, Rows]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The model's tensors, those with a row for each token as tall as the output's."""
        own = self.model.specs
        return {**own, **{name: rows.spec for name, rows in self.rows.items() if name in own}}

    @cached_property
    def fingerprint(self) -> str:
        """A digest of which row stands where."""
        digest = hashlib.sha256()
        for name, rows in self.rows.items():
            digest.update(json.dumps([name, str(rows.spec), rows.inputs]).encode())
            digest.update(rows.index.tobytes())
        for lender in self.lenders:
            told = getattr(lender, "fingerprint", None) or getattr(lender, "revision", None)
            digest.update(str(told).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Share:
    """What one model has to do with the output's tokens.

    tokens: those it has a row for; shared: of them, those the output has; added: those it brought;
    moved: shared ones whose id is another; left: those the output lacks; missing: how many of the
    output's it lacks, by the rule that gives it their rows.
    """

    tokens: int
    shared: int
    added: int
    moved: int
    left: int
    missing: Mapping[str, int]


@dataclass(frozen=True)
class Vocabulary:
    """The output's tokens: whose they are, how many, in how many rows, and what each model does.

    The tokenizer's files are those of `folder`, which is that of `outside` where it is no model's,
    but for `files`, which are written as they stand here; where tokens were added (`extended`) what
    else says them is left out. `config` holds what is changed in the config, by path. The
    tokenizers took `parsed` bytes of memory.
    """

    source: str
    tokens: int
    rows: int
    padding: int
    added: int
    models: Mapping[str, Share]
    tensors: tuple[str, ...]
    folder: str
    files: Mapping[str, str] = field(default_factory=dict)
    extended: bool = False
    config: Mapping[tuple[str, ...], Any] = field(default_factory=dict)
    parsed: int = 0
    outside: Stored | None = None

    def told(self) -> dict[str, Any]:
        """The mapping as plain data, for the plan and the report."""
        models = {name: dict(vars(share)) for name, share in self.models.items()}
        for share in models.values():
            share["missing"] = dict(share["missing"])
        return {
            "source": self.source, "tokens": self.tokens, "added": self.added, "rows": self.rows,
            "padding": self.padding, "tensors": list(self.tensors), "models": models,
        }  # fmt: skip

    def changed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A config with what is changed in it."""
        return _changed(settings, self.config)


def _changed(settings: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    made = dict(settings)
    for (key, *rest), value in changes.items():
        if rest:
            made[key] = _changed(made[key], {tuple(rest): value})
        else:
            made[key] = value
    return made
