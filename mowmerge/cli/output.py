"""How results look: tables and JSON on stdout, progress and warnings on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mowmerge.api import Advance, Trained
    from mowmerge.placement import Vocabulary
    from mowmerge.plan import Plan, TensorJob

UNITS = ("B", "kB", "MB", "GB", "TB")


def size(nbytes: float) -> str:
    """Bytes for people: 2.5 GB."""
    for unit in UNITS:
        if nbytes < 1000 or unit == UNITS[-1]:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return ""


def limit(max_memory: str | None) -> int | None:
    """--max-memory in bytes."""
    from mowmerge.recipe.model import parse_size

    try:
        return parse_size(max_memory) if max_memory else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--max-memory") from error


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, the first row as heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def warn(messages: Sequence[str]) -> None:
    """Warnings, on stderr."""
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)


def show_plan(plan: Plan, *, as_json: bool) -> None:
    """The whole plan: each tensor with its method, parameters and sources, then the totals."""
    if as_json:
        print(json.dumps(plan_object(plan)))
        return
    rows: list[tuple[str, ...]] = [
        ("tensor", "dtype", "shape", "method", "scope", "from", "parameters")
    ]
    for job in plan.jobs:
        shape = "x".join(map(str, job.output.shape)) or "scalar"
        rows.append(
            (
                job.output.name,
                job.output.dtype,
                shape,
                job.method or "copy",
                job.scope,
                _inputs(job),
                _parameters(job),
            )
        )
        rows += _part_rows(job)
    print(table(rows))
    bound = "at most " if plan.undecided else ""
    there = f", {size(plan.device_bytes)} on each of {', '.join(plan.devices)}"
    print(
        f"\n{len(plan.jobs)} tensors in {len(plan.shards)} file(s);{_dynamic_totals(plan)}"
        f" read {size(plan.read_bytes)}, write {bound}{size(plan.write_bytes)},"
        f" peak memory {size(plan.peak_bytes)} with {plan.workers} worker(s)"
        f"{there if plan.device_bytes else ''}"
    )
    if plan.vocabulary:
        _show_vocabulary(plan.vocabulary)
    if plan.rest:
        print(f"the rest: {plan.rest}")
    if plan.encoder:
        weighs = size(sum(spec.nbytes for spec in plan.encoder.specs.values()))
        print(f"copied whole, as what the classifier looks at: {plan.encoder.origin}, {weighs}")
    if plan.algebra:
        done, largest = plan.algebra, "x".join(map(str, plan.algebra.largest))
        print(
            f"{done.decompositions} singular value decompositions of {done.matrices} matrices, the"
            f" largest {largest}: about {done.flops:.1e} floating-point operations"
            + f"; up to {size(done.kept)} lie on the disk meanwhile"
            * bool(done.kept)
        )
    if plan.fit:
        fit, drawn = plan.fit, plan.fit.steps * plan.fit.batch
        each = "tensor and model" if fit.granularity == "tensor" else "model"
        print(
            f"a fit pass comes first: coefficients of {len(fit.tensors)} tensors, one a {each};"
            f" {fit.steps} steps, {drawn:,} samples of each of {len(fit.tasks)} task(s);"
            f" {size(fit.nbytes)} and activations"
        )
    heads = [head.expert for head in plan.manifest.heads] if plan.manifest else list(plan.heads)
    if heads:
        print(f"heads kept as they are: {', '.join(heads)}")
    if plan.undecided:
        print("which tensors are dynamic is decided by a survey of the weights: --survey runs it")
    if plan.config:
        print(f"config.json: {json.dumps(plan.config)}")
    if plan.dropped:
        print(f"dropped by a rule: {', '.join(plan.dropped)}")
    warn(plan.warnings)


def _show_vocabulary(vocabulary: Vocabulary) -> None:
    """Whose tokens the output has, and what each model has to do with them."""
    told = vocabulary
    added = f" and {told.added:,} added to them" if told.added else ""
    print(
        f"\nvocabulary: the tokens of {told.source}{added}, {told.tokens:,} in {told.rows:,} rows"
        f" ({told.padding:,} without one) of {', '.join(told.tensors)}\n"
    )
    rules = list(dict.fromkeys(rule for share in told.models.values() for rule in share.missing))
    heads = ("model", "tokens", "shared", "added", "moved", "left out")
    rows = [(*heads, *(f"missing: {rule}" for rule in rules))]
    for name, share in told.models.items():
        numbers = (share.tokens, share.shared, share.added, share.moved, share.left)
        counts = (*numbers, *(share.missing.get(rule, 0) for rule in rules))
        rows.append((name, *(f"{count:,}" for count in counts)))
    print(table(rows))


def plan_object(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    return {
        "version": 1,
        "fingerprint": plan.fingerprint,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "peak_bytes": plan.peak_bytes,
        "devices": list(plan.devices),
        "device_bytes": plan.device_bytes,
        "workers": plan.workers,
        "block": plan.block,
        "config": dict(plan.config),
        "shards": [
            {"file": shard.file, "bytes": shard.nbytes, "tensors": list(shard.offsets)}
            for shard in (*plan.shards, *plan.codes, *([plan.router] if plan.router else []))
        ],
        "tensors": [
            {
                "name": job.output.name,
                "dtype": job.output.dtype,
                "shape": list(job.output.shape),
                "bytes": job.output.nbytes,
                "method": job.method,
                "scope": job.scope,
                "parameters": dict(job.parameters),
                "inputs": [
                    {
                        "model": given.model,
                        "tensor": given.spec.name,
                        "dtype": given.spec.dtype,
                        "bytes": given.spec.nbytes,
                        "read_bytes": given.read,
                    }
                    for given in job.inputs
                ],
                **_coded(job),
            }
            for job in plan.jobs
        ],
        "heads": {
            model: {"file": shard.file, "bytes": shard.nbytes, "tensors": list(shard.offsets)}
            for model, shard in plan.heads.items()
        },
        "vocabulary": plan.vocabulary.told() if plan.vocabulary else None,
        "rest": plan.rest or None,
        "fit": asdict(plan.fit) if plan.fit else None,
        "algebra": asdict(plan.algebra) if plan.algebra else None,
        **_dynamic(plan),
        "dropped": list(plan.dropped),
        "warnings": list(plan.warnings),
    }


def _part_rows(job: TensorJob) -> list[tuple[str, ...]]:
    """A dynamic tensor's stored parts, and who makes its anchor."""
    if job.code is None:
        return []
    says = f"{job.code.codec}, {job.code.slots} slots, gate {job.code.gate}"
    shapes = ["x".join(map(str, part.shape)) for part in job.parts]
    rows: list[tuple[str, ...]] = [
        ("  " + p.name, p.dtype, s, says, "", "", "")
        for p, s in zip(job.parts, shapes, strict=True)
    ]
    if job.anchor is None:
        return rows
    anchor = ("  anchor", "", "", job.anchor.method or "copy", job.anchor.scope)
    return [*rows, (*anchor, _inputs(job.anchor), _parameters(job.anchor))]


def _dynamic_totals(plan: Plan) -> str:
    """How many tensors are dynamic, and what the file of routers adds."""
    if plan.manifest is None:
        return ""
    word = "up to " if plan.undecided else ""
    files = f"{len(plan.codes)} file(s) of deltas" + (" and one of routers" if plan.router else "")
    return f" {word}{len(plan.manifest.codes)} dynamic, {files};"


def _coded(job: TensorJob) -> dict[str, Any]:
    """How a tensor is coded, as plain data; nothing for a static one."""
    if job.code is None:
        return {}
    anchor = job.anchor and {"method": job.anchor.method, "parameters": dict(job.anchor.parameters)}
    parts = [
        {"name": p.name, "dtype": p.dtype, "shape": list(p.shape), "bytes": p.nbytes}
        for p in job.parts
    ]
    code = {"codec": job.code.codec, "slots": job.code.slots, "gate": job.code.gate}
    return {"dynamic": {**code, "parts": parts, "anchor": anchor}}


def _dynamic(plan: Plan) -> dict[str, Any]:
    """The gates, routers and survey of a dynamic plan, as plain data."""
    if plan.manifest is None:
        return {}
    held = plan.manifest.to_json()
    said = {key: held[key] for key in ("method", "experts", "gates", "routers")}
    heads = [head.expert for head in plan.manifest.heads]
    return {
        "dynamic": {**said, "heads": heads, "undecided": plan.undecided, "survey": plan.surveyed}
    }


def _inputs(job: TensorJob) -> str:
    return ",".join(
        i.model if i.spec.name == job.output.name else f"{i.model}:{i.spec.name}"
        for i in job.inputs
    )


def _parameters(job: TensorJob) -> str:
    def short(value: Any) -> str:
        if isinstance(value, tuple):
            same = len(set(value)) == 1
            return short(value[0]) if same else "[" + ",".join(map(short, value)) + "]"
        return f"{value:g}" if isinstance(value, float) else str(value).lower()

    return " ".join(f"{name}={short(value)}" for name, value in job.parameters.items())


class Progress:
    """Lines, and a bar on a terminal; nothing where it was not wanted."""

    def __init__(self, hidden: bool, unit: str = "B") -> None:
        self._hidden, self._unit = hidden, unit
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def begin(self, plan: Plan) -> Advance:
        """Prints the plan's warnings and starts the bar; returns what moves it."""
        if not self._hidden:
            warn(plan.warnings)
        return self.start(plan.data_bytes)

    def start(self, total: int) -> Advance:
        """Starts the bar for that many units; returns what moves it."""
        if self._hidden:
            return lambda units: None
        bar = self._shown(total)
        return lambda units: bar.update(units) and None

    def steps(self, total: int) -> Callable[[int, float], None]:
        """Starts the bar for steps with a loss; without a terminal a line at each tenth."""
        if self._hidden:
            return lambda step, loss: None
        bar, tenth = self._shown(total), max(1, total // 10)

        def moved(step: int, loss: float) -> None:
            if bar.disable and (step % tenth == 0 or step == total):
                print(f"step {step} of {total}: loss {loss:.4g}", file=sys.stderr)
            bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            bar.update(step - bar.n)

        return moved

    def tell(self, line: str) -> None:
        """Prints a line about what goes on before bytes are written."""
        if not self._hidden:
            print(line, file=sys.stderr)

    def _shown(self, total: int) -> Any:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, unit=self._unit, unit_scale=self._unit == "B", disable=None,
            file=sys.stderr,
        )  # fmt: skip
        return self._bar

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def show_training(planned: dict[str, Any], *, as_json: bool) -> None:
    """What would train, on how many samples, for how long."""
    if as_json:
        print(json.dumps({"version": 1, **planned}))
        return
    rows = [("task", "expert", "router split", "samples", "select split", "samples")]
    for name, task in planned["tasks"].items():
        select = task["select"] or {"split": "-", "samples": 0}
        rows.append(
            (name, task["expert"], task["router"]["split"], str(task["router"]["samples"]),
             select["split"], str(select["samples"]))
        )  # fmt: skip
    print(table(rows))
    counts = [router["parameters"] for router in planned["routers"].values()]
    print(
        f"\n{_learners(planned)} with {planned['scales'] or sum(counts):,} parameters, objective"
        f" {planned['objective']}: {planned['steps']} steps of {planned['batch']} samples a task,"
        f" lr {planned['lr']:g} ({planned['schedule']}), seed {planned['seed']}"
    )


def _learners(told: Mapping[str, Any]) -> str:
    return "scales" if told["scales"] else f"{len(told['routers'])} router(s)"


def show_trained(result: Trained, *, as_json: bool, quiet: bool) -> None:
    """What the routers reached."""
    section = result.report
    if as_json:
        print(json.dumps({"version": 1, "path": str(result.path), **section}))
        return
    warn(section["notes"])
    if quiet:
        return
    figures = ", ".join(
        f"{name} {value:.4g}"
        for name, value in section["metrics"].items()
        if isinstance(value, float)
    )
    print(
        f"{result.path}: {_learners(section)} trained ({section['objective']}), step"
        f" {section['kept_step']} of {section['steps']} kept: {figures}"
    )
