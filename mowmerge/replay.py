"""A lock that is run again: are its inputs those that it names, its outputs what they were?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mowmerge import lock
from mowmerge.checkpoint import heads, lowrank
from mowmerge.checkpoint.header import read_header
from mowmerge.checkpoint.peft import WEIGHTS
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.errors import CheckpointError, Problem, RecipeError
from mowmerge.plan import Location, Plan, Stored
from mowmerge.recipe.model import Digest, Lock, Recipe
from mowmerge.tensors import DTYPES, Tensor, torch

# |A - B| / |B| of a tensor that another torch build or device type may make
TOLERANCE = {"F64": 1e-12, "F32": 1e-5, "F16": 2**-11, "BF16": 2**-8}


@dataclass(frozen=True)
class Replay:
    """A lock's second run: what was found of its inputs, and whether it must be as the first."""

    lock: Lock
    beside: Path
    drift: tuple[str, ...]
    strict: bool

    def outcome(self, plan: Plan, folder: Path, written: Mapping[str, Digest]) -> dict[str, Any]:
        """The report's section; CheckpointError where the weights differ and must not."""
        told = outcome(self.lock, self.beside, plan, folder, written)
        if self.strict and told["outcome"] == "beyond tolerance":
            raise CheckpointError(
                "the weights are not those of the run that wrote the lock",
                where=str(self.beside), hint="without --locked the merge is written all the same",
            )  # fmt: skip
        return {"drift": list(self.drift), **told}


def begin(recipe: Recipe, plan: Plan, *, hashed: bool, strict: bool) -> Replay | None:
    """The replay that a merge is, if its recipe is a lock without overrides.

    Raises:
        RecipeError: `strict`, and it is none, or one without digests.
        CheckpointError: `strict`, and an input is not the file that the lock names.
    """
    locked = recipe.lock
    if locked is None or recipe.overridden:
        if strict:
            raise RecipeError(
                "--locked runs a recipe.lock.yaml again, as it is", where=recipe.file,
                hint="there is one in every folder that a merge has written",
            )  # fmt: skip
        return None
    files = [digest for model in locked.inputs.values() for digest in model.values()]
    if strict and not all(digest.sha256 for digest in files):
        raise RecipeError(
            "the lock holds no digests of its inputs: it was written with --no-hash",
            where=recipe.file, hint="run it without --locked",
        )  # fmt: skip
    told = drift(locked, lock.inputs(plan, hashed=hashed or strict))
    if strict and told:
        hint = "put back what it was, or run it without --locked"
        raise CheckpointError([Problem(each, recipe.file, hint) for each in told])
    return Replay(locked, Path(recipe.file).parent, tuple(told), strict)


def drift(locked: Lock, found: lock.Files) -> list[str]:
    """What differs between the files that a lock names and those that were found, in words."""
    told = []
    for model in dict.fromkeys([*locked.inputs, *found]):
        before, now = locked.inputs.get(model, {}), found.get(model, {})
        for name in dict.fromkeys([*before, *now]):
            one, two = before.get(name), now.get(name)
            if one is None or two is None:
                told.append(f"model '{model}': {name} is {'gone' if one else 'new'}")
            elif one.bytes != two.bytes or (one.sha256 and two.sha256 and one != two):
                told.append(f"model '{model}': {name} is not the file that the lock names")
    return told


def outcome(
    locked: Lock, beside: Path, plan: Plan, folder: Path, written: Mapping[str, Digest]
) -> dict[str, Any]:
    """How the weights in `folder` compare with those of the run that wrote the lock.

    `outcome` is `same bytes`, `within tolerance`, `beyond tolerance`, or `not compared` where
    neither digests nor the first run's weights `beside` the lock tell. `same_build` says whether
    the same bytes were to be expected. `distance` is the largest |A - B| / |B| of a tensor.
    """
    here = {"torch": str(torch.__version__), "device": lock.device_type(plan)}
    then = {"torch": locked.torch, "device": locked.device}
    told = {"same_build": here == then, "here": here, "then": then}
    hashed = all(d.sha256 for d in (*locked.outputs.values(), *written.values()))
    if hashed and dict(locked.outputs) == dict(written):
        return {**told, "outcome": "same bytes"}
    if set(locked.outputs) != set(written):
        return {**told, "outcome": "beyond tolerance", "why": "other files"}
    if not all((beside / name).is_file() for name in written):
        return {**told, "outcome": "not compared"}
    apart = [each for file in written for each in _distances(folder / file, beside / file)]
    if WEIGHTS in written:
        apart = _products(apart, folder / WEIGHTS, beside / WEIGHTS)
    if not apart:
        return {**told, "outcome": "same bytes"}
    far = any(distance > TOLERANCE.get(dtype, 0.0) for _, dtype, distance in apart)
    tensor, _, distance = max(apart, key=lambda each: each[2])
    says = "beyond tolerance" if far else "within tolerance"
    return {**told, "outcome": says, "distance": distance, "tensor": tensor}


def _distances(ours: Path, theirs: Path) -> list[tuple[str, str, float]]:
    """Name, dtype and |A - B| / |B| of each tensor that is not the same bytes in both files;
    infinite where only one has it, or B is 0."""
    one, two = _placed(ours), _placed(theirs)
    readers = [StoredReader(Stored("", "", None, side)) for side in (one, two)]
    found = []
    for name in dict.fromkeys([*one, *two]):
        if name not in one or name not in two or one[name].spec != two[name].spec:
            found.append((name, "", float("inf")))
            continue
        spec, same, apart, size = one[name].spec, True, 0.0, 0.0
        for (_, a), (_, b) in zip(*(heads.pieces(r, name) for r in readers), strict=True):
            x, y = (torch.frombuffer(d, dtype=DTYPES[spec.dtype].torch).double() for d in (a, b))
            same &= a == b
            apart += float((x - y).square().sum())
            size += float(y.square().sum())
        if not same:
            distance = (apart / size) ** 0.5 if size else float("inf")
            found.append((name, spec.dtype, distance))
    return found


def _products(
    apart: Sequence[tuple[str, str, float]], ours: Path, theirs: Path
) -> list[tuple[str, str, float]]:
    """The distances of an adapter's tensors, those of an update's two factors as their product's:
    where a decomposition may turn both, only that is told."""
    readers = [StoredReader(Stored("", "", None, _placed(file))) for file in (ours, theirs)]
    updates = {_update(name): None for name, _, _ in apart}
    found = [each for each in apart if _update(each[0]) is None]
    for pair in filter(None, updates):
        if all(name in reader.specs for reader in readers for name in pair):
            one, two = ([_whole(reader, name) for name in pair] for reader in readers)
            found.append((pair[1], "F32", lowrank.distance(one, two)))
        else:
            found.append((pair[1], "", float("inf")))
    return found


def _update(name: str) -> tuple[str, str] | None:
    """The names of B and A, where the tensor is one of them."""
    for kind in ("lora", "lora_embedding"):
        a, b = f".{kind}_A", f".{kind}_B"
        if a in name or b in name:
            return name.replace(a, b), name.replace(b, a)
    return None


def _placed(file: Path) -> dict[str, Location]:
    return {place.spec.name: place for place in read_header(file)}


def _whole(reader: StoredReader, name: str) -> Tensor:
    """A factor, as a matrix in fp64."""
    spec = reader.specs[name]
    data = bytearray().join(piece for _, piece in heads.pieces(reader, name))
    return torch.frombuffer(data, dtype=DTYPES[spec.dtype].torch).double().view(spec.shape[0], -1)
