"""The difference between a model and its base, and what an adapter calls the parts of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mowmerge import __version__
from mowmerge.checkpoint import modules, naming, source
from mowmerge.checkpoint.adapter_config import PREFIX
from mowmerge.checkpoint.layout import shard_of
from mowmerge.checkpoint.peft import WEIGHTS
from mowmerge.errors import CheckpointError
from mowmerge.known import Known, Unknown
from mowmerge.plan import Shard, Stored
from mowmerge.tensors import DTYPES, Tensor, TensorReader, TensorSpec, torch

PARTS = {"embedding": ("lora_embedding_A", "lora_embedding_B")}
LINEAR_PARTS = ("lora_A.weight", "lora_B.weight")
FUSED = "transformers joins it with others as it loads them, and peft has no name for it"
STEP = 1 << 20  # elements read or compared at a time


@dataclass
class Difference:
    """A model and its base, name by name (the base's), and what is known of their difference."""

    model: TensorReader
    base: TensorReader
    origin: Stored
    known: Known = field(default_factory=Unknown)

    def __post_init__(self) -> None:
        self.modules = modules.of(source.config(self.origin.folder), self.base.specs)
        self.memory = {spec.name: name for name, spec in self.modules.names.items()}
        aligned = naming.aligned(self.model.specs, self.base.specs)
        self.held = {
            name: aligned.get(name) or naming.tied_to(name, aligned) for name in self.base.specs
        }
        ties = [n for n in aligned if n not in self.base.specs]
        self.extra = {n: aligned[n] for n in ties if not naming.tied_to(n, self.base.specs)}
        for name, ours in self.held.items():
            theirs = self.base.specs[name]
            if ours is None or ours.shape != theirs.shape:
                found = list(ours.shape) if ours else "not there"
                raise CheckpointError(
                    f"'{name}' is {list(theirs.shape)} in the base, and in the model {found}",
                    where=self.origin.origin,
                    hint="an adapter is for a base of the same architecture and vocabulary",
                )

    @property
    def targets(self) -> list[str]:
        """The base's matrices, which are worked on one after another."""
        return [name for name in self.base.specs if self.kind(name) != "other"]

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return sum(self.base.specs[name].nbytes for name in self.targets)

    def kind(self, name: str) -> modules.Kind:
        """What sort of module has this tensor as its weight; other where it is no weight, or is
        tied: peft keeps a tie between modules that are saved, and not between updates."""
        memory = self.memory.get(name)
        if memory is None or memory in self.modules.ties or memory in self.modules.ties.values():
            return "other"
        return self.modules.kind(memory)

    def module(self, name: str) -> str:
        """The path of the tensor's module in memory."""
        return self.memory.get(name, name).rpartition(".")[0]

    def path(self, name: str) -> str:
        """What an adapter's config calls a target: its module, or of experts the parameter."""
        return self.memory[name] if self.kind(name) == "experts" else self.module(name)

    def matrix(self, name: str) -> tuple[int, int]:
        """Rows and columns of a target's update, [out, in]; of experts those of each."""
        rows, *rest = self.base.specs[name].shape[self.stack(name) > 1 :]
        columns = math.prod(rest)
        return (columns, rows) if self._across(name) else (rows, columns)

    def stack(self, name: str) -> int:
        """How many matrices a target is."""
        return self.base.specs[name].shape[0] if self.kind(name) == "experts" else 1

    def beside(self, name: str) -> list[str]:
        """The parameters of a module of experts, which have updates all or none: how deep peft
        nests one depends on the others. In the order in which they are declared."""
        if self.kind(name) != "experts":
            return [name]
        found = {
            memory: n for n, memory in self.memory.items() if self.module(n) == self.module(name)
        }
        return [found[memory] for memory in self.modules.experts if memory in found]

    def _across(self, name: str) -> bool:
        """Whether a target is stored [in, out]."""
        stored = self.modules.experts.get(self.memory[name], False)
        return stored or self.kind(name) in ("conv1d", "embedding")

    def parts(self, name: str, rank: int) -> tuple[TensorSpec, TensorSpec]:
        """A and B of a target, as the adapter stores them."""
        (rows, columns), (a, b) = self.matrix(name), _keys(self, name)
        if self.kind(name) == "conv":
            shape = (rank, *self.base.specs[name].shape[1:])
            return TensorSpec(a, "F32", shape), TensorSpec(b, "F32", (rows, rank, 1, 1))
        width = rank * self.stack(name)
        return TensorSpec(a, "F32", (width, columns)), TensorSpec(b, "F32", (rows, width))

    def delta(self, name: str) -> Tensor:
        """Model minus base in fp32, as a matrix [out, in], of experts a stack of them."""
        ours = self.held[name]
        assert ours is not None
        value = _whole(self.model, ours).sub_(_whole(self.base, self.base.specs[name]))
        value = value.flatten(2 if self.stack(name) > 1 else 1)
        return value.mT.contiguous() if self._across(name) else value

    def not_finite(self, name: str) -> CheckpointError:
        """The error of a delta that is not finite: whose fault it is."""
        base = _whole(self.base, self.base.specs[name])
        whose = "the model" if torch.isfinite(base).all() else f"the base {self.origin.origin}"
        return CheckpointError(
            f"tensor '{name}' of {whose} holds NaN or Inf",
            hint="the file is damaged or the training diverged: there is no adapter of it",
        )

    def differs(self, name: str) -> bool:
        """Whether any value of the tensor is another."""
        ours = self.held[name]
        if ours is None or self.known.same(name):
            return False
        spec = self.base.specs[name]
        with closing(self.model.open(ours.name)) as one, closing(self.base.open(name)) as two:
            for start in range(0, spec.numel, STEP):
                stop = min(start + STEP, spec.numel)
                pair = [_piece(h, s, start, stop) for h, s in ((one, ours), (two, spec))]
                if not torch.equal(*(value.double() for value in pair)):
                    return True
        return False


def rest(
    difference: Difference, differs: Callable[[str], bool]
) -> tuple[set[str], list[str], dict[str, str]]:
    """What differs and is no matrix: modules to save, biases, and what is lost by which rule."""
    targets = difference.targets
    saved: set[str] = {n.rpartition(".")[0] for n in difference.extra if "." in n}
    biases: list[str] = []
    lost = {
        n: "a tensor that the base lacks, in no module" for n in difference.extra if "." not in n
    }
    owned = set(targets)
    owners = {difference.module(n): n for n in targets if difference.kind(n) != "experts"}
    for name, spec in difference.base.specs.items():
        if name in owned or not differs(name):
            continue
        module = difference.module(name)
        below = [n for m, n in owners.items() if m.startswith(f"{module}.")]
        if spec.kind != "float":
            lost[name] = "not a float tensor"
        elif name in difference.modules.fused:
            lost[name] = FUSED
        elif module in owners:
            biases.append(name)
        elif not module:
            lost[name] = "a tensor of the model itself, which modules_to_save cannot name"
        elif any(naming.stack(n) and naming.stack(n) != naming.stack(name) for n in below):
            lost[name] = f"its module '{module}' holds whole layers"
        else:
            saved.add(module)
    biases = [name for name in biases if not within(difference.module(name), saved)]
    return saved, biases, lost


def within(module: str, saved: set[str]) -> bool:
    """Whether a module is one that is saved whole, or inside one."""
    return any(f"{module}.".startswith(f"{whole}.") for whole in saved)


def _saved(difference: Difference, saved: set[str]) -> Iterator[str]:
    """Every tensor of the modules that are saved whole."""
    for name in (*difference.base.specs, *difference.extra):
        if within(difference.module(name), saved):
            yield name


def kept(difference: Difference, saved: set[str]) -> list[tuple[str, str]]:
    """The tensors of modules that are saved whole, each with its name in the adapter."""
    whole = [(n, f"{PREFIX}{difference.memory.get(n, n)}") for n in _saved(difference, saved)]
    return whole + [(n, key) for n, _ in whole for key in _copies(difference, n)]


def _copies(difference: Difference, name: str) -> Iterator[str]:
    """The names under which peft wants a saved tensor again: those that are tied to it."""
    for copy, original in difference.modules.ties.items():
        if original == difference.memory.get(name) and copy not in difference.modules.names:
            yield f"{PREFIX}{copy}"


def _keys(difference: Difference, name: str) -> tuple[str, str]:
    """The names of A and B."""
    a, b = PARTS.get(difference.kind(name), LINEAR_PARTS)
    module = f"{PREFIX}{difference.module(name)}"
    beside = difference.beside(name)  # the first declared is the deepest
    module += ".base_layer" * (len(beside) - 1 - beside.index(name))
    return f"{module}.{a}", f"{module}.{b}"


def bias_key(memory: str) -> str:
    """The name of the bias of a module that has an update."""
    return f"{PREFIX}{memory.removesuffix('.bias')}.base_layer.bias"


def placed(specs: Sequence[TensorSpec]) -> Shard:
    """The adapter's file of these tensors: its header, and the place of each."""
    return shard_of(WEIGHTS, specs, {"format": "pt", "mowmerge": __version__})


def shown(origin: Stored) -> str:
    """The base as the adapter names it: a Hub id, or the folder's name without where it lies."""
    return origin.origin.partition("@")[0] if origin.revision else Path(origin.folder).name


def _whole(reader: TensorReader, spec: TensorSpec) -> Tensor:
    """A tensor in fp32."""
    value = torch.empty(spec.numel, dtype=torch.float32)
    with closing(reader.open(spec.name)) as handle:
        for start in range(0, spec.numel, STEP):
            stop = min(start + STEP, spec.numel)
            value[start:stop] = _piece(handle, spec, start, stop)
    return value.view(spec.shape)


def _piece(handle: Any, spec: TensorSpec, start: int, stop: int) -> Tensor:
    raw = torch.empty(stop - start, dtype=DTYPES[spec.dtype].torch)
    handle.read(start, stop, raw.view(torch.uint8).numpy().data)
    return raw
