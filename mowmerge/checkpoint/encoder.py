"""The named encoder that classifiers look at: what of the base's inputs it reads, how wide it is,
and its copy in the output. Loads no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mowmerge.checkpoint import sidecars
from mowmerge.checkpoint.source import config, refuse_dynamic
from mowmerge.dynamic.format import Encoder
from mowmerge.errors import CheckpointError
from mowmerge.placement import Vocabulary
from mowmerge.plan import Stored

FOLDER = "encoder"
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")  # what configs call the hidden states' width
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


@dataclass(frozen=True)
class Named:
    """An encoder: its files, the width of its hidden states, and how it reads."""

    stored: Stored
    width: int
    reading: Encoder


def described(stored: Stored, donor: Path) -> Named:
    """The encoder in these files, as it reads what is made for the donor.

    Raises:
        CheckpointError: it reads neither texts nor pictures as the donor does, or it is nothing
            that transformers loads from files of its own.
    """
    folder = Path(stored.folder)
    refuse_dynamic(stored)
    settings = config(folder)
    width = next((settings[key] for key in WIDTHS if isinstance(settings.get(key), int)), 0)
    width = width or (settings.get("hidden_sizes") or [0])[-1]
    if not width or "auto_map" in settings or stored.format != "safetensors":
        why = "its config says no width of hidden states" if not width else (
            "it brings code of its own" if "auto_map" in settings else "its weights are pickled"
        )  # fmt: skip
        raise _unfit(stored, why)
    theirs, ours = _pictures(folder), _pictures(donor)
    if theirs and ours:
        return Named(stored, width, _pixels(stored, theirs, ours, settings))
    if not theirs and _spells(folder) and _spells(donor):
        return Named(stored, width, Encoder("texts"))
    what = "an image processor" if theirs else "a tokenizer"
    where = "the base" if theirs or _spells(folder) else "it"
    raise _unfit(stored, f"{where} has no {what.split(' ', 1)[1]}, so it cannot read what the"
                 " base reads")  # fmt: skip


def copy(
    stored: Stored, reading: Encoder, donor: Path, out: Path, vocabulary: Vocabulary | None = None
) -> None:
    """Puts the encoder's files into `out`/encoder as they are; for texts the tokenizer that is
    written below, the donor's or of that vocabulary, which spells out what the encoder reads."""
    folder, into = Path(stored.folder), out / FOLDER
    _beside(folder, into)
    for index in folder.glob("*.safetensors.index.json"):
        shutil.copyfile(index, into / index.name)
    for file in stored.files:
        alone = len(stored.files) == 1
        shutil.copyfile(file, into / ("model.safetensors" if alone else Path(file).name))
    if reading.reads == "texts":
        _beside(donor, into / "base", vocabulary)


def _beside(folder: Path, into: Path, vocabulary: Vocabulary | None = None) -> None:
    """Copies a model's config, tokenizer and licence."""
    into.mkdir(parents=True, exist_ok=True)
    sidecars.copy(folder, (), into, vocabulary)
    if (folder / "config.json").exists():
        shutil.copyfile(folder / "config.json", into / "config.json")


def _unfit(stored: Stored, why: str) -> CheckpointError:
    return CheckpointError(
        f"this cannot be a classifier's encoder: {why}",
        where=stored.origin,
        hint="name a model that AutoModel loads and that reads what the base reads, with its"
        " tokenizer or image processor beside it; without `encoder` the anchor is looked at",
    )


def _spells(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZERS)


def _pictures(folder: Path) -> Mapping[str, Any]:
    """The settings of a folder's image processor, empty where it has none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            held = json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        held = held.get("image_processor", held)
        if "image_processor_type" in held or "image_mean" in held:
            return dict(held)
    return {}


def _pixels(
    stored: Stored, theirs: Mapping[str, Any], ours: Mapping[str, Any], settings: Mapping[str, Any]
) -> Encoder:
    """(x s_base + m_base - m) / s, at the size that the encoder takes."""
    (mean, deviation), (m, s) = _normalised(ours), _normalised(theirs)
    ranges = [p.get("rescale_factor", 1 / 255) * p.get("do_rescale", True) for p in (ours, theirs)]
    size = _size(settings.get("image_size") or theirs.get("crop_size") or theirs.get("size"))
    if ranges[0] != ranges[1] or not ranges[0] or not size:
        raise _unfit(stored, "its image processor says no size, or another range of pixels")
    scale = tuple(a / b for a, b in zip(deviation, s, strict=True))
    shift = tuple((a - b) / c for a, b, c in zip(mean, m, s, strict=True))
    return Encoder("pixels", scale, shift, size)


def _normalised(processor: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """The mean and deviation of each channel that a processor takes off."""
    if not processor.get("do_normalize", True) or "image_mean" not in processor:
        return [0.0] * 3, [1.0] * 3
    return list(processor["image_mean"]), list(processor["image_std"])


def _size(said: Any) -> tuple[int, ...]:
    """Rows and columns of what configs and processors call a size; empty where it says none."""
    if isinstance(said, int):
        return said, said
    if isinstance(said, list | tuple) and len(said) == 2:
        return int(said[0]), int(said[1])
    if isinstance(said, Mapping) and "height" in said and "width" in said:
        return int(said["height"]), int(said["width"])
    edge = said.get("shortest_edge") if isinstance(said, Mapping) else None
    return (int(edge), int(edge)) if edge else ()
