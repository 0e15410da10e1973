"""The verbs as functions: what the command line calls, and what a notebook may."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mowmerge import __version__, scoring
from mowmerge.checkpoint import fp8, heads, sidecars, writer
from mowmerge.checkpoint.contents import contents
from mowmerge.checkpoint.contents import planned as specs_of
from mowmerge.checkpoint.dynamic import held
from mowmerge.checkpoint.source import config
from mowmerge.checkpoint.writer import Staging
from mowmerge.dynamic import remote
from mowmerge.hub import lineage
from mowmerge.hub.card import card
from mowmerge.methods import registry
from mowmerge.plan import Plan, config_source
from mowmerge.planner import Options, build
from mowmerge.recipe import parse
from mowmerge.recipe.model import Recipe
from mowmerge.report import report
from mowmerge.scoring import (
    compare,
    evaluate,
    report_folder,
    report_on,
    tasks_of,
    tell_card,
)
from mowmerge.tensors import DTYPES, TensorReader, torch

if TYPE_CHECKING:
    from mowmerge.engine import Sink
    from mowmerge.evals.schema import Report as EvalReport
    from mowmerge.hub.card import Results
    from mowmerge.hub.package import Package
    from mowmerge.hub.push import Pushed
    from mowmerge.training.settings import Options as Training

__all__ = [
    "check", "compare", "demo", "evaluate", "extract", "inspect", "load", "merge", "plan",
    "plan_push", "plan_training", "push", "report_folder", "report_on",
    "survey", "tasks_of", "tell_card", "train_router",
]  # fmt: skip
Advance = Callable[[int], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """The checkpoint, what report.json now says of its routers, and whether this process is the
    one of several that speaks for all."""

    path: Path
    report: dict[str, Any]
    speaks: bool


@dataclass(frozen=True)
class Result:
    """Where the merged checkpoint is, and its report."""

    path: Path
    report: dict[str, Any]


def check(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The parsed recipe; RecipeError with everything that is wrong with it. Loads no torch."""
    return parse.load(recipe, overrides)


def plan(
    recipe: str | Path | Recipe, *, overrides: Sequence[str] = (), options: Options | None = None
) -> Plan:
    """What a merge would do, from headers alone. Loads no torch."""
    parsed = recipe if isinstance(recipe, Recipe) else check(recipe, overrides)
    return build(parsed, options)


def survey(
    recipe: str | Path | Recipe, *, overrides: Sequence[str] = (), options: Options | None = None
) -> Plan:
    """The plan, final: what a dynamic method's layout depends on is measured in the weights."""
    parsed = recipe if isinstance(recipe, Recipe) else check(recipe, overrides)
    planned = plan(parsed, options=options)
    if not planned.undecided:
        return planned
    from mowmerge.survey import survey as measure

    return build(parsed, replace(options or Options(), surveyed=measure(parsed, planned)))


def merge(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    options: Options | None = None,
    hashes: bool = True,
    force: bool = False,
    begin: Callable[[Plan], Advance] = lambda plan: lambda nbytes: None,
    tell: Tell = lambda line: None,
) -> Result:
    """Merges a recipe's models into the folder `out`, which appears when it is whole.

    `out` defaults to the recipe's output.path, then to ./merged/<recipe name>. `begin` is given the
    plan and returns what is called with the number of bytes written, for progress; `tell` is given
    a line now and then while coefficients are fitted.
    """
    from mowmerge.engine import Engine

    began = time.perf_counter()
    parsed = recipe if isinstance(recipe, Recipe) else check(recipe, overrides)
    planned = survey(parsed, options=options)
    target = Path(out or parsed.output.path or Path("merged") / parsed.name)
    if parsed.output.format == "adapter":
        from mowmerge import lora

        return Result(*lora.merge(parsed, planned, target, hashes=hashes, force=force, begin=begin))
    keep = [Path(stored.folder) for _, stored in planned.checkpoints]
    with Staging(target, force=force, keep=keep) as staging:
        staging.allocate(planned.files)
        planned, learned = _fitted(parsed, planned, staging.path, tell)
        advance = begin(planned)
        with writer.ShardSink(staging.path, planned.files, advance, planned.packings) as sink:
            engine = Engine(planned)
            tensors = engine.run(sink)
            _write_dynamic(planned, engine.readers, sink)
        try:
            for model, shard in planned.heads.items():
                heads.write(engine.readers[model], shard, staging.path / shard.file)
                settings = config(_folder(planned, model))
                label_map = (staging.path / shard.file).with_suffix(".json")
                _write(label_map, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            extra = _write_sidecars(planned, parsed, staging.path) | learned
            content = report(planned, tensors, time.perf_counter() - began, extra)
            _write(staging.path / "report.json", json.dumps(content, indent=1) + "\n")
            _finish(planned, staging.path, hashes)
            _write(staging.path / "README.md", card(staging.path).text)
        except OSError as error:
            raise writer.denied(error, staging.path) from error
        staging.commit()
    return Result(staging.out, content)


def load(folder: str | Path, *, task: str | None = None) -> Any:
    """The transformers model of a merged folder: its backbone, or with the head of a task.

    `task` is a task of the folder's recipe, or the name of a model whose head was kept.

    Raises:
        CheckpointError: no such head, or one that does not fit the backbone.
        SourceError: transformers is not installed.
    """
    from mowmerge.tasks import heads as task_heads

    return task_heads.load(Path(folder), task)


def inspect(
    target: str | Path, *, overrides: Sequence[str] = (), options: Options | None = None
) -> dict[str, Any]:
    """What a dynamic checkpoint holds, from its headers; or what a recipe would write.

    For a recipe whose method needs a survey that is run (it reads the weights), and nothing else.

    Raises:
        RecipeError, CheckpointError, SourceError: as `plan`; or no dynamic checkpoint.
    """
    if Path(target).is_dir():
        source = held(Path(target))
        told = contents(source.manifest, source.specs)
        return {
            "version": 1, "kind": "checkpoint", "path": str(target), "trained": source.trained,
            **told,
        }  # fmt: skip
    parsed = check(target, overrides)
    how = registry.get(parsed.method).dynamic
    named = {"version": 1, "kind": "recipe", "recipe": parsed.name, "method": parsed.method}
    if how is None:
        return {**named, "dynamic": False}
    asked = replace(options or Options(), download=how.survey is not None)
    planned = survey(parsed, options=asked)
    told = contents(planned.manifest, specs_of(planned)) if planned.manifest else {}
    return {
        **named, "dynamic": True, "rest": planned.rest, "survey": planned.surveyed, **told,
        "write_bytes": planned.write_bytes, "warnings": list(planned.warnings),
    }  # fmt: skip


def extract(
    folder: str | Path,
    out: str | Path,
    *,
    expert: str | None = None,
    task: str | None = None,
    recipe: str | Path | None = None,
    reference: str | None = None,
    hashes: bool = True,
    force: bool = False,
    begin: Callable[[int], Advance] = lambda total: lambda nbytes: None,
) -> Result:
    """Writes the dense model of one expert of a dynamic checkpoint, or of one task, into `out`.

    The report says how far each tensor lies from the expert's: from `reference`, or where the
    recipe found it if that is still there.

    Raises:
        ValueError: not one of `expert` and `task`.
        CheckpointError, RecipeError, ResourceError: see `mowmerge.extraction`.
    """
    from mowmerge import extraction

    if (expert is None) == (task is None):
        raise ValueError("name an expert or a task, and not both")
    found, content = extraction.extract(
        Path(folder), Path(out), expert=expert, task=task, recipe=Path(recipe) if recipe else None,
        reference=reference, hashes=hashes, force=force, begin=begin,
    )  # fmt: skip
    return Result(found, content)


def extract_lora(model: str | Path, base: str | Path, out: str | Path, **options: Any) -> Result:
    """Writes what a model adds to its base as a LoRA into `out`; see `mowmerge.lora.extract`."""
    from mowmerge import lora

    return Result(*lora.extract(str(model), str(base), Path(out), **options))


def plan_training(
    folder: str | Path, recipe: str | Path | Recipe | None = None, options: Training | None = None
) -> dict[str, Any]:
    """What `train_router` would train, on which samples, for how many steps."""
    from mowmerge.training import settings, train

    return train.plan(Path(folder), tasks_of(folder, recipe), options or settings.Options())


def train_router(
    folder: str | Path,
    recipe: str | Path | Recipe | None = None,
    options: Training | None = None,
    *,
    begin: Callable[[int], Callable[[int, float], None]] = lambda steps: lambda step, loss: None,
) -> Trained:
    """Trains the routers of a dynamic checkpoint on the tasks of a recipe: its own, or another.

    The router file is replaced when training has ended well; until then nothing changes. `begin` is
    given the number of steps and returns what is called after each with its number and loss.
    """
    from mowmerge.training import settings, train

    asked = options or settings.Options()
    section, speaks = train.train(Path(folder), tasks_of(folder, recipe), asked, begin)
    return Trained(Path(folder), section, speaks)


def plan_push(
    folder: str | Path,
    repo: str,
    results: Results | None = None,
    begin: Callable[[int], Advance] = lambda total: lambda nbytes: None,
) -> Package:
    """The card and the files of a push; CheckpointError if the folder is not whole."""
    from mowmerge.hub.package import package

    return package(Path(folder), repo, results or scoring.results(Path(folder)), begin)


def push(
    folder: str | Path | Package, repo: str, *, private: bool = False, revision: str | None = None,
    pr: bool = False, force: bool = False, results: Results | None = None,
    tell: Tell = lambda line: None,
) -> Pushed:  # fmt: skip
    """Puts a merged folder on the Hub in one commit; raises as `plan_push` and SourceError."""
    from mowmerge.hub import push as hub

    made = plan_push(folder, repo, results) if isinstance(folder, str | Path) else folder
    return hub.push(made, hub.Target(repo, revision or "", pr, private, force), tell)


def demo(folder: str | Path, tell: Callable[[str], None] = lambda line: None) -> EvalReport:
    """Builds a small real zoo in `folder`, merges it five ways, trains routers, scores them all.

    The report lies in `folder`/report. `tell` is given a line now and then. Experts are trained in
    processes of their own: a script that calls this needs `if __name__ == "__main__"`.
    """
    from mowmerge.demo import tour

    return tour.run(Path(folder), lambda recipe, out: merge(recipe, out, force=True), tell)


def _write_dynamic(planned: Plan, readers: Mapping[str, TensorReader], sink: Sink) -> None:
    """Writes a dynamic checkpoint's heads, as they are, and its untrained routers."""
    if planned.manifest is None:
        return
    from mowmerge.upcycle import initial_routers

    for name, (model, source) in planned.head_names.items():
        for start, data in heads.pieces(readers[model], source):
            sink.write(name, start, data)
    for name, value in initial_routers(planned.manifest):
        if value.numel():
            sink.write(name, 0, value.detach().reshape(-1).view(torch.uint8).numpy().data)


def _fitted(recipe: Recipe, planned: Plan, folder: Path, tell: Tell) -> tuple[Plan, dict[str, Any]]:
    """The plan with its coefficients fitted, written to the folder; facts for the report."""
    file = folder / "coefficients.json"
    if planned.fit is None:
        if recipe.coefficients is not None:
            shutil.copyfile(recipe.locate(recipe.coefficients), file)
        return planned, {}
    from mowmerge.training import fit

    began = time.perf_counter()
    found = fit.fit(recipe, planned.static, tell)
    _write(file, found.coefficients.model_dump_json(indent=1) + "\n")
    facts = found.coefficients.model_dump(mode="json", exclude={"tensors"})
    seconds = round(time.perf_counter() - began, 3)
    return planned.anchored(found.plan), {
        "fit": {**facts, "tasks": found.tasks, "seconds": seconds}
    }


def _folder(planned: Plan, model: str) -> Path:
    """The folder that a model's config and tokenizer come from; a nested plan's are its donor's."""
    return Path(config_source(planned.sources[model]).folder)


def _donor(planned: Plan) -> Path:
    """The folder that config and tokenizer come from: the base's, or the first model's."""
    return _folder(planned, planned.donor)


def _write_sidecars(planned: Plan, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Writes what goes beside the weights, but for the config; returns facts for the report."""
    read = [(name, Path(stored.folder)) for name, stored in planned.checkpoints]
    left = sidecars.copy(_donor(planned), read, folder)
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


def _finish(planned: Plan, folder: Path, hashes: bool) -> None:
    """Hashes and the config: last, so that a folder that is not whole never looks loadable."""
    plain = [job for job in planned.jobs if not job.packing]
    dtypes = {job.output.dtype for job in plain if job.output.kind == "float"}
    before = planned.sources[planned.donor].specs
    known = [job.output for job in plain if job.output.name in before]
    changed = any(spec.dtype != before[spec.name].dtype for spec in known)
    dtype = DTYPES[next(iter(dtypes))].torch_name if changed and len(dtypes) == 1 else None
    if hashes:
        lines = writer.sums(folder)
    if planned.manifest:
        sidecars.write_dynamic_config(_donor(planned), folder, dtype, planned.manifest)
    else:
        donor = _donor(planned)
        quantised = fp8.quantization_config(planned, config(donor))
        sidecars.write_config(
            donor, folder, dtype, headless=bool(planned.heads), quantised=quantised
        )
    if hashes:
        if (folder / "config.json").exists():
            lines.append(f"{writer.sha256(folder / 'config.json')}  config.json")
        _write(folder / "SHA256SUMS", "\n".join(lines) + "\n")


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
