"""The verbs as functions: what the command line calls, and what a notebook may."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mowmerge import __version__
from mowmerge.checkpoint import heads, sidecars, writer
from mowmerge.checkpoint.source import config
from mowmerge.checkpoint.writer import Staging
from mowmerge.dynamic.format import auto_class
from mowmerge.hub.card import card
from mowmerge.plan import Plan, Shard, Stored
from mowmerge.planner import Options, build
from mowmerge.recipe import parse
from mowmerge.recipe.model import Recipe
from mowmerge.report import report
from mowmerge.tensors import DTYPES, TensorReader, torch

if TYPE_CHECKING:
    from mowmerge.engine import Sink
    from mowmerge.evals.evaluator import Score

Advance = Callable[[int], None]


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
) -> Result:
    """Merges a recipe's models into the folder `out`, which appears when it is whole.

    `out` defaults to the recipe's output.path, then to ./merged/<recipe name>. `begin` is given the
    plan and returns what is called with the number of bytes written, for progress.
    """
    from mowmerge.engine import Engine

    began = time.perf_counter()
    parsed = recipe if isinstance(recipe, Recipe) else check(recipe, overrides)
    planned = survey(parsed, options=options)
    target = Path(out or parsed.output.path or Path("merged") / parsed.name)
    keep = [folder for _, folder in _inputs(planned)]
    with Staging(target, force=force, keep=keep) as staging:
        staging.allocate(planned.files)
        with _ShardSink(staging.path, planned.files, begin(planned)) as sink:
            engine = Engine(planned)
            tensors = engine.run(sink)
            _write_dynamic(planned, engine.readers, sink)
        try:
            for model, shard in planned.heads.items():
                heads.write(engine.readers[model], shard, staging.path / shard.file)
                held = config(_folder(planned, model))
                label_map = (staging.path / shard.file).with_suffix(".json")
                _write(label_map, json.dumps(held, indent=2, ensure_ascii=False) + "\n")
            extra = _write_sidecars(planned, parsed, staging.path)
            content = report(planned, tensors, time.perf_counter() - began, extra)
            _write(staging.path / "report.json", json.dumps(content, indent=1) + "\n")
            _finish(planned, staging.path, hashes)
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


def evaluate(
    folder: str | Path, tasks: str | Path | Recipe, *, against: Sequence[str] = ("base", "experts")
) -> list[Score]:
    """The scores of a merged folder on the tasks of a recipe, and of its base and its experts."""
    from mowmerge.evals import evaluator

    parsed = tasks if isinstance(tasks, Recipe) else check(tasks)
    return evaluator.evaluate(Path(folder), parsed, against)


def demo(folder: str | Path) -> list[dict[str, Any]]:
    """Builds a small real zoo in `folder`, merges it, and returns how well each model does."""
    from mowmerge.demo import minilm

    return list(minilm.run(Path(folder), lambda recipe, out: merge(recipe, out, force=True)))


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


class _ShardSink:
    """Puts bytes at their planned offsets in the staged shards."""

    def __init__(self, folder: Path, shards: Sequence[Shard], advance: Advance) -> None:
        self._places = {name: (s.file, at) for s in shards for name, at in s.offsets.items()}
        self._folder, self._advance, self._closing = folder, advance, ExitStack()
        self._fds: dict[str, int] = {}

    def __enter__(self) -> Sink:
        for file in {file for file, _ in self._places.values()}:
            self._fds[file] = os.open(self._folder / file, os.O_WRONLY)
            self._closing.callback(os.close, self._fds[file])
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.close()

    def write(self, name: str, start: int, data: memoryview) -> None:
        file, offset = self._places[name]
        try:
            writer.write_at(self._fds[file], data, offset + start)
        except OSError as error:
            raise writer.denied(error, self._folder / file) from error
        self._advance(len(data))


def _inputs(planned: Plan) -> list[tuple[str, Path]]:
    """Every model that is read, those of nested recipes too: its name and its folder."""
    found: list[tuple[str, Path]] = []
    for name, origin in planned.sources.items():
        if isinstance(origin, Stored):
            found.append((name, Path(origin.folder)))
        else:
            found += [(f"{name}-{inner}", folder) for inner, folder in _inputs(origin)]
    return found


def _folder(planned: Plan, model: str) -> Path:
    """The folder that a model's config and tokenizer come from; a nested plan's are its donor's."""
    origin = planned.sources[model]
    return Path(origin.folder) if isinstance(origin, Stored) else _donor(origin)


def _donor(planned: Plan) -> Path:
    """The folder that config and tokenizer come from: the base's, or the first model's."""
    return _folder(planned, planned.donor)


def _write_sidecars(planned: Plan, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Writes what goes beside the weights, but for the config; returns facts for the report."""
    left = sidecars.copy(_donor(planned), _inputs(planned), folder)
    body = [shard for shard in planned.files if shard not in planned.heads.values()]
    listing = writer.index(body, planned.specs)
    if listing:
        _write(folder / "model.safetensors.index.json", listing)
    _write(folder / "recipe.yaml", recipe.text)
    auto = "AutoModel"
    if planned.manifest:
        sidecars.write_code(folder)
        front = sidecars.front(_donor(planned), planned.manifest)
        auto = auto_class(front.removeprefix("Mowmerge"))
    _write(folder / "README.md", card(planned, recipe, auto))
    return {"mowmerge": __version__, "recipe": recipe.name, "files_left_behind": left}


def _finish(planned: Plan, folder: Path, hashes: bool) -> None:
    """Hashes and the config: last, so that a folder that is not whole never looks loadable."""
    dtypes = {job.output.dtype for job in planned.jobs if job.output.kind == "float"}
    changed = any(
        job.output.dtype != planned_dtype
        for job in planned.jobs
        if (planned_dtype := _donor_dtype(planned, job.output.name)) is not None
    )
    dtype = DTYPES[next(iter(dtypes))].torch_name if changed and len(dtypes) == 1 else None
    if hashes:
        names = sorted(
            {shard.file for shard in planned.files}
            | {p.name for p in folder.iterdir() if p.is_file() and p.name not in _NOT_HASHED}
            | {p.relative_to(folder).as_posix() for p in folder.glob("heads/*")}
        )
        lines = [f"{writer.sha256(folder / name)}  {name}" for name in names]
    if planned.manifest:
        sidecars.write_dynamic_config(_donor(planned), folder, dtype, planned.manifest)
    else:
        sidecars.write_config(_donor(planned), folder, dtype, headless=bool(planned.heads))
    if hashes:
        if (folder / "config.json").exists():
            lines.append(f"{writer.sha256(folder / 'config.json')}  config.json")
        _write(folder / "SHA256SUMS", "\n".join(lines) + "\n")


_NOT_HASHED = ("report.json", "README.md")


def _donor_dtype(planned: Plan, name: str) -> str | None:
    origin = planned.sources[planned.donor]
    spec = origin.specs.get(name)
    return spec.dtype if spec else None


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
