"""One merge from its plan to a whole folder: fit, tensors, and what lies beside them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mowmerge import __version__, lock, replay
from mowmerge.checkpoint import chat, fp8, heads, layers, sidecars, writer
from mowmerge.checkpoint.source import config
from mowmerge.checkpoint.writer import ShardSink, Staging
from mowmerge.dynamic import remote
from mowmerge.engine import Engine
from mowmerge.hub import lineage
from mowmerge.hub.card import card
from mowmerge.plan import Plan, config_source
from mowmerge.recipe import parse
from mowmerge.recipe.model import Digest, Recipe
from mowmerge.report import report
from mowmerge.tensors import DTYPES, torch

Advance = Callable[[int], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class How:
    """What a caller asks of a merge; see `mowmerge.api.merge`."""

    hashes: bool
    force: bool
    resume: bool
    locked: bool


def merge(
    recipe: Recipe,
    planned: Plan,
    out: Path,
    how: How,
    began: float,
    begin: Callable[[Plan], Advance],
    tell: Tell,
) -> tuple[Path, dict[str, Any]]:
    """Runs the final plan of a recipe; the folder, and the report. `began` is when it all did."""
    again = replay.begin(recipe, planned, hashed=how.hashes, strict=how.locked)
    if again:
        planned = replace(planned, warnings=(*planned.warnings, *again.drift))
    keep = [folder for _, folder in _inputs(planned)]
    key = lock.key(recipe, planned)
    with Staging(out, force=how.force, keep=keep, key=key, resume=how.resume) as staging:
        journal = staging.journal
        staging.allocate(planned.files)
        planned, learned = _fitted(recipe, planned, staging, tell)
        advance = begin(planned)
        advance(sum(entry["written_bytes"] for entry in journal.done.values()))
        with ShardSink(staging.path, planned.files, advance, planned.packings) as sink:
            engine = Engine(planned)
            tensors = engine.run(sink, journal)
            _write_dynamic(planned, engine, sink)
        lock.unchanged(key, planned)
        try:
            for model, shard in planned.heads.items():
                heads.write(engine.readers[model], shard, staging.path / shard.file)
                settings = config(_folder(planned, model))
                label_map = (staging.path / shard.file).with_suffix(".json")
                _write(label_map, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            extra = _write_sidecars(planned, recipe, staging.path) | learned
            written = journal.finish(lambda: _seal(recipe, planned, staging, how.hashes))
            if again:
                extra["replay"] = again.outcome(planned, staging.path, written)
            content = report(planned, tensors, time.perf_counter() - began, extra)
            _write(staging.path / "report.json", json.dumps(content, indent=1) + "\n")
            _write(staging.path / "README.md", card(staging.path).text)
        except OSError as error:
            raise writer.denied(error, staging.path) from error
        staging.commit()
    return staging.out, content


def _write_dynamic(planned: Plan, engine: Engine, sink: ShardSink) -> None:
    """Writes a dynamic checkpoint's heads, as they are, and its untrained routers."""
    if planned.manifest is None:
        return
    from mowmerge.upcycle import initial_routers

    for name, (model, source) in planned.head_names.items():
        for start, data in heads.pieces(engine.readers[model], source):
            sink.write(name, start, data)
    for name, value in initial_routers(planned.manifest):
        if value.numel():
            sink.write(name, 0, value.detach().reshape(-1).view(torch.uint8).numpy().data)


def _fitted(
    recipe: Recipe, planned: Plan, staging: Staging, tell: Tell
) -> tuple[Plan, dict[str, Any]]:
    """The plan with its coefficients fitted, written to the folder; facts for the report."""
    file = staging.path / "coefficients.json"
    if planned.fit is None:
        if recipe.coefficients is not None:
            shutil.copyfile(recipe.locate(recipe.coefficients), file)
        return planned, {}
    from mowmerge.training import fit, fitted

    if "fit" in staging.journal.facts:
        found = fitted.again(planned.static, staging.journal.facts["fit"])
    else:
        found = fit.fit(recipe, planned.static, tell)
        staging.journal.keep("fit", fitted.kept(found))
    _write(file, found.coefficients.model_dump_json(indent=1) + "\n")
    facts = found.coefficients.model_dump(mode="json", exclude={"tensors"})
    return planned.anchored(found.plan), {
        "fit": {**facts, "tasks": found.tasks, "seconds": found.seconds}
    }


def _inputs(planned: Plan) -> list[tuple[str, Path]]:
    """Every model that is read, those of nested recipes too: its name and its folder."""
    return [(name, Path(stored.folder)) for name, stored in planned.checkpoints]


def _folder(planned: Plan, model: str) -> Path:
    """The folder that a model's config and tokenizer come from; a nested plan's are its donor's."""
    return Path(config_source(planned.sources[model]).folder)


def _donor(planned: Plan) -> Path:
    """The folder that config and tokenizer come from: the base's, or the first model's."""
    return _folder(planned, planned.donor)


def _write_sidecars(planned: Plan, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Writes what goes beside the weights, but for the config; returns facts for the report."""
    left = sidecars.copy(_donor(planned), _inputs(planned), folder)
    if planned.chat_template is not None:
        chat.write(planned.chat_template, folder)
    body = [shard for shard in planned.files if shard not in planned.heads.values()]
    listing = writer.index(body, planned.specs)
    if listing:
        _write(folder / "model.safetensors.index.json", listing)
    _write(folder / "recipe.yaml", recipe.text)
    if planned.manifest:
        remote.bundle(folder)
    return {
        "mowmerge": __version__, "recipe": recipe.name, "inputs": lineage.inputs(planned),
        "files_left_behind": left,
    }  # fmt: skip


def _seal(recipe: Recipe, planned: Plan, staging: Staging, hashes: bool) -> dict[str, Digest]:
    """Hashes, lock and config: last, so that a folder that is not whole never looks loadable.

    Returns what the weight files are.
    """
    folder = staging.path
    lines = writer.sums(folder) if hashes else []
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    read = lock.inputs(planned, hashed=hashes)
    written = {
        shard.file: Digest(bytes=shard.nbytes, sha256=sums.get(shard.file))
        for shard in planned.files
    }
    _write(folder / parse.LOCK, lock.text(recipe, planned, folder, staging.out, read, written))
    _write_config(planned, folder)
    if hashes:
        late = [name for name in (parse.LOCK, "config.json") if (folder / name).exists()]
        lines += [f"{writer.sha256(folder / name)}  {name}" for name in late]
        _write(folder / "SHA256SUMS", "\n".join(lines) + "\n")
    return written


def _write_config(planned: Plan, folder: Path) -> None:
    """Writes the config, with the dtype of the weights where that is not the donor's."""
    plain = [job for job in planned.jobs if not job.packing]
    dtypes = {job.output.dtype for job in plain if job.output.kind == "float"}
    before = planned.sources[planned.donor].specs
    known = [job.output for job in plain if job.output.name in before]
    changed = any(spec.dtype != before[spec.name].dtype for spec in known)
    dtype = DTYPES[next(iter(dtypes))].torch_name if changed and len(dtypes) == 1 else None
    if planned.manifest:
        sidecars.write_dynamic_config(_donor(planned), folder, dtype, planned.manifest)
    else:
        donor = _donor(planned)
        quantised = fp8.quantization_config(planned, config(donor))
        sidecars.write_config(
            donor, folder, dtype, headless=bool(planned.heads), quantised=quantised,
            planned=layers.settings(planned),
        )  # fmt: skip


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
