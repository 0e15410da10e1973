"""Routers that learn through the mixed weights: entropy, distillation, next-token loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

from mowmerge.dynamic.format import Manifest
from mowmerge.errors import RecipeError
from mowmerge.recipe.model import Recipe
from mowmerge.tasks.inputs import encode
from mowmerge.tensors import Tensor, torch
from mowmerge.training import checkpoint, objectives
from mowmerge.training.classifier import LONGEST
from mowmerge.training.data import Samples, draw, parts
from mowmerge.training.loop import Judgement
from mowmerge.training.processes import Processes
from mowmerge.training.settings import Settings

LOOKED_AT = 256  # samples a task that a look at the select split takes
SAME = 0.95  # share of a task's samples in one class, from which on its predictions are all alike
LEAST = 0.25  # of the first marginal entropy: below it and alike, they collapsed


class Mixture:
    """A training job through the whole model; the processes share each task's batch."""

    def __init__(
        self, model: Any, processor: Mapping[str, Any], samples: Sequence[Samples],
        asked: Settings, processes: Processes, teachers: Mapping[int, Any] | None = None,
    ) -> None:  # fmt: skip
        """`teachers`: the experts' own models by number, where scales learn and no router."""
        self._model, self._processor, self._asked = model, processor, asked
        self._samples, self._processes = samples, processes
        self._teachers = teachers or {}
        self.routers = torch.nn.ModuleDict({n: model.mow_router[n] for n in asked.routers})
        if asked.scales:
            self.routers["factors"] = torch.nn.ParameterList(checkpoint.factors(model).values())
        self._over = len(samples) if asked.objective == "task" else 1
        self._first: list[tuple[float, float]] = []
        self.histograms: dict[str, list[int]] = {}

    def loss(self, step: int) -> float:
        """The mean loss of each task's batch, summed over tasks; their mean for a classifier."""
        self.routers.train()
        total = torch.zeros(())
        for sample in self._samples:
            batch = self._asked.batch
            some = draw(len(sample.router), batch, step, self._asked.seed, sample.task)
            here = self._processes
            for part in parts(some, here.rank, here.count, self._asked.accumulate):
                losses, _ = self._measure(sample, sample.router, part)
                one = losses.sum() / batch / self._over
                torch.autograd.backward(one)
                total += one.detach().cpu()
        self.routers.eval()
        self._share()
        return float(self._processes.total(total))

    def _share(self) -> None:
        """Each gradient becomes its sum over all processes."""
        for p in self.routers.parameters():
            if p.requires_grad:
                mine = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = self._processes.total(mine)

    def judge(self) -> Judgement:
        """Mean loss on the select split; for entropy also what the predictions still tell.

        The criterion of entropy is mean entropy minus marginal entropy, over log C, so that neither
        doubt nor one answer for everything looks good; of the others it is the loss.
        """
        self.routers.eval()
        found = [self._task(sample) for sample in self._samples]
        self.histograms = {
            s.task: counts for s, (_, _, counts) in zip(self._samples, found, strict=True) if counts
        }
        loss = sum(one for one, _, _ in found) / self._over
        figures, criterion = {"select_loss": loss}, loss
        if any(counts for _, _, counts in found):
            shares = [max(counts) / sum(counts) for _, _, counts in found]
            entropies = [marginal for _, marginal, _ in found]
            figures |= {
                "marginal_entropy": sum(entropies) / len(found), "top_class_share": max(shares),
            }  # fmt: skip
            if self._asked.objective == "task":
                right = [
                    counts[sample.expert] / sum(counts)
                    for sample, (_, _, counts) in zip(self._samples, found, strict=True)
                ]
                return Judgement(
                    loss, {"select_loss": loss, "select_accuracy": sum(right) / len(right)}
                )
            if self._asked.objective == "entropy":
                told = [(one - m) / log(len(counts)) for one, m, counts in found]
                criterion = sum(told) / len(told)
                self._first = self._first or list(zip(entropies, shares, strict=True))
                return Judgement(criterion, figures, self._collapsed(entropies, shares))
        return Judgement(criterion, figures)

    def _collapsed(self, entropies: Sequence[float], shares: Sequence[float]) -> str:
        """Which task's samples have all become one class, and were not before."""
        for i, sample in enumerate(self._samples):
            entropy, share = self._first[i]
            if shares[i] >= SAME > share and entropies[i] < LEAST * entropy:
                return (
                    f"{shares[i]:.0%} of the samples of task '{sample.task}' are one class"
                    f" (at first {share:.0%}), their marginal entropy fell from {entropy:.3g} to"
                    f" {entropies[i]:.3g}"
                )
        return ""

    def _task(self, sample: Samples) -> tuple[float, float, list[int]]:
        """A task's mean loss, marginal entropy and histogram of predictions, over all processes."""
        items, here = sample.select or sample.router, self._processes
        n = min(len(items), LOOKED_AT)
        size = max(1, self._asked.batch // self._asked.accumulate)
        mine = range(here.rank, n, here.count)
        chunks = [mine[i : i + size] for i in range(0, len(mine), size)]
        width = self._width(sample)
        sums = torch.zeros(1 + 2 * width, dtype=torch.float64)
        with torch.no_grad():
            for chunk in chunks:
                losses, p = self._measure(sample, items, chunk)
                sums[0] += losses.double().sum().cpu()
                if p is not None:
                    p = p.double().cpu()
                    sums[1 : 1 + width] += p.sum(0)
                    sums[1 + width :] += torch.bincount(p.argmax(1), minlength=width)
        sums = here.total(sums) / n
        marginal = float(torch.special.entr(sums[1 : 1 + width]).sum())
        return float(sums[0]), marginal, [round(float(x) * n) for x in sums[1 + width :]]

    def _width(self, sample: Samples) -> int:
        """How many classes there are: of a task's head, or of experts; 0 where there are none."""
        if self._asked.objective == "task":
            return len(self._model._manifest.experts)
        if sample.type == "causal-lm":
            return 0
        heads = self._model._manifest.heads
        if heads:
            from transformers import AutoConfig

            return int(AutoConfig.for_model(**dict(heads[sample.expert].config)).num_labels)
        return int(self._model.config.num_labels)

    def _measure(
        self, sample: Samples, items: Any, some: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Each sample's loss [B], and for a classification task its probabilities [B,C]."""
        model, device = self._model, self._processes.device
        processor = self._processor[sample.type]
        given = encode(processor, [items.input(i) for i in some], model.config, LONGEST)
        given = {k: v.to(device) for k, v in given.items()}
        expert = torch.full((len(some),), sample.expert, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._asked.bf16):
            if self._asked.objective == "task":
                return self._classified(given, expert)
            if sample.type == "causal-lm":
                return self._text(given, expert), None
            return self._classes(given, expert, self._width(sample))

    def _classes(
        self, given: Mapping[str, Tensor], expert: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        """The head is that of the sample's task, the gates are the routers' own."""
        how = {"task_ids": expert} if self._asked.scales else {"head_ids": expert}
        logits = self._model(**given, **how).logits[:, :width].float()
        p = torch.softmax(logits, -1)
        if self._asked.objective == "entropy":
            return objectives.entropy(logits), p
        return objectives.divergence(self._taught(given, expert)[:, :width], logits), p

    def _taught(self, given: Mapping[str, Tensor], expert: Tensor) -> Tensor:
        """The logits of the samples' expert: of its own model where scales learn, else of the
        checkpoint under its gates."""
        with torch.no_grad():
            if self._asked.scales:
                found: Tensor = self._teachers[int(expert[0])](**given).logits
            else:
                found = self._model(**given, task_ids=expert).logits
        return found

    def _text(self, given: Mapping[str, Tensor], expert: Tensor) -> Tensor:
        """The routers see the first half of each text, and answer for the second; scales answer
        for all of it."""
        ids, mask = given["input_ids"], given["attention_mask"]
        seen = objectives.prompt(mask)
        counted = mask.bool() if self._asked.scales else mask.bool() & ~seen
        how = {"task_ids": expert} if self._asked.scales else {"routing_mask": seen}
        logits = self._model(**given, **how).logits
        if self._asked.objective == "lm":
            return objectives.next_token(logits, ids, counted)
        teacher = self._taught(given, expert)
        each = objectives.divergence(teacher[:, :-1], logits[:, :-1])
        return objectives.mean_over(each, counted[:, 1:])

    def _classified(
        self, given: Mapping[str, Tensor], expert: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of classifiers that look at each token, summed over routers."""
        mask = given.get("attention_mask")
        masks = [] if mask is None else [mask]
        total, p = torch.zeros(len(expert), device=expert.device), None
        for name in self.routers:
            raw, _ = self._model.classify(name, (), given, len(expert), masks)
            total = total + torch.nn.functional.cross_entropy(raw, expert, reduction="none")
            p = torch.softmax(raw, -1)
        return total, p


def check_heads(held: Manifest, base_class: str, asked: Settings, recipe: Recipe) -> None:
    """RecipeError where an objective needs the classes of a head that is absent or has only one."""
    if asked.objective not in ("entropy", "distill"):
        return
    for name, (expert, task) in recipe.trained.items():
        where = recipe.where("tasks", name)
        if task.type == "causal-lm":
            continue
        if not held.heads and not base_class.endswith("Classification"):
            raise RecipeError(
                f"task '{name}' is for classification, and the checkpoint has no heads",
                where=where, hint="merge with `heads: {match: ...}`, or --objective task",
            )  # fmt: skip
        head = held.heads[held.experts.index(expert)].config if held.heads else {}
        if head.get("problem_type") == "regression" or len(head.get("id2label") or (0, 1)) == 1:
            raise RecipeError(
                f"the head of task '{name}' has one output, of which no entropy can be taken",
                where=where, hint="leave the task out, or --objective task",
            )  # fmt: skip
