"""Anything in lm-evaluation-harness by name, through its Python API around the model as loaded.

A task's metric is the harness's, such as acc or exact_match,strict-match; the task's first if none
is named. The others are among the extras. The harness pads what it scores without a mask, and a
router would see the padding: dynamic decoders are asked through `_masked`, which gives one, so that
each request's gates are those that it has alone. Dynamic encoder-decoders are asked one request at
a time: the harness pads what the decoder reads, and says nowhere how far.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from math import fsum, isclose
from typing import Any

from mowmerge.errors import RecipeError, SourceError, did_you_mean
from mowmerge.evals.job import Answer, Job, Place, Scored, Tools
from mowmerge.evals.models import Loaded
from mowmerge.evals.tokens import padded, parts
from mowmerge.recipe.model import Recipe
from mowmerge.recipe.task import Asking
from mowmerge.tensors import torch

FAMILY = "lm"
WHOLE = True
BATCH = 16  # requests a forward pass
NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True)
class Harness:
    """A task of the harness: one item to the evaluator, to the report as many as its documents."""

    task: str
    name: str
    asked: Asking
    limit: int | None
    where: str
    manager: Any
    split: str = "the harness's own"
    columns: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return 1

    def _tasks(self) -> list[Any]:
        """The tasks that it stands for: itself, or those of a group."""
        return list(self.manager.load([self.name])["tasks"].values())

    @cached_property
    def template(self) -> str:
        """How each subtask asks, as JSON."""
        with _silent():
            asked = [task.dump_config() for task in self._tasks()]
        return json.dumps(asked, sort_keys=True, default=str)

    @cached_property
    def digests(self) -> Sequence[str]:
        """The digest of each document, of all its subtasks."""
        with _silent():
            tasks = self._tasks()
        return [
            sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()
            for task in tasks
            for _, doc in zip(range(self.limit or len(task.eval_docs)), task.eval_docs)  # noqa: B905
        ]


def load(recipe: Recipe, task: str) -> Harness:
    """The harness's task; its data is loaded.

    Raises:
        RecipeError: no task of that name.
        SourceError: lm-eval is not installed, or the data cannot be had.
    """
    asked = recipe.tasks[task]
    name, where = asked.options.name or task, recipe.where("tasks", task)
    if not find_spec("lm_eval"):
        raise SourceError(
            "the type lm-eval needs lm-evaluation-harness, which is not installed", where=where,
            hint='pip install "mowmerge[lm-eval]"',
        )  # fmt: skip
    from lm_eval.tasks import TaskManager

    folder = recipe.locate(asked.options.include) if asked.options.include else None
    with _silent():
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if name not in manager.all_tasks:
        raise RecipeError(
            f"lm-eval has no task '{name}'" + (f" in {folder}" if folder else ""), where=where,
            hint=did_you_mean(name, list(manager.all_tasks)),
        )  # fmt: skip
    found = Harness(task, name, asked.options, asked.limit, where, manager)
    try:
        empty = not found.digests
    except Exception as error:  # the types of datasets, of YAML and of the task's own code
        raise SourceError(
            f"lm-eval's task '{name}' does not load: {str(error).strip() or repr(error)}",
            where=where,
            hint="its data comes from the Hub or its cache unless the task says another place",
        ) from error
    if empty:
        raise RecipeError(f"lm-eval's task '{name}' has no documents", where=where)
    return found


def truths(job: Job, classes: Mapping[str, int]) -> Sequence[Any]:
    """Nothing: the harness knows."""
    return ()


def encode(tools: Tools, places: Sequence[Place]) -> None:
    """Nothing: the harness does."""


def answer(loaded: Loaded, way: str, places: Sequence[Place], given: None) -> list[Answer]:
    """What the harness says of each task."""
    return [_ask(loaded, way, place) for place in places]


def _ask(loaded: Loaded, way: str, place: Place) -> Answer:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness: Harness = place.job.items
    backend = "seq2seq" if loaded.model.config.is_encoder_decoder else "causal"
    dynamic = loaded.entry.dynamic
    size = 1 if dynamic and backend == "seq2seq" else BATCH
    with _silent(), _forced(loaded, way, place):
        model = (_masked(loaded.pad) if dynamic and backend == "causal" else HFLM)(
            pretrained=loaded.model, backend=backend, tokenizer=loaded.tools.processor,
            batch_size=size,
        )  # fmt: skip
        found = simple_evaluate(
            model=model, tasks=[harness.name], task_manager=harness.manager, bootstrap_iters=0,
            num_fewshot=harness.asked.few_shot, limit=harness.limit, log_samples=True,
        )  # fmt: skip
    assert found is not None
    figures = found["results"].get(harness.name) or found["groups"][harness.name]
    values = {
        name: float(value)
        for name, value in figures.items()
        if name.partition(",")[0] not in NOT_METRICS
        and "_stderr" not in name
        and isinstance(value, int | float)
    }
    metric = _metric(place.job, list(values))
    items = _items(found.get("samples", {}).get(harness.name, ()), metric)
    mean = fsum(items) / len(items) if items else None
    kept = items if mean is not None and isclose(mean, values[metric], abs_tol=1e-9) else []
    return {"metric": metric, "values": values, "items": kept}


def _masked(pad: int) -> Any:
    """The harness's model with a mask of what counts among the tokens that it scores; what it
    generates from has one of its own."""
    from lm_eval.models.huggingface import HFLM

    class Masked(HFLM):  # type: ignore[misc]
        """Sums of log p(continuation | context), and whether each is the greedy one."""

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: Any = None
        ) -> list[tuple[float, bool]]:
            wholes = [(before + after)[-(self.max_length + 1) :] for _, before, after in requests]
            order = sorted(range(len(wholes)), key=lambda i: -len(wholes[i]))  # of like length
            found: dict[int, tuple[float, bool]] = {}
            for some in parts(order, BATCH):
                ids, mask = padded([wholes[i][:-1] for i in some], pad)
                given = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
                with torch.no_grad():
                    logits = self.model(**given).logits
                for i, each in zip(some, logits, strict=True):
                    last, n = len(wholes[i]) - 1, len(requests[i][2])
                    logp = torch.log_softmax(each[last - n : last], -1, dtype=self.softmax_dtype)
                    at = torch.tensor(wholes[i][-n:], device=logp.device)
                    greedy = bool((logp.argmax(-1) == at).all())
                    found[i] = float(logp.gather(-1, at[:, None]).sum()), greedy
            return [found[i] for i in range(len(wholes))]

    return Masked


def _metric(job: Job, known: Sequence[str]) -> str:
    """The harness's name for the metric that was asked for: with its filter."""
    named = [name for name in known if job.metric in ("", name, name.partition(",")[0])]
    if not named:
        raise RecipeError(
            f"lm-eval's task '{job.items.name}' has no metric '{job.metric}'",
            where=job.items.where, hint=did_you_mean(job.metric, known),
        )  # fmt: skip
    return named[0]


def _items(samples: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """Each document's part in a metric, by number; none where it is not a number."""
    name, _, chosen = metric.partition(",")
    own = sorted((s for s in samples if s.get("filter") == chosen), key=lambda s: int(s["doc_id"]))
    values = [sample.get(name) for sample in own]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return numbers if len(numbers) == len(values) else []


@contextmanager
def _forced(loaded: Loaded, way: str, place: Place) -> Iterator[None]:
    """Tells a dynamic model the task's expert at each pass, where that is the way."""
    if way != "oracle":
        yield
        return

    def tell(module: Any, args: Any, named: dict[str, Any]) -> Any:
        first = args[0] if args else named["input_ids"]
        ids = torch.full((len(first),), loaded.experts[place.job.name] or 0, device=first.device)
        return args, named | {"task_ids": ids}

    hook = loaded.model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _silent() -> Iterator[None]:
    """Without the harness's log lines and bars, nor what the git that it calls says."""
    log, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), _mute(2):
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _mute(stream: int) -> Iterator[None]:
    """Nothing that a child process writes there is seen."""
    kept = os.dup(stream)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream)
            yield
    finally:
        os.dup2(kept, stream)
        os.close(kept)


def score(job: Job, true: Sequence[Any], answers: Sequence[Answer]) -> Scored:
    """The harness's own figure."""
    (told,) = answers
    others = {name: value for name, value in told["values"].items() if name != told["metric"]}
    value = told["values"][told["metric"]]
    return Scored(value, items=told["items"], extras=others, metric=told["metric"])


__all__ = ["FAMILY", "WHOLE", "answer", "encode", "load", "score", "truths"]
