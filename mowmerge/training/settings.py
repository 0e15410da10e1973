"""How routers are trained: what the user asked for, and the defaults of each objective."""

from __future__ import annotations

from dataclasses import dataclass

from mowmerge.dynamic.format import Manifest
from mowmerge.errors import CheckpointError, RecipeError

OBJECTIVES = ("task", "entropy", "distill", "lm")
RATE = 0.768  # over a router's width, its learning rate: 1e-3 for a ViT-B, as in WEMoE's code
FASTEST = 0.01
CHECKS = 20  # times that a run looks at the select split and saves itself
SCOPES = ("sample", "block")  # of gates whose router has parameters to train


@dataclass(frozen=True)
class Options:
    """What may be asked; None takes the objective's default. `device` is cpu, cuda or cuda:1; of
    several processes one waits for another `timeout` minutes."""

    objective: str | None = None
    steps: int | None = None
    batch: int | None = None
    lr: float | None = None
    seed: int = 0
    bf16: bool = False
    accumulate: int = 1
    resume: bool = False
    device: str | None = None
    timeout: float = 10.0


@dataclass(frozen=True)
class Settings:
    """What will be done: `batch` samples a task and step, in `accumulate` parts, by Adam."""

    objective: str
    routers: tuple[str, ...]
    steps: int
    batch: int
    lr: float
    schedule: str  # constant | linear | cosine: how lr falls to 0
    seed: int
    bf16: bool
    accumulate: int
    scales: bool = False  # the factors of scales learn, and no router

    @property
    def every(self) -> int:
        """Steps between two looks at the select split."""
        return max(1, self.steps // CHECKS)

    def factor(self, step: int) -> float:
        """The share of `lr` that step number `step`, from 0, is taken with."""
        from math import cos, pi

        done = step / max(self.steps, 1)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}[
            self.schedule
        ]


def settings(manifest: Manifest, options: Options) -> Settings:
    """The options with every default filled in, for the routers of a checkpoint.

    task: 1000 steps of 64 samples a task, lr 1e-3, or 2000 and falling linearly for a twin router;
    a centroid router has a closed form and takes none. Others: 200 steps of 16 (lm: 8), lr falling
    along a cosine from 0.768 / the width of what a router reads, at most 0.01: a step moves every
    weight by about lr, so that what it moves the output by does not depend on the width. Where the
    checkpoint has scales to fit, distill is for them, their factors at lr 1e-2.

    Raises:
        CheckpointError: the checkpoint has no router to train.
        RecipeError: an objective that does not suit the routers.
    """
    routers = trainable(manifest)
    if manifest.fitted and (options.objective == "distill" or not routers):
        return _of_scales(options)
    if not routers:
        raise CheckpointError(
            f"'{manifest.method}' has no router to train: " + _why_none(manifest),
            hint="it is whole as it stands",
        )
    named = {manifest.routers[name].objective for name in routers}
    objective = options.objective or (named.pop() if len(named) == 1 else "")
    if objective not in OBJECTIVES:
        raise RecipeError(
            f"there is no objective '{objective}' for these routers",
            hint=f"--objective takes {', '.join(OBJECTIVES)}",
        )
    kinds = {manifest.routers[name].kind for name in routers}
    if objective == "task" and set(_scopes(manifest, routers)) != {"sample"}:
        raise RecipeError(
            "the objective task is for classifiers, and these routers look at each block's tokens",
            hint="--objective entropy or distill",
        )
    if objective != "task" and "centroid" in kinds:
        raise RecipeError(
            "a centroid router is the mean of each task's features", hint="--objective task"
        )
    classifying = objective == "task"
    widest = max(manifest.routers[name].width for name in routers)
    steps, batch, lr = (1000, 64, 1e-3) if classifying else (200, 16, min(FASTEST, RATE / widest))
    schedule = "constant" if classifying else "cosine"
    if classifying and "twin" in kinds:
        steps, schedule = 2000, "linear"
    if objective == "lm":
        batch = 8
    if kinds == {"centroid"}:
        steps = 0
    return Settings(
        objective=objective,
        routers=routers,
        steps=steps if options.steps is None or not steps else options.steps,
        batch=options.batch or batch,
        lr=options.lr or lr,
        schedule=schedule,
        seed=options.seed,
        bf16=options.bf16,
        accumulate=options.accumulate,
    )


def _of_scales(options: Options) -> Settings:
    """The settings of a training of scales alone."""
    if options.objective not in (None, "distill"):
        raise RecipeError(
            f"'{options.objective}' is for routers, and this checkpoint has scales to learn alone",
            hint="--objective distill",
        )
    return Settings(
        "distill", (), 200 if options.steps is None else options.steps, options.batch or 16,
        options.lr or FASTEST, "cosine", options.seed, options.bf16, options.accumulate, True,
    )  # fmt: skip


def trainable(manifest: Manifest) -> tuple[str, ...]:
    """The routers that decide a gate of scope sample or block, in order."""
    asked = {gate.router for gate in manifest.gates.values() if gate.scope in SCOPES}
    return tuple(name for name in manifest.routers if name in asked)


def _scopes(manifest: Manifest, routers: tuple[str, ...]) -> list[str]:
    return [gate.scope for gate in manifest.gates.values() if gate.router in routers]


def _why_none(manifest: Manifest) -> str:
    scopes = {gate.scope for gate in manifest.gates.values()}
    if "module" in scopes:
        return "its gates are projections that were computed when it was built"
    return "the caller says which expert is meant (task_ids); `router: deep` would have one"
