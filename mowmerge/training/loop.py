"""The loop that all objectives share: Adam, looks at the select split, the best kept, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, Protocol

from mowmerge.errors import CheckpointError
from mowmerge.tensors import torch
from mowmerge.training.data import number
from mowmerge.training.desk import Desk
from mowmerge.training.settings import Settings

PATIENCE = 5  # looks in a row that may bring nothing better
Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class Judgement:
    """What a look at the select split found: the lower the criterion, the better; why the routers
    are taken for collapsed, if they are."""

    criterion: float
    figures: Mapping[str, float]
    collapsed: str = ""


class Job(Protocol):
    """What is trained: the routers, their loss at a step, and how good they are."""

    routers: Any  # nn.ModuleDict

    def loss(self, step: int) -> float:
        """The loss over all tasks and processes; leaves the gradients of it in the routers."""
        ...

    def judge(self) -> Judgement:
        """A look at the select split, the same in all processes."""
        ...


@dataclass
class Progress:
    """How far a training is, and the best that it has found: what --resume goes on from."""

    step: int = 0
    stale: int = 0
    kept: int = 0
    criterion: float = inf
    collapsed: str = ""
    best: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether nothing better is to be expected."""
        return bool(self.collapsed) or self.stale >= PATIENCE


def run(job: Job, asked: Settings, desk: Desk, fingerprint: str, tell: Tell) -> Progress:
    """Trains, and leaves in the routers the state that was best on the select split.

    Raises:
        CheckpointError: a loss that is not finite, or a collapse before anything got better.
    """
    learning = [p for p in job.routers.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(learning, lr=asked.lr)
    done = Progress()
    _look(job, done)
    if held := desk.load(fingerprint):
        done = Progress(**held["progress"])
        job.routers.load_state_dict(held["routers"])
        optimiser.load_state_dict(held["optimiser"])
    while done.step < asked.steps and not done.over:
        rate = asked.lr * asked.factor(done.step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(number("noise", asked.seed, done.step))
            loss = job.loss(done.step)
        done.step += 1
        if not isfinite(loss):
            desk.drop()
            raise CheckpointError(
                f"the loss is {loss} at step {done.step}: the checkpoint is left as it was",
                hint="lower --lr; if it stays so at step 1, an input or a weight is not finite",
            )
        optimiser.step()
        done.rows.append({"step": done.step, "loss": loss, "lr": rate})
        if done.step % asked.every == 0 or done.step == asked.steps:
            _look(job, done)
            desk.save(
                {
                    "fingerprint": fingerprint, "progress": vars(done),
                    "routers": job.routers.state_dict(), "optimiser": optimiser.state_dict(),
                }
            )  # fmt: skip
        tell(done.step, loss)
    if done.collapsed and not done.kept:
        desk.drop()
        raise CheckpointError(
            f"training collapsed at step {done.step}, before anything got better:"
            f" {done.collapsed}; the checkpoint is left as it was",
            hint="lower --lr, take a larger --batch, or train with --objective distill",
        )
    job.routers.load_state_dict(done.best)
    return done


def _look(job: Job, done: Progress) -> None:
    """Judges the routers as they are, and keeps them if nothing was better before."""
    verdict = job.judge()
    if not done.rows:
        done.rows.append({"step": 0})
    done.rows[-1] |= verdict.figures
    done.collapsed = verdict.collapsed
    if verdict.collapsed:
        return
    if not done.best or verdict.criterion < done.criterion:
        done.criterion, done.kept, done.stale = verdict.criterion, done.step, 0
        done.best = {n: v.detach().clone() for n, v in job.routers.state_dict().items()}
    else:
        done.stale += 1
