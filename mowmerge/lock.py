"""What decides the bytes of a merge: for its journal while it runs, in its lock for good."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mowmerge import __version__, devices
from mowmerge.checkpoint import identity, sidecars
from mowmerge.errors import CheckpointError
from mowmerge.plan import Adapted, Plan, Stored, config_source, unplaced
from mowmerge.recipe.complete import completed
from mowmerge.recipe.model import Digest, Lock, Recipe
from mowmerge.recipe.text import dump
from mowmerge.tensors import torch

HEAD = "# The recipe as it was run. `mowmerge merge recipe.lock.yaml OUT` runs it again.\n"
Files = Mapping[str, Mapping[str, Digest]]
Seen = Mapping[str, Mapping[str, list[int]]]


def key(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What a merge must have in common with an earlier one to take up its work.

    The plan, the place of every byte, the inputs by size, time and inode, and the versions that
    change bytes; not workers, blocks or memory. The recipe is in it to say what has changed.
    """
    layout = hashlib.sha256()
    for shard in plan.files:
        layout.update(shard.file.encode() + shard.header)
    told = completed(recipe)
    if plan.fit is None:
        del told["tasks"]
    del told["output"]["path"]
    return {
        "journal": 1,
        **versions(),
        "device": device_type(plan),
        "statistics": plan.stats,
        "plan": plan.fingerprint,
        "layout": layout.hexdigest()[:16],
        "fit": told["tasks"] if plan.fit else None,
        "inputs": seen(plan),
        "recipe": told,
    }


def versions() -> dict[str, str]:
    """Those that change bytes."""
    return {"mowmerge": __version__, "torch": str(torch.__version__)}


def _weights(stored: Stored, plan: Plan) -> dict[str, str]:
    """The files of a checkpoint that decide weights, by name: its shards, how an adapter is
    applied, and where rows are placed by token its tokenizer."""
    names = ("adapter_config.json", *(("tokenizer.json",) if plan.vocabulary else ()))
    beside = {name: os.path.join(stored.folder, name) for name in names}
    shards = {Path(file).name: file for file in stored.files}
    return shards | {name: file for name, file in beside.items() if os.path.isfile(file)}


def _read(stored: Stored, plan: Plan) -> dict[str, str]:
    """Those, and of the donor what the output's config, tokenizer and the like are made from."""
    donor = config_source(plan.sources[plan.donor]).folder
    names = sidecars.carried(Path(donor)) if stored.folder == donor else ()
    return {name: os.path.join(donor, name) for name in names} | _weights(stored, plan)


def device_type(plan: Plan) -> str:
    """cpu, cuda ..."""
    return devices.kind(plan.device)


def seen(plan: Plan) -> Seen:
    """Size, time and inode of each input file, by model."""
    found: dict[str, dict[str, list[int]]] = {}
    for model, stored in plan.checkpoints:
        files = found.setdefault(model, {})
        files.update({name: identity.of(file) for name, file in _read(stored, plan).items()})
    return found


def sampled(plan: Plan) -> dict[str, str]:
    """A digest of each input file's size, its beginning and some of the rest: what a copy of it on
    another host has in common with it, and a checkpoint of the same shapes has not."""
    return {
        f"model '{model}': {name}": identity.sampled(file)
        for model, stored in plan.checkpoints
        for name, file in _weights(stored, plan).items()
    }


def unchanged(before: Seen, now: Seen) -> None:
    """CheckpointError where an input is no longer the file that the merge began with."""
    for model, files in now.items():
        for name, facts in files.items():
            if before[model].get(name) != facts:
                raise CheckpointError(
                    f"{name} was changed while the merge was running", where=f"model '{model}'",
                    hint="start again when the inputs are whole",
                )  # fmt: skip


def inputs(plan: Plan, *, hashed: bool) -> Files:
    """Each input file, by model; with its digest if that is wanted."""
    each = [(model, _read(stored, plan)) for model, stored in plan.checkpoints]
    files = sorted({file for _, read in each for file in read.values()})
    digests = identity.sha256_of(files, plan.workers) if hashed else {}
    found: dict[str, dict[str, Digest]] = {}
    for model, read in each:
        held = found.setdefault(model, {})
        for name, file in read.items():
            held[name] = Digest(bytes=identity.of(file)[0], sha256=digests.get(file))
    return found


def text(
    recipe: Recipe, plan: Plan, folder: Path, out: Path, read: Files, written: Mapping[str, Digest]
) -> str:
    """The content of recipe.lock.yaml: a recipe with every default, sources pinned, and the run.

    `folder` is what becomes `out`. Paths are relative to where the recipe lay, and where that is
    seen from `out` stands in the lock: so they hold wherever the lock is read from, as long as both
    lie as they lay. Coefficients are those beside the lock. There is no clock in it, no host and no
    absolute path.
    """
    home = Path(os.path.realpath(recipe.folder))
    data = _pinned(recipe, plan, lambda path: _relative(path, recipe, home))
    del data["output"]["path"]
    if (folder / "coefficients.json").exists():
        data["coefficients"] = "coefficients.json"
    for task in data["tasks"].values():
        for part in ("data", "options"):
            task[part] = _paths(task.get(part, {}), lambda path: _relative(path, recipe, home))
    lock = Lock(
        name=recipe.name,
        folder=Path(os.path.relpath(home, os.path.realpath(out))).as_posix(),
        mowmerge=__version__,
        torch=str(torch.__version__),
        device=device_type(plan),
        inputs=read,
        outputs=written,
    )
    plain = json.loads(json.dumps(data))
    return HEAD + dump(_given(plain) | {"lock": lock.model_dump(mode="json", exclude_none=True)})


def _pinned(recipe: Recipe, plan: Plan, relative: Callable[[str], str]) -> dict[str, Any]:
    """The completed recipe, its sources and those of nested recipes as they were found."""

    def pinned(name: str, source: str | Recipe) -> Any:
        found = unplaced(plan.sources[name])
        if isinstance(found, Adapted):
            found = found.model
        if isinstance(found, Plan) and isinstance(source, Recipe):
            inner = _pinned(source, found, lambda path: relative(_absolute(path, source)))
            del inner["tasks"], inner["output"]["path"]
            return inner
        if isinstance(found, Plan):  # an adapter on the base, which is a recipe
            return source
        return _revision(found) or relative(str(source))

    data = completed(recipe)
    if recipe.rest is None:
        del data["rest"]  # the method's own, which may be another where rules change parameters
    if recipe.base is not None:
        data["base"] = pinned("base", recipe.base)
    for name, model in recipe.models.items():
        data["models"][name]["source"] = pinned(name, model.source)
        read = unplaced(plan.sources[name])
        if isinstance(read, Adapted):
            for told, found in zip(data["models"][name]["adapter"], read.adapters, strict=True):
                told["source"] = _revision(found) or relative(told["source"])
    if recipe.encoder is not None and plan.encoder:
        data["encoder"] = _revision(plan.encoder) or relative(recipe.encoder)
    if recipe.vocabulary and recipe.vocabulary.outside and plan.vocabulary:
        outside = plan.vocabulary.outside
        named = outside and _revision(outside)
        data["vocabulary"]["source"] = {"tokenizer": named or relative(recipe.vocabulary.outside)}
    if recipe.coefficients is not None:
        data["coefficients"] = relative(recipe.coefficients)
    return data


def _revision(stored: Stored) -> str | None:
    """org/name@revision for a checkpoint of the Hub."""
    return f"{stored.origin.partition('@')[0]}@{stored.revision}" if stored.revision else None


def _absolute(path: str, recipe: Recipe) -> str:
    """A path as it is, or the absolute one of what it means in a recipe, where that is there."""
    found = recipe.locate(path)
    return os.path.abspath(found) if os.path.exists(found) else path


def _relative(path: str, recipe: Recipe, home: Path) -> str:
    """A path as it is, where it holds from the recipe's folder; else the way from there."""
    if not os.path.isabs(path) and (recipe.folder / path).exists():
        return path
    found = recipe.locate(path)
    if not os.path.exists(found):
        return path
    way = Path(os.path.relpath(os.path.realpath(found), home)).as_posix()
    return way if way.startswith(".") else f"./{way}"


def _paths(value: Any, relative: Callable[[str], str]) -> Any:
    """Plain data with its absolute paths made relative."""
    if isinstance(value, Mapping):
        return {key: _paths(inner, relative) for key, inner in value.items()}
    if isinstance(value, list):
        return [_paths(inner, relative) for inner in value]
    return relative(value) if isinstance(value, str) and os.path.isabs(value) else value


def _given(value: Any) -> Any:
    """Plain data without what is None."""
    if isinstance(value, Mapping):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value
