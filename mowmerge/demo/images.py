"""Eight image tasks out of what scikit-learn and scikit-image ship: 16 x 16 pixels, three splits.

Five show handwritten digits, each in a guise of its own, three show patches of pictures. Splits
share nothing: a digit as it was written is in one of them, whatever its guise, and a picture is
cut into tiles, each of them in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mowmerge.errors import SourceError

Array = np.ndarray[Any, Any]
Chance = np.random.Generator
Draw = Callable[[str], Iterator[tuple[Array, int]]]
Guise = Callable[[Array, str, Chance], Array]

SIZE, TILE = 16, 32  # pixels a side: of a sample; of what is cut out of a picture to become one
FLAT = 3.0  # a tile whose values, 0 to 255, deviate less shows nothing
LIMIT = 300  # tiles of a picture and split
LARGE = 1000  # a picture with a longer side is halved
SPLITS = {"train": 0.58, "validation": 0.13, "test": 0.29}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAIRS = ("0-1", "2-3", "4-5", "6-7", "8-9")
HINT = 'pip install "mowmerge[demo]"'


@dataclass(frozen=True)
class Samples:
    """Pictures [n, 16, 16, 3] of bytes, and their class numbers [n]."""

    pixels: Array
    labels: Array


def samples(task: str, split: str) -> Samples:
    """A split of a task: the same wherever it is drawn, and no picture twice.

    Raises:
        SourceError: scikit-learn or scikit-image is not installed, or lacks a picture.
    """
    found: dict[bytes, tuple[Array, int]] = {}
    for pixels, label in TASKS[task].draw(split):
        found.setdefault(pixels.tobytes(), (pixels, label))
    shown, labels = zip(*found.values(), strict=True)
    return Samples(np.stack(shown), np.array(labels))


@dataclass(frozen=True)
class Task:
    """The names of the classes, and what draws picture and class of everything in a split."""

    labels: tuple[str, ...]
    draw: Draw


def _digits(guise: Guise, label: Callable[[int], int] = int) -> Draw:
    """Draws the digits of a split: `guise` gives ink [16, 16, 1], 0 to 1, its colours."""

    def draw(split: str) -> Iterator[tuple[Array, int]]:
        ink, digits = _written()
        chance = np.random.default_rng(list(SPLITS).index(split))
        for i in _share(len(ink), split):
            colours = guise(_resized(ink[i])[..., None], split, chance)
            yield np.rint(colours.clip(0, 1) * 255).astype(np.uint8), label(int(digits[i]))

    return draw


def _patches(*files: str) -> Draw:
    """Draws the tiles of a split, their class the file; in training, their mirror images too."""

    def draw(split: str) -> Iterator[tuple[Array, int]]:
        for label, file in enumerate(files):
            for tile in _tiles(file, split):
                small = _resized(tile)
                yield small, label
                if split == "train":
                    yield from (
                        (m, label) for m in (small[::-1], small[:, ::-1], small[::-1, ::-1])
                    )

    return draw


def _plain(ink: Array, split: str, chance: Chance) -> Array:
    """White on black."""
    return np.repeat(ink, 3, 2)


def _rotated(ink: Array, split: str, chance: Chance) -> Array:
    """Black on white, a quarter turn to the left."""
    return 1 - np.repeat(np.rot90(ink), 3, 2)


def _textured(ink: Array, split: str, chance: Chance) -> Array:
    """White on a tile of bricks, grass or gravel."""
    tiles = _tiles(("brick.png", "grass.png", "gravel.png")[chance.integers(3)], split)
    ground = tiles[chance.integers(len(tiles))][:SIZE, :SIZE] / 255 * 0.45
    return np.asarray(ink + (1 - ink) * ground)


def _mirrored(ink: Array, split: str, chance: Chance) -> Array:
    """Yellow on blue, left and right exchanged."""
    yellow, blue = np.array([1, 0.85, 0.65]), np.array([0.05, 0.1, 0.35])
    return np.asarray(blue + ink[:, ::-1] * (yellow - blue))


def _coloured(ink: Array, split: str, chance: Chance) -> Array:
    """A bright colour on a dark one, both drawn."""
    front, ground = chance.uniform(0.6, 1, 3), chance.uniform(0, 0.4, 3)
    return np.asarray(ground + ink * (front - ground))


TASKS: Mapping[str, Task] = {
    "digits": Task(DIGITS, _digits(_plain)),
    "rotated": Task(DIGITS, _digits(_rotated)),
    "textured": Task(DIGITS, _digits(_textured)),
    "mirrored": Task(PAIRS, _digits(_mirrored, lambda digit: digit // 2)),
    "parity": Task(("even", "odd"), _digits(_coloured, lambda digit: digit % 2)),
    "photographs": Task(
        ("cat", "coffee", "rocket", "temple", "flower"),
        _patches("chelsea.png", "coffee.png", "rocket.jpg", "china.jpg", "flower.jpg"),
    ),
    "textures": Task(
        ("brick", "gravel", "page", "coins", "cell", "moon"),
        _patches("brick.png", "gravel.png", "page.png", "coins.png", "cell.png", "moon.png"),
    ),
    "science": Task(
        ("galaxies", "tissue", "retina"),
        _patches("hubble_deep_field.jpg", "ihc.png", "retina.jpg"),
    ),
}  # fmt: skip


def _share(count: int, split: str) -> Array:
    """Which of `count` things belong to a split."""
    order = np.random.default_rng(count).permutation(count)
    ends = np.rint(np.cumsum([0, *SPLITS.values()]) * count).astype(int)
    at = list(SPLITS).index(split)
    return order[ends[at] : ends[at + 1]]


def _resized(values: Array) -> Array:
    """A square of ink or colours at 16 x 16: smoothed where it grows, averaged where it shrinks."""
    from PIL import Image

    how = Image.Resampling.BILINEAR if len(values) < SIZE else Image.Resampling.BOX
    return np.asarray(Image.fromarray(values).resize((SIZE, SIZE), how))


@cache
def _written() -> tuple[Array, Array]:
    """Ink [n, 8, 8], 0 to 1, of scikit-learn's digits, and which they are."""
    installed()
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target


@cache
def _tiles(file: str, split: str) -> tuple[Array, ...]:
    """The tiles [32, 32, 3] of a picture that are in a split, but for those that show nothing."""
    whole = _picture(file)
    rows, columns = whole.shape[0] // TILE, whole.shape[1] // TILE
    cut = whole[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE, 3)
    tiles = [t for t in cut.swapaxes(1, 2).reshape(-1, TILE, TILE, 3) if t.std() > FLAT]
    return tuple(tiles[i] for i in _share(len(tiles), split)[:LIMIT])


def _picture(file: str) -> Array:
    """The colours [height, width, 3] of a picture that one of the packages ships."""
    installed()
    import skimage
    import sklearn
    from PIL import Image

    parts = (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets/images",
    )
    found = [part / file for part in parts if (part / file).exists()]
    if not found:
        raise SourceError(f"neither scikit-image nor scikit-learn ships {file}", hint=HINT)
    with Image.open(found[0]) as image:
        colours = image.convert("RGB")
        return np.asarray(colours.reduce(2) if max(colours.size) > LARGE else colours)


PACKAGES = {
    "sklearn": "scikit-learn", "skimage": "scikit-image", "PIL": "pillow",
    "datasets": "datasets", "transformers": "transformers",
}  # fmt: skip


def installed() -> None:
    """SourceError where a package that the zoo needs is not there."""
    missing = [package for module, package in PACKAGES.items() if not find_spec(module)]
    if missing:
        raise SourceError(f"the demo needs {', '.join(missing)}, not installed", hint=HINT)
