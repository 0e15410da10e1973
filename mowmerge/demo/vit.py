"""A small vision transformer, trained on all tasks at once, then on each: one thread, same bytes.

What an expert learns is to be in its MLPs: their learning rate is 40 times that of the rest, and
the heads stay as the joint training left them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import cos, pi
from typing import Any

from mowmerge.demo.images import SIZE, Samples, Task
from mowmerge.tensors import Tensor, torch

SIZES = {
    "image_size": SIZE, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "intermediate_size": 256, "initializer_range": 0.1,
}  # fmt: skip
BATCH = 64
BASE_STEPS, BASE_RATE = 180, 2e-3
STEPS, MLP_RATE, RATE = 450, 2e-3, 5e-5
WARM_UP, DECAY = 20, 0.05
TURN, ZOOM, SHIFT = 0.15, 0.1, 0.1  # most that a picture in training is turned, scaled, moved


def config(task: Task) -> Any:
    """The configuration of a model with a task's head."""
    from transformers import ViTConfig

    numbers = {name: i for i, name in enumerate(task.labels)}
    return ViTConfig(**SIZES, id2label=dict(enumerate(task.labels)), label2id=numbers)


def joint(
    tasks: Mapping[str, Task], data: Mapping[str, Samples], seed: int, tell: Callable[[int], None]
) -> dict[str, Any]:
    """Models that share one backbone, each with the head of a task, trained together.

    Each step takes as many pictures of every task; `tell` is given the number of steps done.
    """
    from transformers import ViTForImageClassification

    with _reproducible(seed) as draws:
        models = {name: ViTForImageClassification(config(task)) for name, task in tasks.items()}
        backbone = next(iter(models.values())).vit
        for model in models.values():
            model.vit = backbone
        modules = torch.nn.ModuleList(models.values()).train()
        optimizer = torch.optim.AdamW(
            modules.parameters(), lr=BASE_RATE, weight_decay=DECAY, fused=True
        )
        pixels = {name: normalised(samples.pixels) for name, samples in data.items()}
        each = BATCH // len(models)
        for step in _steps(optimizer, BASE_STEPS):
            drawn = {name: _draw(data[name], pixels[name], each, draws) for name in models}
            shown = _jittered(torch.cat([x for x, _ in drawn.values()]), draws)
            features = backbone(shown).last_hidden_state[:, 0].split(each)
            losses = [
                _loss(models[name].classifier(x), y)
                for x, (name, (_, y)) in zip(features, drawn.items(), strict=True)
            ]
            loss: Any = torch.stack(losses).mean()
            loss.backward()
            tell(step + 1)
    return models


def tune(model: Any, samples: Samples, seed: int) -> None:
    """Fine-tunes the backbone in place on one task; the head is as it was."""
    with _reproducible(seed) as draws:
        pixels = normalised(samples.pixels)
        model.train().classifier.requires_grad_(False)
        weights = dict(model.vit.named_parameters())
        mlp = [p for name, p in weights.items() if ".mlp." in name]
        rest = [p for name, p in weights.items() if ".mlp." not in name]
        groups = [{"params": mlp, "lr": MLP_RATE}, {"params": rest, "lr": RATE}]
        optimizer = torch.optim.AdamW(groups, weight_decay=DECAY, fused=True)
        for _ in _steps(optimizer, STEPS):
            shown, labels = _draw(samples, pixels, BATCH, draws)
            loss: Any = _loss(model(_jittered(shown, draws)).logits, labels)
            loss.backward()


def normalised(pixels: Any) -> Tensor:
    """Bytes [n, h, w, 3] as the zoo's image processor gives them: [n, 3, h, w], -1 to 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _steps(optimizer: Any, count: int) -> Iterator[int]:
    """Numbers the steps; after each, moves the weights by its gradients, warm-up then cosine."""
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 1) * (1 + cos(pi * step / count)) / 2
    )
    for step in range(count):
        optimizer.zero_grad()
        yield step
        optimizer.step()
        rates.step()


def _draw(samples: Samples, pixels: Tensor, count: int, draws: Any) -> tuple[Tensor, Tensor]:
    """Some pictures of the split and their class numbers."""
    at = torch.randint(len(pixels), (count,), generator=draws)
    return pixels[at], torch.from_numpy(samples.labels)[at]


def _jittered(pixels: Tensor, draws: Any) -> Tensor:
    """The pictures, each a little turned, scaled and moved."""
    amount = torch.rand(4, len(pixels), generator=draws) * 2 - 1
    angle, zoom = amount[0] * TURN, 1 + amount[1] * ZOOM
    across, up = zoom * angle.cos(), zoom * angle.sin()
    rows = [torch.stack(row, -1) for row in (
        (across, -up, amount[2] * SHIFT), (up, across, amount[3] * SHIFT)
    )]  # fmt: skip
    grid = torch.nn.functional.affine_grid(
        torch.stack(rows, 1), list(pixels.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(
        pixels, grid, padding_mode="reflection", align_corners=False
    )


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels)


@contextmanager
def _reproducible(seed: int) -> Iterator[Any]:
    """A generator for draws; initial weights from the seed too, and additions in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield torch.Generator().manual_seed(seed)
    finally:
        torch.set_num_threads(threads)
