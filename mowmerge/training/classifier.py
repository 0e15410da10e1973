"""Classifiers that pool their features first: the anchor is asked once a sample, then all is small.

Cross-entropy on raw outputs, the expert of each sample's task as its class. Routers learn on
standardised features, and their first weights are folded back to plain ones at the end; a centroid
router is the mean of each expert's features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.dynamic.format import Router
from mowmerge.tasks.inputs import encode
from mowmerge.tensors import Tensor, torch
from mowmerge.training import objectives
from mowmerge.training.data import Samples, draw
from mowmerge.training.loop import Judgement
from mowmerge.training.processes import Processes
from mowmerge.training.settings import Settings

POOLED = ("linear", "twin", "centroid")  # kinds that need only a sample's pooled features
FIRST = {"linear": "last", "twin": "first"}  # the layer that is given them, standardised
LONGEST = 512  # tokens of a text
NARROWEST = 0.1  # of the median deviation: the least by which a feature is divided
Place = tuple[int, str]


def place(router: Router) -> Place:
    """Where a router's features are from: layer and pool."""
    return router.layer, router.pool


class Classifier:
    """A training job over pooled features, held whole by each process."""

    def __init__(
        self, routers: Any, asked: Settings, samples: Sequence[Samples],
        features: Mapping[str, Mapping[Place, Sequence[Tensor]]],
    ) -> None:  # fmt: skip
        """`features`: use -> (layer, pool) -> [n,d] of each task; `routers`: an nn.ModuleDict."""
        self.routers, self._asked, self._samples = routers, asked, samples
        self._sizes = [len(x) for x in next(iter(features["router"].values()))]
        self.scales: dict[str, tuple[Tensor, Tensor]] = {}
        self._x: dict[str, dict[str, Tensor]] = {}
        for name, made in routers.items():
            layers = {use: torch.cat(list(of[place(made.router)])) for use, of in features.items()}
            if made.router.kind in FIRST:
                mean, by = self.scales[name] = standard(layers["router"])
                layers = {use: (x - mean) / by for use, x in layers.items()}
            self._x[name] = layers
        self._labels = {
            use: torch.cat(
                [
                    torch.full((len(x),), s.expert)
                    for s, x in zip(samples, next(iter(of.values())), strict=True)
                ]
            )
            for use, of in features.items()
        }
        for name, made in routers.items():
            if made.router.kind == "centroid":
                self._close(made, self._x[name]["router"])

    @property
    def _best_by(self) -> str:
        return "select" if "select" in self._labels else "router"

    def _close(self, router: Any, x: Tensor) -> None:
        """The closed form of a centroid router."""
        labels = self._labels["router"]
        means = [x[labels == k].double().mean(0) for k in range(router.router.outputs)]
        with torch.no_grad():
            router.centroids.copy_(torch.stack(means))

    def loss(self, step: int) -> float:
        """Mean cross-entropy over a step's samples, summed over routers."""
        rows, start = [], 0
        for sample, n in zip(self._samples, self._sizes, strict=True):
            some = draw(n, self._asked.batch, step, self._asked.seed, sample.task)
            rows += [start + i for i in some]
            start += n
        index, labels = torch.tensor(rows), self._labels["router"]
        self.routers.train()
        total = torch.zeros(())
        for name, made in self.routers.items():
            raw = made(self._x[name]["router"][index])
            total = total + torch.nn.functional.cross_entropy(raw, labels[index])
        torch.autograd.backward(total)
        self.routers.eval()
        return total.item()

    def judge(self) -> Judgement:
        """Cross-entropy and accuracy on the select split (the router split where there is none)."""
        loss, right = 0.0, 0.0
        labels = self._labels[self._best_by]
        for raw in self.raw(self._best_by).values():
            loss += float(torch.nn.functional.cross_entropy(raw, labels))
            right += float((raw.argmax(1) == labels).double().mean())
        return Judgement(loss, {"select_loss": loss, "select_accuracy": right / len(self.routers)})

    def raw(self, use: str) -> dict[str, Tensor]:
        """Each router's outputs for the samples of a use: [n,K]."""
        self.routers.eval()
        with torch.no_grad():
            return {n: made(self._x[n][use]) for n, made in self.routers.items()}

    def finish(self) -> dict[str, Any]:
        """Calibrates temperatures on the select split, folds scales back; returns the metrics."""
        labels, found = self._labels[self._best_by], self.judge().figures
        metrics: dict[str, Any] = {"accuracy": found["select_accuracy"]}
        for name, raw in self.raw(self._best_by).items():
            made = self.routers[name]
            if self._best_by == "select" and made.router.activation == "softmax":
                made.temperature.fill_(objectives.temperature(raw, labels))
            t = float(made.temperature)
            nll = torch.nn.functional.cross_entropy
            metrics[name] = {
                "temperature": t, "nll": float(nll(raw, labels)),
                "nll_calibrated": float(nll(raw / t, labels)),
            }  # fmt: skip
        for name, (mean, by) in self.scales.items():
            made = self.routers[name]
            fold(getattr(made, FIRST[made.router.kind]), mean, by)
        self.scales = {}
        return metrics


def standard(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature [d], the deviation no less than a tenth of the median."""
    by, mean = torch.std_mean(x.double(), 0, correction=0)
    least = max(NARROWEST * float(by.median()), 1e-6)
    return mean.float(), by.clamp_min(least).float()


def fold(linear: Any, mean: Tensor, by: Tensor) -> None:
    """W ((x - mean) / by) + b as one linear map of x."""
    with torch.no_grad():
        weight = linear.weight.double() / by.double()
        linear.bias.copy_(linear.bias.double() - weight @ mean.double())
        linear.weight.copy_(weight)


def features(
    model: Any, processors: Mapping[str, Any], samples: Sequence[Samples],
    widths: Mapping[Place, int], use: str, asked: Settings, processes: Processes,
) -> dict[Place, list[Tensor]]:  # fmt: skip
    """(Layer, pool) -> each task's pooled features of the frozen anchor, or encoder, [n,d], fp32 on
    the CPU.

    `widths` has the places and their d. The processes share the work; each gets all of it.
    """
    from mowmerge.dynamic.routers import pool

    found: dict[Place, list[Tensor]] = {where: [] for where in widths}
    size = max(1, asked.batch // asked.accumulate)
    for sample in samples:
        items = getattr(sample, use)
        made = {where: torch.zeros(len(items), width) for where, width in widths.items()}
        for start in range(processes.rank * size, len(items), processes.count * size):
            some = [items.input(i) for i in range(start, min(start + size, len(items)))]
            given = encode(processors[sample.type], some, model.config, LONGEST)
            given = {k: v.to(processes.device) for k, v in given.items()}
            masks = [given["attention_mask"]] if "attention_mask" in given else []
            for (layer, how), values in made.items():
                with torch.autocast(processes.device.type, torch.bfloat16, enabled=asked.bf16):
                    tokens, mask = model.seen(layer, (), given, masks)
                pooled = pool(tokens.float(), mask, how)
                values[start : start + len(some)] = pooled.cpu()
        for where, values in made.items():
            found[where].append(processes.total(values))
    return found
