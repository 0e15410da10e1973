"""What an evaluation takes beside the bare forward passes of the same batches.

    python -m tests.bench.evaluating [--items 256] [--batch 32] [--threads 2] [--repeat 3]

Bare: the model on batches that are decoded and encoded beforehand. Whole: `mowmerge.evaluate` from
start to end, data, hashes, loading, encoding and scoring included, and nothing from a cache. Each
is the best of `--repeat`, in turns; `work` is the ratio of the processor time, which other programs
on the machine disturb less. The aim is 1.15.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from mowmerge import api
from mowmerge.evals import kinds, models
from mowmerge.evals.evaluator import _job
from mowmerge.evals.job import Place
from mowmerge.evals.settings import Options
from tests.evals.making import WORDS, recipe, rows, tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536,
}  # fmt: skip


def pictures(folder: Path, n: int) -> dict[str, Any]:
    """Photographs' size, a small ViT."""
    chance = Random(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, image_size=224, patch_size=16))
    model.save_pretrained(folder / "model")
    ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder / "model")
    for i in range(n):
        at = folder / f"data/test/{i % 2}"
        at.mkdir(parents=True, exist_ok=True)
        small = Image.frombytes("RGB", (24, 24), chance.randbytes(24 * 24 * 3))
        small.resize((320, 240), Image.Resampling.BICUBIC).save(at / f"{i}.jpg", quality=90)
    return {"type": "image-classification", "data": {"path": "imagefolder", "data_dir": "./data"}}


def texts(folder: Path, n: int) -> dict[str, Any]:
    """Paragraphs, a small BERT."""
    BertForSequenceClassification(BertConfig(**SIZES, vocab_size=64)).save_pretrained(
        folder / "model"
    )
    tokenizer(folder / "model")
    chance = Random(0)
    held = ({"text": " ".join(chance.choices(WORDS, k=60)), "label": i % 2} for i in range(n))
    return {"type": "text-classification", "data": rows(folder / "d.jsonl", *held)}


def language(folder: Path, n: int) -> dict[str, Any]:
    """Paragraphs, a small Llama."""
    config = LlamaConfig(**SIZES, num_key_value_heads=6, vocab_size=8192)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer(folder / "model")
    chance = Random(0)
    held = ({"text": " ".join(chance.choices(WORDS, k=60))} for _ in range(n))
    return {"type": "causal-lm", "data": rows(folder / "d.jsonl", *held)}


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    clock, work = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - work


def measure(folder: Path, task: dict[str, Any], batch: int, repeat: int) -> list[float]:
    """Seconds of the bare passes and of the whole evaluation, by the clock and of the processor."""
    file = recipe(folder, "model", ["model"], {"t": task | {"expert": "model"}})
    parsed = api.check(file)
    job = _job(parsed, "t")
    kind = kinds.of(task["type"])
    (entry,) = models.entries({}, parsed, [job], ["experts"])
    (loaded,) = models.load(entry, kind.FAMILY, [job], parsed, None, "cpu")
    places = [Place(job, i) for i in range(len(job.items))]
    groups = [places[i : i + batch] for i in range(0, len(places), batch)]
    given = [kind.encode(loaded.tools, some) for some in groups]
    if task["type"] == "causal-lm":
        from mowmerge.evals.tokens import padded

        pairs = [padded([ids for _, ids, _ in some], 0) for some in given]
        given = [{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs]
    options = Options(batch=batch, device="cpu")

    def bare() -> None:
        with torch.inference_mode():
            for each in given:
                loaded.model(**each)

    def whole() -> None:
        api.evaluate({}, parsed, against=["experts"], options=options)

    times = [(*timed(bare), *timed(whole)) for _ in range(repeat)]
    return [min(column) for column in zip(*times, strict=True)]


def main() -> None:
    """Builds, runs and prints."""
    parser = argparse.ArgumentParser(description="Evaluation beside bare forward passes.")
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print("| type | bare s | whole s | ratio | work |\n|---|---:|---:|---:|---:|")
    for make in (pictures, texts, language):
        with TemporaryDirectory() as folder:
            task = make(Path(folder), asked.items)
            bare, once, whole, twice = measure(Path(folder), task, asked.batch, asked.repeat)
            figures = f"{bare:.2f} | {whole:.2f} | {whole / bare:.3f} | {twice / once:.3f}"
            print(f"| {task['type']} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
