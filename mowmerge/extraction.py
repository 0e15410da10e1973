"""Gives an ordinary checkpoint back from a dynamic one: an expert, or what a task would see."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mowmerge import __version__
from mowmerge.checkpoint import heads, layout, sidecars, writer
from mowmerge.checkpoint.dense import DenseReader
from mowmerge.checkpoint.distance import Reference
from mowmerge.checkpoint.dynamic import DynamicCheckpoint, held
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.checkpoint.source import find
from mowmerge.checkpoint.writer import ShardSink, Staging
from mowmerge.dynamic.format import Manifest
from mowmerge.errors import CheckpointError, MowmergeError, RecipeError, did_you_mean
from mowmerge.plan import Shard, Stored
from mowmerge.recipe import parse, tasks_file
from mowmerge.recipe.model import Output, Recipe
from mowmerge.tasks import data, inputs
from mowmerge.tasks import heads as task_heads
from mowmerge.tensors import DTYPES, TensorReader, TensorSpec

BATCH = 32  # samples routed at a time
GONE = (
    "the recipe's own sources are not found from here: name the expert with --reference, or the"
    " recipe where it lay with --recipe"
)
PLACED = "vocabulary rows were placed by token: those of the expert lie elsewhere"

Gates = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Wanted:
    """What is extracted: whose it is, and the coefficients of each gate."""

    expert: str
    gates: Gates
    task: str | None = None
    note: str = ""


@dataclass(frozen=True)
class _Piece:
    """One tensor of the result: where it is read, and under which name there."""

    reader: TensorReader
    name: str
    spec: TensorSpec
    kind: str  # a codec | static | head


def extract(
    folder: Path,
    out: Path,
    *,
    expert: str | None = None,
    task: str | None = None,
    recipe: Path | None = None,
    reference: str | None = None,
    hashes: bool = True,
    force: bool = False,
    begin: Callable[[int], Callable[[int], None]],
) -> tuple[Path, dict[str, Any]]:
    """Writes the dense model of an expert, or of a task, into `out`; its path and report.

    `recipe` names tasks and sources where it is not the folder's own; `reference` is the expert to
    compare with. `begin` is given the bytes to write and returns what is told of those written.

    Raises:
        CheckpointError: no dynamic checkpoint, or not a whole one; no such expert or task.
        ResourceError: `out` cannot be written.
    """
    began, source = time.perf_counter(), held(folder)
    if task is not None:
        named = _recipe(folder, recipe)
        wanted = _of_task(source, named, task)
    else:
        named = _recipe(folder, recipe, needed=recipe is not None)
        wanted = _of_expert(source, str(expert))
    pieces = _pieces(source, wanted)
    compared, why = _reference(named, wanted.expert, pieces, reference)
    metadata = {"format": "pt", "mowmerge": __version__}
    shards = layout.layout([p.spec for p in pieces], Output().shard_size, metadata)
    with Staging(out, force=force, keep=[folder]) as staging:
        staging.allocate(shards)
        total = sum(p.spec.nbytes for p in pieces)
        with ShardSink(staging.path, shards, begin(total)) as sink:
            tensors = [_write(piece, sink, compared) for piece in pieces]
        report = {
            **_described(source, wanted), **_compared(compared, why, tensors),
            "written_bytes": sum(shard.nbytes for shard in shards),
            "seconds": round(time.perf_counter() - began, 3), "tensors": tensors,
        }  # fmt: skip
        try:
            _finish(source, wanted, shards, pieces, report, staging.path, hashes)
        except OSError as error:
            raise writer.denied(error, staging.path) from error
        staging.commit()
    return staging.out, report


def one_hot(manifest: Manifest, expert: int) -> dict[str, list[float]]:
    """Each gate's coefficients for one expert: 1 for its slots, 0 for the others."""
    n = len(manifest.experts)
    slots = {name: manifest.slots(name) for name in manifest.gates}
    return {
        name: [float(s // (count // n) == expert) for s in range(count)]
        for name, count in slots.items()
    }


def _of_expert(source: DynamicCheckpoint, expert: str) -> Wanted:
    manifest = source.manifest
    if expert not in manifest.experts:
        raise CheckpointError(
            f"there is no expert '{expert}' in this checkpoint",
            where=str(source.folder),
            hint=did_you_mean(expert, manifest.experts),
        )
    return Wanted(expert, one_hot(manifest, manifest.experts.index(expert)))


def _of_task(source: DynamicCheckpoint, recipe: Recipe | None, task: str) -> Wanted:
    """The task's expert; where blocks have gates of their own, their mean over the task."""
    if recipe is None or task not in recipe.tasks:
        known = list(recipe.tasks) if recipe else []
        raise CheckpointError(
            f"the recipe has no task '{task}'",
            where=recipe.file if recipe else str(source.folder),
            hint=did_you_mean(task, known) or "name a recipe with tasks: --recipe, or an --expert",
        )
    manifest = source.manifest
    expert = recipe.tasks[task].expert
    if expert is None:
        raise CheckpointError(
            f"task '{task}' is held out: it has no expert", where=recipe.where("tasks", task)
        )
    alone = _of_expert(source, expert)
    seen = {name: [c or manifest.rest(name) for c in row] for name, row in alone.gates.items()}
    wanted = replace(alone, task=task, gates=seen)
    scopes = {gate.scope for gate in manifest.gates.values()}
    if "block" in scopes:
        means, count = _mean_gates(source, recipe, task)
        note = (
            f"every gate is its mean over the {count} samples of the task's select split: one"
            " dense model, where the dynamic one has other weights for each sample"
        )
        if source.trained is False:
            note += "; the routers are not trained yet"
        return replace(wanted, gates={**wanted.gates, **means}, note=note)
    if "module" in scopes:
        return replace(wanted, note="the expert's own gate, where each token would choose")
    return wanted


def _mean_gates(
    source: DynamicCheckpoint, recipe: Recipe, task: str
) -> tuple[dict[str, list[float]], int]:
    """The mean of the model's own gates over the task's select split, and how many samples."""
    items, manifest = data.load(recipe, task, "select"), source.manifest
    if not len(items):
        raise RecipeError(f"the select split of task '{task}' is empty", where=items.where)
    model = task_heads.load(source.folder, None)
    processor = inputs.processor(source.folder, recipe.tasks[task].type)
    total: Any = 0
    for start in range(0, len(items), BATCH):
        some = [items.input(i) for i in range(start, min(start + BATCH, len(items)))]
        total = total + model.route(**inputs.encode(processor, some, model.config)).double().sum(0)
    sizes = [manifest.slots(name) for name in manifest.routed]
    means = (total / len(items)).split(sizes)
    return {n: m.tolist() for n, m in zip(manifest.routed, means, strict=True)}, len(items)


def _pieces(source: DynamicCheckpoint, wanted: Wanted) -> list[_Piece]:
    """Every tensor of the result, under the expert's own names where it has a head."""
    manifest = source.manifest
    dense, stored = DenseReader(source, wanted.gates), StoredReader(source.stored)
    codecs = {code.name: code.codec for code in manifest.codes}
    number = manifest.experts.index(wanted.expert)
    head = manifest.heads[number] if manifest.heads else None
    if head and not head.module:
        raise CheckpointError(
            "the manifest does not say what the heads are called", where=str(source.folder),
            hint="an earlier mowmerge wrote it: merge again",
        )  # fmt: skip
    prefix, lacks = (head.prefix, head.lacks) if head else ("", ())
    pieces = [
        _Piece(dense, n, replace(spec, name=prefix + n), codecs.get(n, "static"))
        for n, spec in dense.specs.items()
        if n not in lacks
    ]
    for name, spec in source.head(number).items() if head else ():
        pieces.append(_Piece(stored, spec.name, replace(spec, name=name), "head"))
    return pieces


def _recipe(folder: Path, given: Path | None, *, needed: bool = True) -> Recipe | None:
    """The recipe that names tasks and sources; None where there is none, or none that reads."""
    file = given or parse.kept(folder)
    if given is None and not file.exists():
        return None
    try:
        return tasks_file.load(given, folder) if given else parse.load(file)
    except MowmergeError:
        if needed:
            raise
        return None


def _reference(
    recipe: Recipe | None, expert: str, pieces: Sequence[_Piece], given: str | None
) -> tuple[Reference | None, str]:
    """What to compare with, or why there is nothing."""
    if given is None and recipe is not None and recipe.vocabulary is not None:
        return None, PLACED
    ref = recipe.models.get(expert) if recipe else None
    ref = None if ref and ref.adapter else ref  # its source alone is not the expert
    base = _local(recipe, recipe.base) if recipe else None
    own = find(given) if given else _local(recipe, ref.source) if recipe and ref else None
    if own is None:
        return None, GONE
    try:
        return Reference(own, base, {p.spec.name: p.spec for p in pieces}), ""
    except CheckpointError as error:
        if given:
            raise
        return None, str(error.problems[0].message)


def _local(recipe: Recipe | None, source: Any) -> Stored | None:
    """A recipe's source where it lies on this machine and is whole: nothing is downloaded."""
    path = recipe.locate(source) if recipe and isinstance(source, str) else ""
    if not os.path.exists(path):
        return None
    try:
        return find(path)
    except MowmergeError:
        return None


def _write(piece: _Piece, sink: ShardSink, compared: Reference | None) -> dict[str, Any]:
    """Streams one tensor into the sink; its line of the report."""
    spec = piece.spec
    line = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "from": piece.kind}
    with ExitStack() as stack:
        beside = stack.enter_context(compared.beside(spec)) if compared else None
        for start, block in heads.pieces(piece.reader, piece.name):
            sink.write(spec.name, start, block)
            if beside:
                beside.update(start, block)
        return {**line, **(beside.figures() if beside else {})}


def _described(source: DynamicCheckpoint, wanted: Wanted) -> dict[str, Any]:
    return {
        "version": 1,
        "mowmerge": __version__,
        "from": source.folder.resolve().name,
        "method": source.manifest.method,
        "expert": wanted.expert,
        "task": wanted.task,
        "gates": {name: list(c) for name, c in wanted.gates.items()},
        "note": wanted.note,
    }


def _compared(
    compared: Reference | None, why: str, tensors: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the comparison gave for the whole model: |W - W_k| / |W_k - W_0| over all tensors."""
    if compared is None:
        return {"reference": None, "why_none": why}
    told = [t for t in tensors if t["relative"] is not None]
    error, moved = (sum(t[key] ** 2 for t in told) ** 0.5 for key in ("error", "moved"))
    worst = max(told, key=lambda t: t["relative"], default=None)
    return {
        "reference": compared.expert.origin,
        "base": compared.base.origin if compared.base else None,
        "exact": sum(t["exact"] for t in tensors),
        "relative": error / moved if moved else None,
        "largest": {"name": worst["name"], "relative": worst["relative"]} if worst else None,
    }


def _finish(
    source: DynamicCheckpoint,
    wanted: Wanted,
    shards: Sequence[Shard],
    pieces: Sequence[_Piece],
    report: Mapping[str, Any],
    folder: Path,
    hashes: bool,
) -> None:
    """Writes what goes beside the weights: the config last, then the sums."""

    def put(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    sidecars.copy(source.folder, (), folder)
    listing = layout.index(shards, {p.spec.name: p.spec for p in pieces})
    if listing:
        put("model.safetensors.index.json", listing)
    put("report.json", json.dumps(report, indent=1) + "\n")
    put("README.md", _card(report))
    lines = writer.sums(folder) if hashes else []
    settings = _config(source, wanted, pieces)
    put("config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    if hashes:
        lines.append(f"{writer.sha256(folder / 'config.json')}  config.json")
        put("SHA256SUMS", "\n".join(lines) + "\n")


def _config(
    source: DynamicCheckpoint, wanted: Wanted, pieces: Sequence[_Piece]
) -> Mapping[str, Any]:
    """The config of the expert's head, or of the base, with the dtype of the body's tensors."""
    manifest = source.manifest
    settings: Mapping[str, Any] = source.config["base_config"]
    if manifest.heads:
        settings = manifest.heads[manifest.experts.index(wanted.expert)].config
    body = {p.spec.dtype for p in pieces if p.kind != "head" and p.spec.kind == "float"}
    dtype = DTYPES[body.pop()].torch_name if len(body) == 1 else None
    if dtype in (None, settings.get("dtype"), settings.get("torch_dtype")):
        return settings
    return sidecars.with_dtype(settings, str(dtype))


def _card(report: Mapping[str, Any]) -> str:
    """The README.md: what this is and how exact."""
    what = f"What task `{report['task']}` sees" if report["task"] else "An expert"
    return "\n".join([
        "---", "library_name: transformers", "tags:", "- mowmerge", "---", "",
        f"# {report['task'] or report['expert']}", "",
        f"{what}, extracted with mowmerge from `{report['from']}`, a dynamic checkpoint of the"
        f" method {report['method']}: expert `{report['expert']}`.", "",
        *([f"Note: {report['note']}.", ""] if report["note"] else []),
        "How near each tensor is to the expert's is in report.json.", "",
    ])  # fmt: skip
