"""The checkpoints that are scored, and a model as the types of task see it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.source import config, find
from mowmerge.errors import CheckpointError, RecipeError
from mowmerge.evals.job import Job, Place, Tools
from mowmerge.evals.places import found_at, where_of
from mowmerge.evals.towers import towers
from mowmerge.plan import Adapted, config_source
from mowmerge.recipe.model import Match, Recipe
from mowmerge.tasks import heads, inputs
from mowmerge.tasks.adapters import Where, home
from mowmerge.tensors import Tensor, torch

PICTURES = ("preprocessor_config.json", "processor_config.json")
TEXTS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Entry:
    """A checkpoint: the row it belongs to, its source as the recipe has it, and its tasks.

    experts: of each task the expert, where it has one. keeping: of a task where its head is, if
    not in the checkpoint: a folder with heads/, or an expert. expert: its name, if it is one.
    crossed: whether the tasks are those of others. match: the names of heads' tensors, where the
    checkpoint has a head of its own, which is not the tasks'.
    adapted: the checkpoint in `folder` with adapters on it, where it is one.
    """

    row: str
    source: str
    folder: Path
    revision: str
    tasks: tuple[str, ...]
    experts: Mapping[str, str | None]
    keeping: Mapping[str, Where] = field(default_factory=dict)
    expert: str = ""
    crossed: bool = False
    match: tuple[str, ...] = ()
    adapted: Adapted | None = None

    @property
    def where(self) -> Where:
        """What is loaded."""
        return self.adapted or self.folder

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Its config.json."""
        return config(self.folder)

    @property
    def dynamic(self) -> bool:
        """Whether it is a dynamic checkpoint."""
        return self.config.get("model_type") == "mowmerge"

    @cached_property
    def manifest(self) -> Any:
        """What a dynamic checkpoint says of itself."""
        from mowmerge.checkpoint.dynamic import held

        return held(self.folder).manifest

    def head(self, task: str) -> Where | None:
        """Where a task's head is stored, None where it is in the weights."""
        return self.keeping.get(task, self.folder if (self.folder / "heads").is_dir() else None)

    def ways(self, family: str) -> list[str]:
        """How it can be run: as it is, told whose head is meant, told whose weights are."""
        if not self.dynamic:
            return [""]
        scopes = {gate.scope for gate in self.manifest.gates.values()}
        found = ["oracle"]
        chosen = family == "head" and bool(self.manifest.heads)
        if chosen and scopes != {"task"}:
            found.insert(0, "task given")
        if scopes != {"task"} and ("sample" in scopes or not chosen):
            found.insert(0, "")  # the gates of blocks and modules say nothing of heads
        return found

    def label_map(self, task: str) -> Mapping[str, int]:
        """The label map of the head that answers for a task, from its config."""
        expert = self.experts[task]
        if self.dynamic:
            named = self.manifest.heads
            if named and expert is None:
                raise CheckpointError(
                    f"task '{task}' has no expert, and so no head here", where=str(self.folder)
                )
            settings = named[self.manifest.experts.index(expert)].config if named else None
            settings = settings or self.config.get("base_config") or {}
        elif expert is not None and (kept := self.head(task)):
            beside = home(kept) / "heads" / f"{expert}.json"
            whole = not beside.exists()
            settings = config(home(kept)) if whole else json.loads(beside.read_text("utf-8"))
        else:
            settings = self.config
        if "label2id" in settings:
            return {str(name): int(number) for name, number in settings["label2id"].items()}
        return {f"LABEL_{i}": i for i in range(int(settings.get("num_labels", 2)))}


def entries(
    merged: Mapping[str, Path], recipe: Recipe, jobs: Sequence[Job], against: Sequence[str]
) -> list[Entry]:
    """Every checkpoint to score: what is merged, the base, the experts of the tasks, and others.

    Raises:
        RecipeError: a base that is not named, a model that is itself a recipe, a row named twice.
        SourceError: what is not there any more.
    """
    tasks = tuple(job.name for job in jobs)
    experts = {job.name: job.asked.expert for job in jobs}
    found = []
    paths = [word for word in against if word not in ("base", "experts")]
    others = {Path(path).resolve().name: Path(path) for path in paths}
    if twice := [name for name in others if name in {*merged, "base", "expert"}] or (
        ["two of them"] if len(others) != len(paths) else []
    ):
        raise RecipeError(
            f"two of the models to score are called '{twice[0]}'", where="--against",
            hint="a folder's own name is its row's: rename one",
        )  # fmt: skip
    for row, path in {**merged, **others}.items():
        folder = Path(find(str(path)).folder)
        found.append(Entry(row, str(path), folder, "", tasks, experts))
    if "base" in against:
        if recipe.base is None:
            raise RecipeError("--against base, and the recipe names no base", where=recipe.file)
        stored = config_source(found_at(recipe, None, ""))
        match = recipe.heads.match if recipe.heads else ()
        headed = bool(match) and any(map(Match(tensors=match).names, stored.specs))
        kept = next((e.folder for e in found if not e.dynamic and e.head("")), None)
        kept = None if headed else kept
        keeping = {
            job.name: kept or where_of(found_at(recipe, job.asked.expert, job.name))
            for job in jobs
            if job.kind.FAMILY == "head" and job.asked.expert
        }
        base = Entry(
            "base", str(recipe.base), Path(stored.folder), stored.revision or "", tasks, experts,
            keeping, match=match if headed else (),
        )  # fmt: skip
        found.append(base)
    if "experts" in against:
        for expert in dict.fromkeys(e for e in experts.values() if e is not None):
            own = tuple(task for task in tasks if experts[task] == expert)
            origin, ref = found_at(recipe, expert, own[0]), recipe.models[expert]
            stored = config_source(origin)
            source = " + ".join([str(ref.source), *(each.source for each in ref.adapter)])
            folder, revision = Path(stored.folder), stored.revision or ""
            found.append(
                Entry(
                    "expert", source, folder, revision, own, dict.fromkeys(own), expert=expert,
                    adapted=origin if isinstance(origin, Adapted) else None,
                )
            )  # fmt: skip
    return found


@dataclass(eq=False)
class Loaded:
    """A model in memory, as the types of task run it: every call says whose rows it is given.

    truths: what is true of each task's items, in this model's numbers. widths: classes of each
    task. experts: the number of each task's expert, in a dynamic model. told: of each item of the
    batch the gates' coefficients, summed over its rows, with the rows' count, and where a router
    chose an expert, which. prompts: what embeds texts, where that is dynamic too.
    """

    entry: Entry
    model: Any
    tools: Tools
    truths: Mapping[str, Sequence[Any]]
    widths: Mapping[str, int]
    experts: Mapping[str, int | None]
    numbers: Mapping[str, int] = field(default_factory=dict)
    context: Any = None
    clip: Any = None
    prompts: Any = None
    text_tokenizer: Any = None
    gates: dict[int, Tensor] = field(default_factory=dict)
    routed: dict[int, int] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where it comes from."""
        return self.entry.folder

    @property
    def device(self) -> Any:
        """Where inputs go."""
        return self.model.device

    @property
    def pad(self) -> int:
        """A token for places that do not count."""
        found = self.tools.processor.pad_token_id
        return int(found if found is not None else min(self.ends, default=0))

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        told = getattr(self.model.generation_config, "eos_token_id", None)
        ends = told if isinstance(told, list) else [told]
        return frozenset(e for e in (*ends, self.tools.processor.eos_token_id) if e is not None)

    def __call__(self, way: str, places: Sequence[Place], rows: Sequence[int], **given: Any) -> Any:
        """The model's output on rows of inputs; `rows` says which item of the batch each is of."""
        told = self.told(way, [places[row] for row in rows])
        given = {name: value.to(self.device) for name, value in given.items()}
        out = self.model(**given, **told)
        self._note(way, rows, out.get("gates"), out.get("task"))
        return out

    def generate(
        self, way: str, places: Sequence[Place], *, stops: Sequence[str], max_new_tokens: int,
        **given: Tensor,
    ) -> Tensor:  # fmt: skip
        """The tokens of greedy answers [B,T]."""
        told = self.told(way, places)
        given = {name: value.to(self.device) for name, value in given.items()}
        first = 1 if self.model.config.is_encoder_decoder else given["input_ids"].shape[1]
        if stops:
            told["stopping_criteria"] = [self._stopping(stops, first)]
        ends = sorted(self.ends) or None
        made = self.model.generate(
            **given, **told, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
            pad_token_id=self.pad, eos_token_id=ends,
        )  # fmt: skip
        if self.entry.dynamic:
            routed = self.entry.manifest.routed
            gates = self.model._context.every(routed) if routed else None
            self._note(way, range(len(places)), gates, None)
        found: Tensor = made[:, first:].cpu()
        return found

    def _stopping(self, stops: Sequence[str], first: int) -> Any:
        """Says of each answer whether one of the texts is at its end."""
        tail = max(map(len, stops)) + 8  # tokens, of at least a letter each

        def stopped(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            with self.tools.lock:
                texts = self.tools.processor.batch_decode(ids[:, first:][:, -tail:].tolist())
            found = [any(stop in text for stop in stops) for text in texts]
            return torch.tensor(found, device=ids.device)

        return stopped

    def told(self, way: str, rows: Sequence[Place]) -> dict[str, Any]:
        """What the model is told of the rows' tasks."""
        if self.context is not None:
            self.context.heads = torch.tensor([self.numbers[p.job.name] for p in rows])
        if way not in ("oracle", "task given"):
            return {}
        numbers = [self.experts[p.job.name] or 0 for p in rows]  # held out: nobody asks
        ids = torch.tensor(numbers, device=self.device)
        return {"task_ids" if way == "oracle" else "head_ids": ids}

    def _note(self, way: str, rows: Sequence[int], gates: Any, chosen: Any) -> None:
        """Keeps what the router said of each item; an item of several rows has their mean."""
        if gates is None or way == "oracle":
            return
        counts: dict[int, int] = {}
        gates = gates.float().cpu()
        for row, each in zip(rows, gates, strict=True):
            counts[row] = counts.get(row, 0) + 1
            self.gates[row] = each if counts[row] == 1 else self.gates[row] + each
        for row, n in counts.items():
            self.gates[row] = self.gates[row] / n
            self.routed[row] = self._choice(self.gates[row])
        if chosen is not None and way == "":
            self.routed |= dict(zip(rows, chosen.tolist(), strict=True))

    def _choice(self, gates: Tensor) -> int:
        """The expert with the most weight over all gates."""
        manifest = self.entry.manifest
        n = len(manifest.experts)
        each = torch.split(gates, [manifest.slots(g) for g in manifest.routed])
        return int(torch.stack([c.view(n, -1).sum(1) for c in each]).sum(0).argmax())


def processor_folder(entry: Entry, kind: str, recipe: Recipe) -> Path:
    """Where the image processor or tokenizer is: the checkpoint, or else a task's expert."""
    names = PICTURES if kind.endswith("image-classification") else TEXTS
    expert = next((e for e in entry.experts.values() if e), None)
    if expert is None or any((entry.folder / name).exists() for name in names):
        return entry.folder
    return home(where_of(found_at(recipe, expert, entry.tasks[0])))


def load(
    entry: Entry, family: str, jobs: Sequence[Job], recipe: Recipe, dtype: str | None,
    device: str | None,
) -> list[Loaded]:  # fmt: skip
    """The models that answer for these tasks: one, or where heads cannot be joined one a task.

    `device` is where they go; "auto" spreads them over what there is.
    """
    spread = "auto" if device == "auto" else None
    more: dict[str, Any] = {"dtype": dtype, "device_map": spread}
    made = _headed(entry, jobs, more) if family == "head" else None
    groups = [list(jobs)] if made is None or len(made) == 1 else [[job] for job in jobs]
    if made is None:
        made = [(heads.load(entry.where, None, **more), None)]
    found = []
    for (model, context), some in zip(made, groups, strict=True):
        if not spread:
            model = model.to(device)
        if family == "lm" and model.get_output_embeddings() is None:
            raise CheckpointError(
                f"{type(model).__name__} has no language head, which task '{some[0].name}' needs",
                where=str(entry.folder),
            )
        kind = some[0].asked.type
        tools = Tools(inputs.processor(processor_folder(entry, kind, recipe), kind), model.config)
        numbers = {job.name: i for i, job in enumerate(some)} if context else {}
        experts: dict[str, int | None] = {}
        if entry.dynamic:
            known = entry.manifest.experts
            asked = {job.name: entry.experts[job.name] for job in some}
            experts = {t: known.index(e) if e in known else None for t, e in asked.items()}
        maps = {j.name: entry.label_map(j.name) if family == "head" else {} for j in some}
        truths = {job.name: job.kind.truths(job, maps[job.name]) for job in some}
        widths = {name: len(known) for name, known in maps.items()}
        loaded = Loaded(entry, model, tools, truths, widths, experts, numbers, context)
        if family == "clip":
            _clip(loaded, some, recipe, more)
        found.append(loaded)
    return found


def _headed(
    entry: Entry, jobs: Sequence[Job], more: Mapping[str, Any]
) -> list[tuple[Any, Any]] | None:
    """Models with the heads of these tasks; None where the checkpoint has its own in it."""
    if entry.dynamic or not any(entry.head(job.name) for job in jobs):
        return None
    trunk = heads.load(entry.where, None, **more) if entry.crossed or entry.match else None

    def one(job: Job) -> Any:
        keeping = entry.keeping.get(job.name)
        if trunk is not None and keeping is not None:
            return heads.grafted(trunk, heads.load(keeping, None, **more), entry.match)
        return heads.load(entry.where, job.name, entry.experts[job.name], keeping=keeping, **more)

    if len(jobs) > 1 and (both := heads.joined(one(job) for job in jobs)):
        return [both]
    return [(one(job), None) for job in jobs]


def clip_folder(named: str, recipe: Recipe) -> Path:
    """Where the CLIP model is that an option names."""
    return Path(find(recipe.locate(named)).folder)


def _clip(loaded: Loaded, jobs: Sequence[Job], recipe: Recipe, more: Mapping[str, Any]) -> None:
    """The whole CLIP model whose text tower and projections serve, and its tokenizer."""
    import transformers

    named, model = jobs[0].asked.options.clip, loaded.model
    if named is None and not hasattr(model, "text_model"):
        raise RecipeError(
            f"task '{jobs[0].name}' needs a text tower, and {type(model).__name__} has none",
            where=recipe.where("tasks", jobs[0].name),
            hint="name the CLIP model that has it: options: {clip: ...}",
        )
    if hasattr(model, "text_model"):
        loaded.model, loaded.clip, folder = model.vision_model, model, loaded.folder
        if loaded.entry.dynamic:
            loaded.model, loaded.prompts = towers(model, str(loaded.folder))
    else:
        folder = clip_folder(str(named), recipe)
        loaded.clip = heads.load(folder, None, **more).to(loaded.device)
    loaded.text_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    loaded.widths = {job.name: len(job.kind.classes(job)) for job in jobs}
