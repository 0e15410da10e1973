"""The demonstration's models and data: a base and eight experts, built here.

    DIR/base          the bare backbone; heads/ has the head of each task, as a merged folder has
    DIR/<task>        an expert: the base fine-tuned on one task, its head untouched
    DIR/data/<task>   train, validation and test as parquet

Same bytes on one build of torch, pyarrow and pillow and one type of processor, however many
processes train: another processor may add in another order.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from mowmerge.demo import images
from mowmerge.demo.images import SPLITS, TASKS
from mowmerge.errors import MowmergeError, ResourceError
from mowmerge.tasks import heads
from mowmerge.tasks.data import without_bars

Tell = Callable[[str], None]

SEED = 0
PROCESSES = min(4, os.cpu_count() or 1)  # that train experts, each in a thread
SAY_EVERY = 50  # steps of the base


def build(folder: Path, tell: Tell = lambda line: None) -> None:
    """The zoo in `folder`: data, base and experts; what is there already is kept."""
    images.installed()
    if folder.exists() and not folder.is_dir():
        raise ResourceError("is a file", where=str(folder), hint="name a folder for the demo")
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        if not (folder / "data" / name).exists():
            tell(f"pictures: {name}")
            _write_data(folder / "data" / name, name)
    if not (folder / "base").exists():
        _train_base(folder / "base", tell)
    missing = [name for name in TASKS if not (folder / name).exists()]
    if missing:
        _train_experts(folder, missing, tell)


def _write_data(folder: Path, task: str) -> None:
    """A parquet file a split: the picture as PNG, and its class by name."""
    import datasets
    from PIL import Image

    names = datasets.ClassLabel(names=list(TASKS[task].labels))
    features = datasets.Features({"image": datasets.Image(), "label": names})
    with _whole(folder) as staged, without_bars():
        for split in SPLITS:
            drawn = images.samples(task, split)
            columns = {
                "image": [Image.fromarray(each) for each in drawn.pixels],
                "label": drawn.labels.tolist(),
            }
            table = datasets.Dataset.from_dict(columns, features=features)
            table.to_parquet(staged / f"{split}.parquet")


def _train_base(folder: Path, tell: Tell) -> None:
    """The backbone, trained on all tasks; each task's head goes to heads/, its config beside it."""
    from safetensors.torch import save_file

    from mowmerge.demo import vit

    def said(step: int) -> None:
        if step % SAY_EVERY == 0:
            tell(f"base: step {step} of {vit.BASE_STEPS}")

    data = {name: images.samples(name, "train") for name in TASKS}
    models = vit.joint(TASKS, data, SEED, said)
    with _whole(folder) as staged, heads.quiet():
        next(iter(models.values())).vit.save_pretrained(staged)
        processor().save_pretrained(staged)
        (staged / "heads").mkdir()
        for name, model in models.items():
            tensors = {f"classifier.{key}": v for key, v in model.classifier.state_dict().items()}
            save_file(tensors, staged / "heads" / f"{name}.safetensors", {"format": "pt"})
            settings = model.config.to_dict() | {"architectures": [type(model).__name__]}
            (staged / "heads" / f"{name}.json").write_text(json.dumps(settings, indent=2), "utf-8")


def _train_experts(folder: Path, names: Sequence[str], tell: Tell) -> None:
    """Fine-tunes each expert; several processes where there are processors for them."""
    heads.load(folder / "base", names[0])  # what is wrong with it is told before anything starts
    shares = [names[i::PROCESSES] for i in range(PROCESSES) if names[i::PROCESSES]]
    tell(f"experts: {len(names)} to train, {len(shares)} at once")
    if len(shares) == 1:
        for name in names:
            _train_expert(folder, name)
            tell(f"expert: {name}")
        return
    start = get_context("spawn").Process
    running = [start(target=_train_share, args=(folder, share), daemon=True) for share in shares]
    for process in running:
        process.start()
    waiting = list(names)
    while running:
        connection.wait([process.sentinel for process in running], timeout=0.2)
        for name in [name for name in waiting if (folder / name).exists()]:
            waiting.remove(name)
            tell(f"expert: {name}")
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode:
                raise ResourceError(
                    f"a training ended with exit code {process.exitcode}",
                    where=str(folder),
                    hint="run the demo again: what is whole is kept",
                )


def _train_share(folder: Path, names: Sequence[str]) -> None:
    """What a process does: Ctrl-C is left to the one that started it, errors are told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for name in names:
            _train_expert(folder, name)
    except (MowmergeError, OSError) as error:
        sys.exit(f"error: {error}")


def _train_expert(folder: Path, name: str) -> None:
    """Fine-tunes the base on a task, with a seed of the task's own."""
    from mowmerge.demo import vit

    model = heads.load(folder / "base", name)
    vit.tune(model, images.samples(name, "train"), SEED + 1 + list(TASKS).index(name))
    with _whole(folder / name) as staged, heads.quiet():
        model.save_pretrained(staged)
        processor().save_pretrained(staged)


def processor() -> Any:
    """The image processor of base and experts."""
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": images.SIZE, "width": images.SIZE})


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name when it is whole; what a kill left is cleared."""
    staged = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    yield staged
    staged.rename(folder)
