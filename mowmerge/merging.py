"""One merge from its plan to a whole folder: fit, tensors, and what lies beside them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mowmerge import __version__, lock, replay
from mowmerge.checkpoint import chat, encoder, fp8, heads, layers, layout, sidecars, writer
from mowmerge.checkpoint.journal import changed
from mowmerge.checkpoint.source import config
from mowmerge.checkpoint.writer import ShardSink, Staging
from mowmerge.dynamic import remote
from mowmerge.engine import Done, Engine
from mowmerge.hub import lineage
from mowmerge.hub.card import card
from mowmerge.plan import Plan, config_source
from mowmerge.ranks import Lost, Ranks
from mowmerge.recipe import parse
from mowmerge.recipe.model import Digest, Recipe
from mowmerge.report import report, text
from mowmerge.scratch import Scratch
from mowmerge.sharing import Share, share
from mowmerge.tensors import DTYPES, torch

T = TypeVar("T")
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
    ranks: Ranks,
) -> tuple[Path, dict[str, Any]]:
    """Runs the final plan of a recipe; the folder, and the report. `began` is when it all did.

    Ranks write a share of the tensors each; what is of the whole the first does while they wait.
    """

    def replaying() -> replay.Replay | None:
        return replay.begin(recipe, planned, hashed=how.hashes, strict=how.locked)

    again = ranks.together(lambda: replaying() if ranks.first else None)
    if again:
        planned = replace(planned, warnings=(*planned.warnings, *again.drift))
    keep = [folder for _, folder in _inputs(planned)]
    key = ranks.together(lambda: lock.key(recipe, planned))
    ranks.alike(lambda: {part: key[part] for part in key if part != "inputs"}, changed)
    if ranks.across:
        ranks.alike(lambda: lock.sampled(planned), _other_files)
    with Staging(
        out, force=how.force, keep=keep, key=key, resume=how.resume, ranks=ranks
    ) as staging:
        staging.allocate(planned.files)
        planned, learned = _fitted(recipe, planned, staging, tell)
        advance = begin(planned)
        done = _written(planned, staging, key, advance)
        finished: list[dict[str, Any]] = []

        def finish() -> dict[str, Any]:
            extra = _write_sidecars(planned, recipe, staging.path) | learned
            if ranks.count > 1:
                extra["ranks"] = done.ranks
            written = staging.journal.finish(lambda: _seal(recipe, planned, staging, how.hashes))
            if done.statistics:
                extra["statistics"] = done.statistics
            if again:
                extra["replay"] = again.outcome(planned, staging.path, written)
            told = replace(planned, warnings=(*planned.warnings, *done.warnings))
            content = report(told, done.reports, time.perf_counter() - began, extra)
            _write(staging.path / "report.json", text(content))
            _write(staging.path / "README.md", card(staging.path).text)
            staging.commit()
            finished.append(content)
            return content

        try:
            content = staging.ranks.from_first(lambda: _on(staging.path, finish))
        except Lost:
            if not finished:  # else all is done, and who is gone had nothing left to do
                raise
            content = finished[0]
    return staging.out, content


def _written(planned: Plan, staging: Staging, key: Mapping[str, Any], advance: Advance) -> Done:
    """Writes every weight, each rank its share of them; when it returns all of them stand."""
    ranks, journal = staging.ranks, staging.journal
    scratch = Scratch(staging.stage / "scratch", planned.write_bytes)
    engine = Engine(planned, ranks=ranks, scratch=scratch)
    mine = share(planned, journal.done, ranks)
    advance(sum(entry["written_bytes"] for entry in journal.done.values()))
    sink = ShardSink(staging.path, planned.files, advance, planned.packings, mine.files)
    with sink, scratch:
        done = engine.run(sink, journal)

        def rest() -> None:
            _write_dynamic(planned, engine, sink, mine)
            if ranks.first:
                _write_heads(planned, engine, staging.path)
            else:
                journal.finish(lambda: None)
            lock.unchanged(key["inputs"], lock.seen(planned))

        ranks.together(lambda: _on(staging.path, rest))
    advance(sum(told["bytes"] for told in done.ranks[1:]))
    return done


def _on(folder: Path, work: Callable[[], T]) -> T:
    """What the work returns; what the system refuses it in that folder is a ResourceError."""
    try:
        return work()
    except OSError as error:
        raise writer.denied(error, folder) from error


def _write_heads(planned: Plan, engine: Engine, folder: Path) -> None:
    """Writes the heads of a static merge, as they are, each with its model's config."""
    for model, shard in planned.heads.items():
        heads.write(engine.readers[model], shard, folder / shard.file)
        settings = config(_folder(planned, model))
        label_map = (folder / shard.file).with_suffix(".json")
        _write(label_map, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _write_dynamic(planned: Plan, engine: Engine, sink: ShardSink, mine: Share) -> None:
    """Writes a dynamic checkpoint's heads, as they are, and its untrained routers."""
    if planned.manifest is None:
        return
    from mowmerge.upcycle import initial_routers

    for name, (model, source) in planned.head_names.items():
        for start, data in heads.pieces(engine.readers[model], source) if mine.writes(name) else ():
            sink.write(name, start, data)
    if planned.router is None or not any(mine.writes(name) for name in planned.router.offsets):
        return
    for name, value in initial_routers(planned.manifest):
        if value.numel():
            sink.write(name, 0, value.detach().reshape(-1).view(torch.uint8).numpy().data)


def _fitted(
    recipe: Recipe, planned: Plan, staging: Staging, tell: Tell
) -> tuple[Plan, dict[str, Any]]:
    """The plan with its coefficients fitted, written to the folder; facts for the report.

    Of several ranks the first fits, and the others wait for what it finds.
    """
    file, journal = staging.path / "coefficients.json", staging.journal
    if planned.fit is None:
        if recipe.coefficients is not None and staging.ranks.first:
            shutil.copyfile(recipe.locate(recipe.coefficients), file)
        return planned, {}
    from mowmerge.training import fit, fitted

    def found_now() -> dict[str, Any]:
        if "fit" not in journal.facts:
            journal.keep("fit", fitted.kept(fit.fit(recipe, planned.static, tell)))
        return dict(journal.facts["fit"])

    kept = staging.ranks.from_first(found_now)
    found = fitted.again(planned.static, kept)
    if staging.ranks.first:
        _write(file, found.coefficients.model_dump_json(indent=1) + "\n")
    facts = found.coefficients.model_dump(mode="json", exclude={"tensors"})
    return planned.anchored(found.plan), {
        "fit": {**facts, "tasks": found.tasks, "seconds": found.seconds}
    }


def _other_files(theirs: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    """Which files are not those of rank 0, in words."""
    names = sorted({*theirs, *mine})
    return [f"{name} is another file here" for name in names if theirs.get(name) != mine.get(name)]


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
    left = sidecars.copy(_donor(planned), _inputs(planned), folder, planned.vocabulary)
    if planned.chat_template is not None:
        chat.write(planned.chat_template, folder)
    body = [shard for shard in planned.files if shard not in planned.heads.values()]
    listing = layout.index(body, planned.specs)
    if listing:
        _write(folder / "model.safetensors.index.json", listing)
    _write(folder / "recipe.yaml", recipe.text)
    if planned.manifest:
        remote.bundle(folder)
    if planned.encoder and planned.manifest and planned.manifest.encoder:
        encoder.copy(
            planned.encoder, planned.manifest.encoder, _donor(planned), folder, planned.vocabulary
        )
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
    before = config_source(planned.sources[planned.donor]).specs
    known = [job.output for job in plain if job.output.name in before]
    changed = any(spec.dtype != before[spec.name].dtype for spec in known)
    dtype = DTYPES[next(iter(dtypes))].torch_name if changed and len(dtypes) == 1 else None
    donor, settings, tokens = _donor(planned), layers.settings(planned), planned.vocabulary
    if planned.manifest:
        sidecars.write_dynamic_config(donor, folder, dtype, planned.manifest, settings, tokens)
    else:
        quantised = fp8.quantization_config(planned, config(donor))
        sidecars.write_config(
            donor, folder, dtype, headless=bool(planned.heads), quantised=quantised,
            planned=settings, vocabulary=tokens,
        )  # fmt: skip


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
