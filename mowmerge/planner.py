"""Turns a recipe into a plan by reading headers only: everything is checked before a tensor is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mowmerge import __version__, algebra, devices, memory, slicing, vocabulary
from mowmerge.checkpoint import chat, fp8, layers, modules, naming, source
from mowmerge.checkpoint.layout import layout, shard_of
from mowmerge.checkpoint.placed import held_bytes
from mowmerge.checkpoint.reads import reads
from mowmerge.errors import CheckpointError, Problem, RecipeError
from mowmerge.methods import registry
from mowmerge.methods.contracts import Extent, MethodError
from mowmerge.plan import (
    RUN,
    Input,
    Packing,
    Plan,
    Shard,
    Source,
    TensorJob,
    Tied,
    config_source,
)
from mowmerge.recipe import coefficients
from mowmerge.recipe.model import Match, Recipe
from mowmerge.recipe.values import Place, Setting, setting
from mowmerge.slicing import Piece
from mowmerge.sources import Search
from mowmerge.tensors import TensorSpec, dtype_named
from mowmerge.upcycle import Upcycling

BLOCK = 4 * RUN  # elements worked on at a time: with shorter blocks workers wait for each other
LISTED = 5  # names in a message before it says how many more


@dataclass(frozen=True)
class Options:
    """What the caller decides about a run, beside the recipe."""

    workers: int | None = None
    max_memory: int | None = None
    device: str = "cpu"
    stats: bool = True
    download: bool = True
    allow_pickle: bool = False
    surveyed: Mapping[str, Any] | None = None


def build(recipe: Recipe, options: Options | None = None) -> Plan:
    """The plan of a recipe: names, shapes, dtypes, offsets, methods, memory and warnings.

    Raises RecipeError, CheckpointError, SourceError or ResourceError, with every problem found.
    """
    return _Planner(recipe, options or Options()).plan()


class _Planner:
    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe, self.options = recipe, options
        self._metadata = {"format": "pt", "mowmerge": __version__}
        self.problems: list[Problem] = []
        self.warnings = [str(each) for each in recipe.ignored]
        self.tied: list[Tied] = []
        self.dropped: list[str] = []
        self.rules_used: set[int] = set()
        self.upcycling: Upcycling | None = None
        self.sources: Mapping[str, Source] = {}
        self.reads: Mapping[str, Mapping[str, int]] = {}
        self.packings: Mapping[str, Packing] = {}

    def plan(self) -> Plan:
        search = Search(self.recipe, self.options.download, self.options.allow_pickle, self._nested)
        base = "base" if self.recipe.base is not None else None
        donor = base or next(iter(self.recipe.models))
        read = search.sources()
        sources, tokens, told = vocabulary.placed(self.recipe, read, donor, search.tokenizer())
        self.sources, self.warnings = sources, [*self.warnings, *search.warnings, *told]
        self.reads = {name: reads(each) for name, each in sources.items()}
        where = self.recipe.where("output", "chat_template")
        asked = self.recipe.output.chat_template
        template = chat.chosen(asked, sources, where)
        if asked and template is None:
            self.warnings.append(f"{where}: no model has a chat template, nor has the output")
        specs, heads = self._bodies(donor, {name: s.specs for name, s in sources.items()})
        if registry.get(self.recipe.method).dynamic:
            folder, found = config_source(sources[donor]).folder, self.options.surveyed
            named, types = search.encoder(Path(folder)), modules.model_types(source.config(folder))
            self.upcycling = Upcycling(self.recipe, specs[donor], found, named, types)
        cut = slicing.cut(self.recipe, donor, specs)
        self.problems += cut.problems
        if self.recipe.output.dtype == "fp8":
            held = config_source(sources[donor])
            self.packings = fp8.packings(cut.specs, held, source.config(held.folder))
        jobs = self._jobs(base, cut.pieces)
        told, permuted = vocabulary.compared(self.recipe, sources, donor, jobs, tokens)
        self.warnings, self.problems = [*self.warnings, *told], [*self.problems, *permuted]
        self.problems += algebra.faults(self.recipe, jobs, sources)
        self._raise_problems()
        config, told = layers.following(donor, cut.stacks, sources)
        self.warnings += told
        jobs = self._grouped(jobs)
        limit = self.options.max_memory
        jobs, fit = coefficients.settled(self.recipe, jobs, limit)
        work = algebra.algebra(jobs)
        self._warn()
        self.warnings += algebra.cautions(jobs, work)
        parsed = tokens.parsed if tokens else 0
        places = devices.named(self.options.device)
        room = memory.room(jobs, places, self.options.workers, BLOCK, limit, parsed)
        plan = Plan(
            name=self.recipe.name,
            donor=donor,
            base=base,
            sources=sources,
            jobs=tuple(jobs),
            shards=tuple(self._layout(jobs)),
            **vars(room),
            stats=self.options.stats,
            tied=tuple(self.tied),
            heads=heads,
            surveyed=self.options.surveyed,
            dropped=tuple(self.dropped),
            config=config,
            chat_template=template,
            fit=fit,
            algebra=work,
            vocabulary=tokens,
            warnings=tuple(self.warnings),
        )
        if not self.upcycling:
            return plan

        def config_of(model: str) -> Mapping[str, Any]:
            origin = sources[model]
            return {} if isinstance(origin, Plan) else source.config(config_source(origin).folder)

        return self.upcycling.finish(plan, config_of, self._metadata)

    def _nested(self, name: str, recipe: Recipe) -> Plan:
        """The plan of a nested recipe."""
        inner = build(recipe, replace(self.options, stats=False, workers=1))
        self.warnings += [f"{name}: {warning}" for warning in inner.warnings]
        if inner.fit:
            raise RecipeError(
                f"the nested recipe '{name}' is to be fitted, which is for a merge to do",
                where=self.recipe.where("models", name),
                hint="merge it first, or give it `coefficients:`",
            )
        if inner.heads:
            self.warnings.append(f"{name}: the heads its recipe keeps are not taken along")
        return inner

    def _bodies(
        self, donor: str, stored: Mapping[str, Mapping[str, TensorSpec]]
    ) -> tuple[Mapping[str, Mapping[str, TensorSpec]], Mapping[str, Shard]]:
        """Each model's tensors under the donor's names, without heads; the heads that are kept."""
        bodies, heads, apart = {}, {}, dict[tuple[str, str], list[str]]()
        for model, held in stored.items():
            view = naming.aligned(held, stored[donor]) if model != donor else held
            if names := naming.apart(view):
                apart.setdefault(names, []).append(f"'{model}'")
            head = {name for name, spec in view.items() if self._in_head(name, spec.name)}
            bodies[model] = {name: spec for name, spec in view.items() if name not in head}
            if head and model in self.recipe.models:
                kept = [view[name] for name in view if name in head]
                heads[model] = shard_of(f"heads/{model}.safetensors", kept, self._metadata)
            elif head:
                self.warnings.append(f"the {model}'s own head is left out: {', '.join(head)}")
            elif self.recipe.heads and model in self.recipe.models:
                self.warnings.append(f"model '{model}' has no tensor that `heads` matches")
        self.warnings += [
            f"the names of {', '.join(models)} differ by a prefix ('{theirs}'), and are matched as"
            f" those of the {donor} ('{ours}')"
            for (theirs, ours), models in apart.items()
        ]
        if self.recipe.heads and not heads:
            raise RecipeError(
                f"no model has a tensor that matches {', '.join(self.recipe.heads.match)}",
                where=self.recipe.where("heads", "match"),
                hint="`mowmerge merge RECIPE --dry-run` without `heads` lists the names",
            )
        return bodies, heads

    def _in_head(self, *names: str) -> bool:
        """Whether a tensor, under its own name or the donor's, belongs to a head."""
        heads = self.recipe.heads
        return heads is not None and any(Match(tensors=heads.match).names(n) for n in names)

    def _jobs(self, base: str | None, pieces: Sequence[Piece]) -> list[TensorJob]:
        jobs = []
        for piece in pieces:
            for name, place in piece.places.items():
                chosen = setting(self.recipe, place)
                if chosen.rule is not None:
                    self.rules_used.add(chosen.rule)
                if chosen.drop:
                    self.dropped.append(name)
                elif absent := slicing.absent(self.recipe, piece, name, chosen):
                    self.problems.append(absent)
                elif job := self._job(name, chosen, place, base, piece):
                    jobs.append(job)
            self._extras(piece)
        if not jobs and not self.problems:
            raise RecipeError("nothing is left to write: every tensor is dropped")
        return jobs

    def _job(
        self, name: str, chosen: Setting, place: Place, base: str | None, piece: Piece
    ) -> TensorJob | None:
        """The tensor's job: static, or with a code where the method is dynamic."""
        method, upcycling = registry.get(chosen.method), self.upcycling
        if method.dynamic is None or upcycling is None:
            return self._static(name, chosen, base, piece)
        code = upcycling.code(self._output(piece.specs[piece.like][name]), chosen.parameters)
        rest = replace(upcycling.rest(place, chosen.parameters), models=chosen.models)
        static = self._static(name, rest, base, piece)
        if code is None or static is None or {i.model for i in static.models} == {"base"}:
            return static
        coded = self._static(name, chosen, base, piece)
        anchor = static if "anchor" in method.inputs else None
        return upcycling.coded(coded, code, anchor) if coded else None

    def _output(self, spec: TensorSpec) -> TensorSpec:
        """The tensor as it is stored."""
        output = self.recipe.output
        dtype = "float32" if output.format == "adapter" else output.dtype
        if dtype == "fp8":
            dtype = "float32" if spec.name in self.packings else None
        if dtype and spec.kind == "float":
            return replace(spec, dtype=dtype_named(dtype).code)
        return spec

    def _static(
        self, name: str, chosen: Setting, base: str | None, piece: Piece
    ) -> TensorJob | None:
        method = registry.get(chosen.method)
        spec = piece.specs[piece.like][name]
        spec = spec if spec.name == name else replace(spec, name=name)
        models = [self._input(model, spec, base, piece) for model in chosen.models]
        inputs = [given for given in models if given is not None]
        if len(inputs) < len(models):
            return None
        numeric, role = spec.kind == "float", naming.role(spec.name)
        scope, matrix = method.sees(spec.shape, role, chosen.parameters)
        asked = method.wants_base or not numeric
        measured = self.options.stats and not self.recipe.slices
        below = self._input("base", spec, base, piece) if base and (asked or measured) else None
        if base and method.needs_base and below is None:
            return None
        return TensorJob(
            output=self._output(spec),
            models=tuple(inputs),
            base=below,
            method=method.name if numeric else None,
            parameters=chosen.parameters if numeric else {},
            scope=scope if numeric else "element",
            matrix=matrix and numeric,
            packing=self.packings.get(spec.name),
        )

    def _input(self, model: str, spec: TensorSpec, base: str | None, piece: Piece) -> Input | None:
        """The model's tensor of that name, or its tie; a problem where that does not fit."""
        held = piece.specs.get(model, {})
        found = held.get(spec.name) or vocabulary.tied(self.sources[model], spec.name, held)
        if found is None:
            given = piece.specs.get("base", {}).get(spec.name) if base else None
            if self.recipe.missing == "base" and given:
                return self._given("base", given)
            self.problems.append(
                Problem(
                    f"tensor '{spec.name}' is missing",
                    f"model '{model}'",
                    "set `missing: base` to take the base's, or drop it with a rule: "
                    f"- {{match: {{tensors: '{spec.name}'}}, drop: true}}",
                )
            )
            return None
        for what, theirs, ours in (
            ("shape", list(found.shape), list(spec.shape)),
            ("kind of dtype", found.kind, spec.kind),
        ):
            if theirs != ours:
                self.problems.append(
                    Problem(
                        f"tensor '{spec.name}' has the {what} {theirs}, but {ours} in the"
                        f" {'base' if piece.like == 'base' else 'first model'}",
                        f"model '{model}'",
                        naming.why_apart(spec, found),
                    )
                )
                return None
        return self._given(model, found)

    def _given(self, model: str, spec: TensorSpec) -> Input:
        read = self.reads[model][spec.name]
        return Input(model, spec, read, held_bytes(self.sources[model], spec.name))

    def _extras(self, piece: Piece) -> None:
        """Tensors that only other models have: tied, dropped by a rule, or a problem."""
        like, donor = piece.specs[piece.like], "base" if piece.like == "base" else "first model"
        for model in piece.taking:
            held = piece.specs[model]
            for name, spec in held.items():
                if name in like:
                    continue
                tied = naming.tied_to(name, held)
                alike = tied is not None and replace(tied, name=spec.name) == spec
                if tied and alike and naming.tied_to(name, like):
                    self.tied.append(Tied(model, spec, tied))
                    self.warnings.append(
                        f"model '{model}' stores '{name}', which the {donor} ties to '{tied.name}':"
                        " it has to equal that, and is not written"
                    )
                    continue
                rule = self._dropping(name)
                if rule is not None:
                    self.rules_used.add(rule)
                    self.dropped.append(name)
                    continue
                self.problems.append(
                    Problem(
                        f"tensor '{name}' is in no other model, nor in the {donor}",
                        f"model '{model}'",
                        f"drop it with a rule: - {{match: {{tensors: '{name}'}}, drop: true}}",
                    )
                )

    def _dropping(self, name: str) -> int | None:
        stack = naming.stack(name)
        place = Place(name, naming.role(name), stack[1] if stack else None, 0.0)
        chosen = setting(self.recipe, place)
        return chosen.rule if chosen.drop else None

    def _raise_problems(self) -> None:
        if not self.problems:
            return
        shown = self.problems[: 4 * LISTED]
        more = len(self.problems) - len(shown)
        if more:
            shown.append(Problem(f"... and {more} more problems of this kind"))
        raise CheckpointError(shown)

    def _grouped(self, jobs: Sequence[TensorJob]) -> list[TensorJob]:
        """Checks each method with its parameters, and joins the jobs that share a statistic."""
        checked: set[tuple[Any, ...]] = set()
        groups: dict[tuple[Any, ...], int] = {}

        def joined(job: TensorJob) -> TensorJob:
            if job.anchor is not None:
                job = replace(job, anchor=joined(job.anchor))
            if job.method is None:
                return job
            method, models = registry.get(job.method), tuple(i.model for i in job.models)
            key = (job.method, tuple(job.parameters.items()), len(models))
            if key not in checked:
                checked.add(key)
                try:
                    method.check(job.parameters, len(models))
                except MethodError as error:
                    raise RecipeError(
                        f"tensor '{job.output.name}': {error}", where=self.recipe.where("method")
                    ) from error
            if job.scope == "model":
                group = groups.setdefault((job.method, models), len(groups))
                job = replace(job, group=group)
            return job

        grouped = [joined(job) for job in jobs]
        each = [one for job in grouped for one in (job, job.anchor) if one is not None]
        for (method_name, _), number in groups.items():
            extents = [Extent(j.output.shape, j.parameters) for j in each if j.group == number]
            reduce = registry.get(method_name).reduce
            try:
                if reduce is not None:
                    next(reduce(extents), None)
            except MethodError as error:
                raise RecipeError(
                    f"{method_name}: {error}", where=self.recipe.where("method")
                ) from error
        return grouped

    def _warn(self) -> None:
        for i, rule in enumerate(self.recipe.rules):
            if i not in self.rules_used and not (rule.drop and rule.match == Match()):
                where = self.recipe.where("rules", i)
                self.warnings.append(f"{where}: this rule matches no tensor")

    def _layout(self, jobs: Sequence[TensorJob]) -> list[Shard]:
        stored = [spec for job in jobs for spec in job.stored]
        return layout(stored, self.recipe.output.shard_size, self._metadata)
