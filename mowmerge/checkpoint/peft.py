"""PEFT's LoRA format: what an adapter's config and tensor names mean for a model's tensors.

Read from adapter_config.json and the header of adapter_model.safetensors alone. What is not
understood is refused by name: an adapter that is half applied is worse than none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

from mowmerge.checkpoint import clashes, modules, naming, token_rows
from mowmerge.checkpoint.adapter_config import PREFIX, by_pattern, malformed
from mowmerge.checkpoint.aliases import Aliases
from mowmerge.checkpoint.clashes import UNTIE
from mowmerge.errors import CheckpointError
from mowmerge.plan import Adapted, Patch, Plan, Stored
from mowmerge.tensors import TensorSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it with peft (merge_and_unload, then save_pretrained) and name the result instead"
_LORA = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)$"
)
_TOKENS = "token_adapter"
_ROWS = re.compile(rf"^(?P<module>.+)\.{_TOKENS}\.trainable_tokens_delta$")
_COPY = re.compile(r"^(?P<module>.+)\.(?:modules_to_save|original_module)\.(?P<parameter>\w+)$")
_PART = {"lora_A.weight": "a", "lora_embedding_A": "a", "lora_B.weight": "b",
         "lora_embedding_B": "b"}  # fmt: skip
_FOREIGN = re.compile(r"(?:^|[._])(?:lora|hada|lokr|vera|ia3|oft|boft|hra|adalora|shira|randlora"
                      r"|token_adapter|trainable_tokens|modules_to_save)(?:_|\.|$)")  # fmt: skip

_USED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
         "fan_in_fan_out", "modules_to_save", "target_parameters", "init_lora_weights",
         "trainable_token_indices"}  # fmt: skip
_SAID_BY_NAMES = {  # what they decide shows in the names of the file's tensors
    "bias", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying",
}  # fmt: skip
_OF_TRAINING = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
    "peft_version", "lora_dropout", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "megatron_core", "qalora_group_size", "velora_config",
}  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # that leave the base alone

_INPUT_FIRST = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
_EXPERTS = ("gate_up_proj", "down_proj")  # in the order in which their modules declare them


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is stored, its config, and the weight with which it is taken."""

    stored: Stored
    config: Mapping[str, Any]
    weight: float = 1.0


def read(stored: Stored, weight: float = 1.0) -> Adapter:
    """The adapter in a folder; CheckpointError where it is no LoRA, or not all of it is understood.

    Adapters whose training changed the base too (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) are refused:
    they are deltas from a model that is nowhere stored.
    """
    file = Path(stored.folder) / CONFIG
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{CONFIG} cannot be read: {error}", where=stored.origin, hint="download it again"
        ) from error
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"this is a {kind} adapter, not LoRA", where=str(file), hint=MERGE)
    known = _USED | _SAID_BY_NAMES | _OF_TRAINING
    for name, value in config.items():
        if name not in known and value not in (None, False, [], {}):
            raise CheckpointError(
                f"{name}: {json.dumps(value)[:60]} is not understood", where=str(file), hint=MERGE
            )
    if name := malformed(config):
        told = f"{name}: {json.dumps(config[name])[:60]} is nothing that peft writes"
        raise CheckpointError(told, where=str(file), hint="save or download it again")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"init_lora_weights: {start} changes the base as well, so the file alone does not say"
            " what was learned",
            where=str(file),
            hint="save it with peft's path_initial_model_for_weight_conversion, or " + MERGE,
        )
    return Adapter(stored, config, weight)


def adapted(
    model: Stored | Plan, adapters: Sequence[Adapter], *, wide: bool = False
) -> tuple[Adapted, list[str]]:
    """The model with the adapters on it, and what is worth a warning.

    Raises:
        CheckpointError: an adapter fits another model, or its tensors are not understood.
    """
    base = Aliases(model)
    origins = [adapter.stored.origin for adapter in adapters]
    values: dict[str, list[Patch]] = {}
    rows: dict[str, list[Patch]] = {}
    deltas: dict[str, list[Patch]] = {}
    for number, adapter in enumerate(adapters):
        fitted = _Fit(adapter, number, base)
        for name, patch in fitted.values():
            replaced = values.setdefault(name, [])
            if clash := clashes.values(name, patch, replaced, origins):
                raise clash
            replaced.append(patch)
        for name, patch in fitted.rows():
            here = rows.setdefault(name, [])
            if clash := clashes.rows(name, patch, here, origins):
                raise clash
            here.append(patch)
        for name, patch in fitted.deltas():
            deltas.setdefault(name, []).append(patch)
    every = values, rows, deltas
    names = dict.fromkeys(name for kind in every for name in kind)
    patches = {name: tuple(p for kind in every for p in kind.get(name, ())) for name in names}
    stored = tuple(adapter.stored for adapter in adapters)
    return Adapted(model, stored, patches, base.added, wide), list(dict.fromkeys(base.warnings))


@dataclass
class _Module:
    """The tensors that a module's low-rank update is made of, one level for each parameter."""

    levels: dict[int, dict[str, str]] = field(default_factory=dict)


class _Fit:
    """One adapter on one model."""

    def __init__(self, adapter: Adapter, number: int, base: Aliases) -> None:
        self._adapter, self._number, self._base = adapter, number, base
        self.origin, self._config = adapter.stored.origin, adapter.config
        self._specs = adapter.stored.specs
        self._modules: dict[str, _Module] = {}
        self._values: dict[str, str] = {}
        self._rows: dict[str, str] = {}
        for key in self._specs:
            self._sort(key)
        wanted = [f"{module}.weight" for module in (*self._modules, *self._rows)]
        wanted += list(self._values)
        base.align([*wanted, *(n for m in self._modules for n in self._parameters(m))])

    def _sort(self, key: str) -> None:
        """Puts one tensor of the file where it belongs: a module's update, or a value."""
        name = key.removeprefix(PREFIX)
        copy = _COPY.match(key)
        if copy and f"{copy['module']}.{copy['parameter']}" in self._specs:
            return  # peft saves a resized embedding three times
        found = _LORA.match(name)
        if found:
            module, part = found["module"], _PART.get(found["part"], "m")
            level = module.count(".base_layer")
            held = self._modules.setdefault(module.replace(".base_layer", ""), _Module())
            held.levels.setdefault(level, {})[part] = key
        elif tokens := _ROWS.match(name):
            self._rows[tokens["module"]] = key
        elif _FOREIGN.search(name := name.replace(f".{_TOKENS}.base_layer.", ".")):
            raise self._wrong(f"tensor '{key}' is not understood", MERGE)
        else:
            self._values[name.replace(".base_layer.", ".")] = key

    def values(self) -> Iterator[tuple[str, Patch]]:
        """Tensors that take a base's place: modules_to_save, biases, resaved embeddings."""
        for name, key in self._values.items():
            ours, spec = self._base.find(name), self._specs[key]
            if ours is None and ".base_layer." in key:
                ours = self._tied(name)
            if ours is None and self._follows(name):
                continue
            if ours is None:
                if not self._saved(name) or self._base.tied(name) is not None:
                    raise self._stranger(name)
                self._base.added[name] = TensorSpec(name, spec.dtype, spec.shape)
                self._base.warnings.append(
                    f"'{name}' is only in the adapter {self.origin}, and is added to its model"
                )
            elif ours.shape != spec.shape:
                if not self._resized(key, spec, ours):
                    raise self._misfit(name, spec.shape, ours)
                self._base.added[ours.name] = TensorSpec(ours.name, spec.dtype, spec.shape)
            weight = 1.0 if ".base_layer." in key and name.endswith("weight") else (
                self._adapter.weight)  # fmt: skip
            patch = Patch(self._number, {"value": key}, weight=weight)
            yield (ours.name if ours else name), patch

    def rows(self) -> Iterator[tuple[str, Patch]]:
        """Rows that take the place of those of single tokens."""
        if name := token_rows.unsaved(self._config, self._rows):
            told = f"{token_rows.KEY} names rows of {name}, and the file has none"
            raise self._wrong(told, "save it again")
        for module, key in self._rows.items():
            path, spec = f"{module}.weight", self._specs[key]
            numbers = token_rows.numbers(self._config, module)
            ours = self._base.find(path) or self._tied(path)
            if ours is None:
                raise self._stranger(path)
            tall, *wide = self._base.added.get(ours.name, ours).shape
            fitting = {number for number in numbers if number in range(tall)}
            if spec.shape != (len(fitting), *wide) or len(fitting) < len(numbers):
                raise self._wrong(
                    f"'{key}' is {list(spec.shape)}, and {CONFIG} names {len(numbers)} tokens,"
                    f" {len(fitting)} of them among the {tall} rows of '{path}'", "save it again",
                )  # fmt: skip
            weight = self._adapter.weight
            yield ours.name, Patch(self._number, {"value": key}, weight=weight, rows=numbers)

    def deltas(self) -> Iterator[tuple[str, Patch]]:
        """The low-rank updates."""
        stretched = set()
        for module, held in self._modules.items():
            for path, parts in self._paired(module, held):
                if not {"a", "b"} <= parts.keys():
                    raise self._wrong(
                        f"module '{module}' has only one of lora_A and lora_B", "save it again"
                    )
                ours = self._base.find(path) or self._tied(path)
                if ours is None:
                    raise self._stranger(path)
                if ours.name in stretched:
                    raise self._wrong(f"use_dora is set for '{path}' and what it is tied to", MERGE)
                stretched |= {ours.name} if "m" in parts else set()
                yield ours.name, self._patch(module, path, parts, ours)

    def _paired(self, module: str, held: _Module) -> Iterator[tuple[str, dict[str, str]]]:
        """Each parameter of a module with its update; which is which only the nesting says."""
        names = self._parameters(module)
        if not names and list(held.levels) == [0]:
            yield f"{module}.weight", held.levels[0]
            return
        if absent := [name for name in names if self._base.find(name) is None]:
            raise self._unfused(absent)
        levels = [held.levels[i] for i in sorted(held.levels, reverse=True)]  # the first declared
        fitting = [
            order
            for order in permutations(names, len(levels))
            if all(self._fits(name, parts) for name, parts in zip(order, levels, strict=True))
        ]
        declared = [o for o in fitting if [n.rpartition(".")[2] for n in o] == list(_EXPERTS)]
        chosen = fitting if len(fitting) == 1 else declared
        if len(chosen) != 1:
            raise self._wrong(
                f"module '{module}' has {len(levels)} update(s), and which belongs to which of"
                f" {', '.join(names) or 'its parameters'} cannot be told",
                MERGE,
            )
        yield from zip(chosen[0], levels, strict=True)

    def _parameters(self, module: str) -> list[str]:
        """The module's parameters that target_parameters names."""
        found = []
        for target in self._config.get("target_parameters") or ():
            path, _, parameter = str(target).rpartition(".")
            if module == path or module.endswith(f".{path}") or not path:
                found.append(f"{module}.{parameter}")
        return list(dict.fromkeys(found))

    def _fits(self, name: str, parts: Mapping[str, str]) -> bool:
        ours = self._base.find(name)
        return ours is not None and {"a", "b"} <= parts.keys() and bool(self._layouts(parts, ours))

    def _layouts(self, parts: Mapping[str, str], ours: TensorSpec) -> list[bool]:
        """Whether B A, or its transpose (True), or either has the tensor's shape."""
        a, b = (self._specs[parts[key]].shape for key in ("a", "b"))
        if len(ours.shape) < 2 or len(a) < 2 or len(b) < 2 or math.prod(b[1:]) != a[0]:
            return []
        stack = self._stack(parts, ours)
        if a[0] % stack:
            return []
        shape = ours.shape[1:] if stack > 1 else (ours.shape[0], math.prod(ours.shape[1:]))
        inputs, outputs = math.prod(a[1:]), b[0]
        made = {False: (outputs, inputs), True: (inputs, outputs)}
        return [across for across, which in made.items() if which == shape]

    def _stack(self, parts: Mapping[str, str], ours: TensorSpec) -> int:
        """How many matrices the tensor is: that of a module of experts has as many as experts."""
        a = self._specs[parts["a"]].shape
        return ours.shape[0] if len(ours.shape) == 3 and len(a) == 2 else 1

    def _patch(self, module: str, path: str, parts: Mapping[str, str], ours: TensorSpec) -> Patch:
        layouts, stack = self._layouts(parts, ours), self._stack(parts, ours)
        a, b = (self._specs[parts[key]].shape for key in ("a", "b"))
        if not layouts:
            raise self._misfit(path, (b[0], math.prod(a[1:])), ours)
        if ours.kind != "float":
            raise self._wrong(f"'{path}' is {ours.dtype} in the model, not a float", MERGE)
        across = layouts[0] if len(layouts) == 1 else self._across(module, path, parts, stack)
        if "m" in parts:
            width = self._specs[parts["m"]].numel
            if stack > 1 or width != b[0]:
                raise self._wrong(f"the magnitude of '{path}' has {width} elements, not {b[0]}", "")
        elif self._config.get("use_dora"):
            raise self._wrong(f"use_dora is set, and '{path}' has no magnitude", MERGE)
        key = path if self._parameters(module) else module
        scale = self._scale(key, a[0] // stack)
        return Patch(self._number, dict(parts), scale, self._adapter.weight, across, stack)

    def _across(self, module: str, path: str, parts: Mapping[str, str], stack: int) -> bool:
        """How a square matrix is stored, where shapes do not say."""
        if "embedding" in parts["a"].rpartition(".")[2]:
            return True
        if stack > 1:
            return bool(self._base.kinds & set(_INPUT_FIRST))
        if self._base.kinds == {"None"}:
            return bool(self._config.get("fan_in_fan_out"))
        return modules.is_conv1d(module, self._base.kinds)

    def _scale(self, key: str, rank: int) -> float:
        """lora_alpha / r, or / sqrt(r) with use_rslora; r and alpha after their patterns."""
        r = by_pattern(self._config.get("rank_pattern"), key, self._config.get("r", 8))
        alpha = by_pattern(
            self._config.get("alpha_pattern"), key, self._config.get("lora_alpha", 8)
        )
        if r != rank:
            raise self._wrong(
                f"'{key}' has the rank {rank}, and {CONFIG} says {r}",
                "config and weights belong to different adapters: download both again",
            )
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _resized(self, key: str, spec: TensorSpec, ours: TensorSpec) -> bool:
        """Whether it is the model's embedding or head with another number of tokens, and whole."""
        tuned = ".base_layer." in key and f".{_TOKENS}." not in key
        whole = self._adapter.weight == 1 and not tuned
        return whole and naming.by_token(ours.name) and ours.shape[1:] == spec.shape[1:]

    def _saved(self, name: str) -> bool:
        """Whether modules_to_save names the module that the tensor is in."""
        saved = self._config.get("modules_to_save") or ()
        inside = f".{name}"
        return any(f".{module}." in inside for module in saved)

    def _follows(self, name: str) -> bool:
        """Whether a saved tensor is the copy of another saved one, to which peft ties it."""
        tied = self._base.tied(name)
        others = (self._base.find(other) for other in self._values if other != name)
        return bool(self._config.get("ensure_weight_tying")) and tied is not None and tied in others

    def _tied(self, name: str) -> TensorSpec | None:
        """What an absent tensor is tied to, which is then changed for both."""
        tied = self._base.tied(name)
        if tied is not None:
            self._base.warnings.append(
                f"the adapter {self.origin} is on '{name}', which the model ties to '{tied.name}':"
                " both change, as they do in merge_and_unload"
            )
        return tied

    def _stranger(self, name: str) -> CheckpointError:
        tied = self._base.tied(name)
        if tied is not None:
            return self._wrong(
                f"it saves '{name}', which the model ties to '{tied.name}'",
                UNTIE,
            )
        return self._wrong(
            f"the model has no tensor '{name}'", "this adapter was trained on another model"
        )

    def _unfused(self, absent: Sequence[str]) -> CheckpointError:
        """Where target_parameters name what is no tensor of the model's."""
        apart = self._base.of_an_expert()
        why = f": there each expert has its own, such as '{apart}'" if apart else ""
        named = " and ".join(f"'{name}'" for name in absent)
        return self._wrong(
            f"its updates are on {named}, which the model does not store{why}", MERGE
        )

    def _misfit(self, name: str, shape: Sequence[int], ours: TensorSpec) -> CheckpointError:
        resized = "embed" in name or "lm_head" in name
        return self._wrong(
            f"'{name}' is {list(shape)} in the adapter, and {list(ours.shape)} in the model",
            "this adapter was trained on another model"
            + (", or on one with another vocabulary: " + MERGE if resized else ""),
        )

    def _wrong(self, message: str, hint: str) -> CheckpointError:
        return CheckpointError(message, where=f"adapter {self.origin}", hint=hint)
