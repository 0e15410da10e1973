"""A model's tensors by the names that adapters may have for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mowmerge.checkpoint import modules, naming, source
from mowmerge.plan import Plan, Stored, config_source
from mowmerge.tensors import TensorSpec

_EXPERT = re.compile(r"\.experts\.\d+\.")


class Aliases:
    """The tensors of one model; `added` are those that only adapters have."""

    def __init__(self, model: Stored | Plan) -> None:
        self._specs = model.specs
        self._config = source.config(config_source(model).folder)
        self._views: list[Mapping[str, TensorSpec]] = [self._specs]
        self._in_memory: Mapping[str, TensorSpec] | None = None
        self.added: dict[str, TensorSpec] = {}
        self.warnings: list[str] = []

    @property
    def kinds(self) -> set[str]:
        """The model types that config.json names."""
        return modules.model_types(self._config)

    def align(self, names: Sequence[str]) -> None:
        """Takes in an adapter's names, so that a class prefix does not set them apart."""
        self._views = [self._specs, naming.aligned(self._specs, names)]
        if any(self.find(name) is None for name in names):
            self._views.append(self._memory_names())

    def find(self, name: str) -> TensorSpec | None:
        """The model's tensor of that name, if there is one."""
        return next((view[name] for view in self._views if name in view), None)

    def tied(self, name: str) -> TensorSpec | None:
        """The tensor that an absent one is tied to."""
        return next((t for v in self._views if (t := naming.tied_to(name, v))), None)

    def of_an_expert(self) -> str:
        """A tensor that one expert of several has to itself; empty where there is none."""
        return next((name for name in self._specs if _EXPERT.search(name)), "")

    def _memory_names(self) -> Mapping[str, TensorSpec]:
        """The tensors by their names in memory, asked only where those on disk do not fit."""
        if self._in_memory is None:
            self._in_memory = modules.of(self._config, self._specs).names
        return self._in_memory
