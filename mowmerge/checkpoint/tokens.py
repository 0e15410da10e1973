"""A model by its tokens: which string has which row of its embeddings and head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mowmerge.checkpoint import naming, special
from mowmerge.checkpoint.tokenizers import FILE, Tokenizer
from mowmerge.placement import Placed, Vocabulary
from mowmerge.plan import Adapted, Plan, Source, Stored, config_source
from mowmerge.tensors import TensorSpec


def of(source: Source) -> Vocabulary | None:
    """The vocabulary that a nested recipe gives its result; None for what has its folder's own."""
    if isinstance(source, Plan):
        return source.vocabulary
    return of(source.model) if isinstance(source, Adapted | Placed) else None


def home(source: Source) -> Path:
    """The folder whose tokenizer a model reads texts with: its last adapter's that has one, that
    of a nested recipe's vocabulary, its checkpoint's."""
    if isinstance(source, Placed):
        return home(source.model)
    adapters = [Path(a.folder) for a in source.adapters] if isinstance(source, Adapted) else []
    own = [folder for folder in adapters if (folder / FILE).is_file()]
    nested = of(source)
    return own[-1] if own else Path(nested.folder if nested else config_source(source).folder)


@dataclass(frozen=True)
class Holder:
    """A model by its tokens: the folder of its tokenizer, that and the bytes it was read from,
    its tensors under the donor's names, its config."""

    name: str
    source: Stored | Adapted | Plan
    folder: Path
    tokenizer: Tokenizer
    size: int
    specs: Mapping[str, TensorSpec]
    settings: Mapping[str, Any]

    @cached_property
    def rows(self) -> int:
        """Rows of its embedding of words: as many as its config says, or the first one's."""
        tall = [
            height(spec)
            for name, spec in self.specs.items()
            if naming.by_token(name) and naming.role(name) == "embedding" and len(spec.shape) > 1
        ]
        said = special.sizes(self.settings)
        return next((n for n in tall if n in said), tall[0] if tall else 0)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The row of each token that it has one for."""
        return {t: i for t, i in self.tokenizer.ids.items() if i < self.rows}

    def has(self, name: str) -> bool:
        """Whether it stores a tensor of that name with a row for each of its tokens."""
        spec = self.specs.get(name)
        fits = naming.by_token(name) and spec is not None and spec.kind == "float"
        return fits and spec is not None and height(spec) == self.rows

    def lent(self, name: str) -> TensorSpec | None:
        """The tensor of that name, or what it is tied to, where it has a row for each token."""
        spec = self.specs.get(name) or naming.tied_to(name, self.specs)
        return spec if spec is not None and height(spec) == self.rows else None


def axis(spec: TensorSpec) -> int:
    """Which axis of a tensor counts tokens: the first, but of BART's bias the last."""
    return len(spec.shape) - 1 if spec.name.endswith("final_logits_bias") else 0


def height(spec: TensorSpec) -> int:
    """How many tokens a tensor has a row for, if they are what it counts."""
    return spec.shape[axis(spec)] if spec.shape else 0


def after(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of one row."""
    return spec.shape[axis(spec) + 1 :]
