"""The fit pass: coefficients for which the merged model is least uncertain, task by task.

The merged tensors are the leaves of one graph. A forward and a backward pass a task gives G, the
gradient for a merged tensor W = W_0 + sum_k w_k B_k; that for a coefficient is <G, B_k>, where B_k
is what the method makes of the task vectors at a coefficient of 1 for model k and 0 for the others.
No task vector is in the graph, and any method that is linear in its coefficients can be fitted.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import islice
from math import fsum, isfinite, log
from pathlib import Path
from random import Random
from typing import Any

from mowmerge.engine import Engine
from mowmerge.errors import CheckpointError, RecipeError
from mowmerge.methods import registry
from mowmerge.plan import Adapted, Fit, Plan, Stored, TensorJob
from mowmerge.recipe import coefficients
from mowmerge.recipe.coefficients import Coefficients, Samples
from mowmerge.recipe.model import Recipe
from mowmerge.tasks import heads, inputs
from mowmerge.tasks.data import digest
from mowmerge.tasks.splits import load_apart
from mowmerge.tensors import DTYPES, Tensor, torch
from mowmerge.training.fitted import Fitted, placed
from mowmerge.training.objectives import entropy

Tell = Callable[[str], None]
WINDOW = 50  # steps over which predictions are counted
ENDS = 10  # steps at either end over which the entropy is reported
COLLAPSED = 0.95  # share of one class among them that is a warning
ONE_LABEL = "single_label_classification"
TOLD = 20  # lines of progress


def fit(recipe: Recipe, plan: Plan, tell: Tell = lambda line: None) -> Fitted:
    """Runs the plan's fit: Adam on the sum over tasks of the mean entropy of the predictions.

    Deterministic on one torch build, device type and number of threads. Labels are not read.

    Raises:
        RecipeError: data that cannot be used, or splits that share samples.
        CheckpointError: an expert that does not load, or an entropy that is not finite.
    """
    wanted, began = plan.fit, time.perf_counter()
    assert wanted is not None
    merged = Merged(plan, wanted)
    tasks = []
    for name in wanted.tasks:
        tasks.append(Task(recipe, plan, name, merged.leaves))
        tell(f"fit: task '{name}', {len(tasks[-1].items)} samples")
    optimizer = torch.optim.Adam([merged.weights], lr=wanted.rate, foreach=False)
    for step in range(wanted.steps):
        for task in tasks:
            task.learn(step)
        merged.weights.grad = merged.gradient()
        optimizer.step()
        merged.bound()
        merged.place()
        if (step + 1) % max(1, wanted.steps // TOLD) == 0:
            mean = sum(task.entropies[-1] for task in tasks) / len(tasks)
            tell(f"fit: step {step + 1} of {wanted.steps}, mean entropy {mean:.4f}")
    found = _found(wanted, plan.jobs, merged, tasks)
    warnings = [
        f"model '{model}' has no task: its coefficients serve the tasks of the others"
        for model in found.models
        if all(task.expert != model for task in tasks)
    ]
    warnings += [text for task in tasks for text in task.warnings()]
    figures = {task.name: task.figures() for task in tasks}
    seconds = round(time.perf_counter() - began, 3)
    return Fitted(placed(plan, found, warnings), found, figures, seconds)


class Merged:
    """The merged tensors as leaves, and the coefficients they are made from.

    `leaves` holds the output's tensors by name; `weights` [C] the coefficients: one a tensor and
    model, or with granularity: task one a model.
    """

    def __init__(self, plan: Plan, wanted: Fit) -> None:
        self._engine, self._held = Engine(plan), wanted.held
        self._jobs = [job for job in plan.jobs if job.output.name in set(wanted.tensors)]
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._index: dict[str, list[int]] = {}
        places: dict[Any, int] = {}
        found: list[tuple[float, float, float]] = []  # start and bounds
        for job in self._jobs:
            spec = registry.get(str(job.method))
            bounds = spec.parameters[str(spec.fit)]
            for model, value in coefficients.of(job).items():
                key = model if wanted.granularity == "task" else (job.output.name, model)
                if key not in places:
                    places[key] = len(places)
                    found.append((value, bounds.low, bounds.high))
                self._index.setdefault(job.output.name, []).append(places[key])
        start, self._low, self._high = torch.tensor(found, dtype=torch.float32).T.contiguous()
        self.weights = torch.nn.Parameter(start.clone())
        self._start = [value for value, _, _ in found]
        self.idle = set(wanted.tensors)  # that no gradient has reached
        self.leaves: dict[str, Tensor] = {}
        for job in plan.jobs:
            fitted = job.output.name in self._index
            leaf = torch.empty(job.output.shape, device=plan.device) if fitted else self._read(job)
            self.leaves[job.output.name] = torch.nn.Parameter(leaf, requires_grad=fitted)
        self.place()

    def place(self) -> None:
        """Writes the merged values into the leaves: W_0 + sum_k w_k B_k."""
        for job in self._jobs:
            base, rows = self._parts(job)
            weight = self.weights.detach()[self._index[job.output.name]].tolist()
            leaf = self.leaves[job.output.name].detach().view(-1)
            leaf.zero_()
            for row, w in zip(rows, weight, strict=True):
                leaf.add_(row, alpha=w)
            leaf.add_(base)

    def gradient(self) -> Tensor:
        """The coefficients' gradient [C], <G, B_k> added up over tensors; frees the leaves'."""
        total = torch.zeros_like(self.weights)
        for job in self._jobs:
            leaf = self.leaves[job.output.name]
            if leaf.grad is None:
                continue
            self.idle.discard(job.output.name)
            _, rows = self._parts(job)
            flat = leaf.grad.reshape(-1)
            parts = torch.stack([torch.dot(row, flat) for row in rows]).cpu()
            total.index_add_(0, torch.tensor(self._index[job.output.name]), parts)
            leaf.grad = None
        return total

    def bound(self) -> None:
        """Puts the coefficients back into their parameter's range."""
        with torch.no_grad():
            self.weights.clamp_(self._low, self._high)

    def rows(self) -> dict[str, dict[str, float]]:
        """The coefficients, tensor -> model -> value; those that never moved as they were given."""
        start = torch.tensor(self._start, dtype=torch.float32)
        moved = (self.weights.detach() != start).tolist()
        values = [
            value if changed else given
            for value, changed, given in zip(self.weights.tolist(), moved, self._start, strict=True)
        ]
        return {
            job.output.name: {
                given.model: values[i]
                for given, i in zip(job.models, self._index[job.output.name], strict=True)
            }
            for job in self._jobs
        }

    def _parts(self, job: TensorJob) -> tuple[Tensor, Tensor]:
        """W_0 [numel] and B [N,numel] of a fitted tensor, in fp32."""
        name, device = job.output.name, self._engine.plan.device
        if name not in self._kept:
            with self._engine.open(job) as opened:
                self._engine.settled(opened)
                pieces = [opened.parts(start, stop) for start, stop in opened.blocks()]
            bases, rows = zip(*pieces, strict=True) if pieces else ((), ())
            found = _joined(bases, (0,)).to(device), _joined(rows, (len(job.models), 0)).to(device)
            if not self._held:
                return found
            self._kept[name] = found
        return self._kept[name]

    def _read(self, job: TensorJob) -> Tensor:
        """A tensor that is not fitted, as the merge will write it."""
        kind = DTYPES[job.output.dtype].torch
        value = torch.empty(job.output.shape, dtype=kind)
        data = value.view(-1).view(torch.uint8).numpy()
        with self._engine.open(job) as opened:
            give, size = self._engine.settled(opened), job.output.itemsize
            for start, stop in opened.blocks():
                data.data[start * size : stop * size] = give(start, stop)()
        return (value.float() if job.output.kind == "float" else value).to(self._engine.plan.device)


class Task:
    """One task of a fit: its expert's model on the shared leaves, and its unlabelled samples."""

    def __init__(self, recipe: Recipe, plan: Plan, name: str, leaves: Mapping[str, Tensor]) -> None:
        wanted, (expert, asked) = plan.fit, recipe.trained[name]
        assert wanted is not None
        origin = plan.sources[expert]
        below = origin.model if isinstance(origin, Adapted) else origin
        if not isinstance(below, Stored):
            what = "itself a recipe" if isinstance(below, Plan) else "of another vocabulary"
            raise RecipeError(
                f"model '{expert}' is {what}, which has no head for task '{name}'",
                where=recipe.where("models", expert),
                hint="merge it first: only checkpoints have heads",
            )
        self.name, self.expert, self._device = name, expert, plan.device
        uses = [use for use in ("select", "eval") if getattr(asked.splits, use)]
        self.items = load_apart(recipe, name, ["router", *uses])["router"]
        self._batch = min(wanted.batch, len(self.items))
        if not self._batch:
            raise RecipeError(f"the router split of task '{name}' is empty", where=self.items.where)
        self._order = order(wanted.seed, name, len(self.items))
        where = origin if isinstance(origin, Adapted) else Path(below.folder)
        self.model = heads.load(where, None).float().to(plan.device)
        self._processor = inputs.processor(Path(below.folder), asked.type)
        settings = self.model.config
        if settings.num_labels < 2 or settings.problem_type not in (None, ONE_LABEL):
            raise RecipeError(
                f"the head of task '{name}' does not choose one of several classes: it has no"
                " entropy",
                where=recipe.where("tasks", name, "type"),
                hint="only classification can be fitted: leave the task out, or name a method (in a"
                " dynamic recipe: rest) that needs no data",
            )
        self._most = log(settings.num_labels) if wanted.balance else 1.0
        head = plan.heads.get(expert)
        install(self.model, leaves, (*(head.offsets if head else ()), *plan.dropped))
        self._seen: dict[int, str] = {}
        self.entropies: list[float] = []
        self._predicted: deque[Counter[int]] = deque(maxlen=WINDOW)

    def learn(self, step: int) -> None:
        """Adds the gradient of the mean entropy of one batch to that of the leaves."""
        chosen = list(islice(self._order, self._batch))
        samples = [self.items.input(i) for i in chosen]
        for i, sample in zip(chosen, samples, strict=True):
            if i not in self._seen:
                self._seen[i] = digest(sample)
        given = inputs.encode(self._processor, samples, self.model.config)
        given = {name: value.to(self._device) for name, value in given.items()}
        logits = self.model(**given).logits.float()
        loss = entropy(logits).mean()
        self.entropies.append(loss.item())
        if not isfinite(self.entropies[-1]):
            raise CheckpointError(
                f"step {step + 1} of the fit: the entropy of task '{self.name}' is not finite",
                where=f"model '{self.expert}'",
                hint="lower `rate` or `weight`; if it is step 1, the model or its data is damaged",
            )
        torch.autograd.backward(loss / self._most)
        self._predicted.append(Counter(logits.argmax(-1).tolist()))

    @property
    def commonest(self) -> tuple[int, float]:
        """The class predicted most in the last steps, and its share of the predictions."""
        counts = sum(self._predicted, Counter[int]())
        (label, count), *_ = counts.most_common(1)
        return label, count / counts.total()

    def figures(self) -> dict[str, Any]:
        """Mean entropy of the first and the last steps, and the share of the commonest class."""
        if not self.entropies:
            return {}
        first, last = self.entropies[:ENDS], self.entropies[-ENDS:]
        return {
            "entropy_first": fsum(first) / len(first),
            "entropy_last": fsum(last) / len(last),
            "commonest_share": self.commonest[1],
        }

    def warnings(self) -> list[str]:
        """Test inputs; predictions nearly all of one class: no entropy, and no use."""
        said = []
        if "test" in self.items.split.lower():
            said.append(
                f"task '{self.name}': fitted on the split '{self.items.split}': scores on it are of"
                " no use"
            )
        if not self.entropies or self.commonest[1] < COLLAPSED:
            return said
        label, share = self.commonest
        return [
            *said,
            f"task '{self.name}': {share:.0%} of the fit's last predictions are"
            f" '{self.model.config.id2label[label]}': its entropy may be low for that alone",
        ]

    def seen(self) -> Samples:
        """Which samples the fit has seen."""
        lines = "".join(f"{self._seen[i]}\n" for i in sorted(self._seen))
        return Samples(
            expert=self.expert,
            split=self.items.split,
            count=len(self._seen),
            sha256=sha256(lines.encode()).hexdigest(),
        )


def order(seed: int, task: str, count: int) -> Iterator[int]:
    """Numbers below `count` in shuffled rounds without end, decided by seed and task alone."""
    chance = Random(f"{seed} {task}")
    while True:
        yield from chance.sample(range(count), count)


def _locator(model: Any) -> Callable[[str], str]:
    """Maps a tensor's name on disk to its name in the model."""
    from mowmerge.dynamic.loading import renamer

    renamed = renamer(model)

    def located(name: str) -> str:
        try:
            return renamed(name)
        except ValueError as error:
            raise CheckpointError(str(error), hint="fused experts cannot be fitted yet") from error

    return located


def install(model: Any, leaves: Mapping[str, Tensor], kept: Sequence[str]) -> None:
    """Puts the leaves, under their names on disk, in the place of the model's own tensors.

    What is left, the head, is frozen: it has to be in `kept`. What the model ties stays tied.
    """
    located = _locator(model)
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                places.setdefault(id(value), []).append((held, key))
    own = dict(model.named_parameters(remove_duplicate=False))
    every = own | dict(model.named_buffers(remove_duplicate=False))
    taken = {id(own[name]) for name in map(located, kept) if name in own}
    for name, leaf in leaves.items():
        target = every.get(located(name))
        if target is None:
            continue  # a part that this model's class does not have
        if target.shape != leaf.shape:
            raise CheckpointError(
                f"'{name}' is {list(leaf.shape)}, and {list(target.shape)} in"
                f" {type(model).__name__}"
            )
        for held, key in places[id(target)]:
            parameter = isinstance(held[key], torch.nn.Parameter)
            held[key] = leaf if parameter else leaf.detach()
        taken.add(id(target))
    left = sorted(name for name, value in own.items() if id(value) not in taken)
    if left:
        raise CheckpointError(
            f"no merged tensor and no head is the {type(model).__name__}'s {', '.join(left[:5])}",
            hint="only models that transformers loads under their own names can be fitted",
        )
    for name in set(map(located, kept)) & own.keys():
        own[name].requires_grad_(False)


def _joined(pieces: Sequence[Tensor], empty: tuple[int, ...]) -> Tensor:
    """Blocks [..,B] side by side, in fp32; of a tensor without elements, what is `empty`."""
    return torch.cat(list(pieces), -1).float() if pieces else torch.zeros(empty)


def _found(
    wanted: Fit, jobs: Sequence[TensorJob], merged: Merged, tasks: Sequence[Task]
) -> Coefficients:
    seen = {task.name: task.seen() for task in tasks}
    rows = merged.rows()
    return Coefficients(
        methods=tuple(sorted({str(j.method) for j in jobs if j.output.name in rows})),
        granularity=wanted.granularity,
        models=tuple(dict.fromkeys(model for row in rows.values() for model in row)),
        steps=wanted.steps,
        rate=wanted.rate,
        batch=wanted.batch,
        balance=wanted.balance,
        seed=wanted.seed,
        data=seen,
        uses_test_inputs=any("test" in samples.split.lower() for samples in seen.values()),
        without_gradient=tuple(sorted(merged.idle)),
        tensors=rows,
    )
