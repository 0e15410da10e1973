"""A task's samples: any data that `datasets` loads, one split, in an order that a seed decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mowmerge.errors import RecipeError, SourceError, did_you_mean
from mowmerge.recipe.model import Recipe
from mowmerge.recipe.task_types import TYPES


@dataclass(frozen=True)
class Items:
    """The samples of one split of a task, and the columns that hold input, label and the rest."""

    task: str
    split: str
    where: str
    data: Any
    columns: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.data)

    def input(self, i: int) -> Any:
        """Sample i's text, pair of texts or decoded picture; SourceError where it has none."""
        try:
            row = self.data[i]
            value = row[self.columns["input"]]
            if not isinstance(value, str):
                value.load()
        except Exception as error:  # the decoders' own types are many
            raise SourceError(
                f"item {i} of '{self.split}' in task '{self.task}' does not decode: {error}",
                where=self.where,
                hint="mend or remove the file",
            ) from error
        return (value, row[self.columns["pair"]]) if "pair" in self.columns else value

    def column(self, what: str) -> list[Any]:
        """What every sample has in a column: label, choices, ...; RecipeError without one."""
        if what not in self.columns:
            raise RecipeError(f"task '{self.task}' has no {what}s", where=self.where)
        values: list[Any] = self.data[self.columns[what]][:]
        return values

    @property
    def names(self) -> Sequence[str] | None:
        """What a ClassLabel column calls its classes."""
        found: Sequence[str] | None = getattr(
            self.data.features[self.columns["label"]], "names", None
        )
        return found

    @cached_property
    def digests(self) -> Sequence[str]:
        """The digest of each item's input, in order."""
        return [digest(self.input(i)) for i in range(len(self))]

    def labels(self, classes: Mapping[str, int]) -> list[float]:
        """The class number of each sample in a head's label map (`label2id`).

        Names are looked up in the map, those of a ClassLabel column too. Plain numbers, and a map
        that names none (LABEL_0, LABEL_1, ...), are taken as class numbers. With one class only
        it is a regression: the labels are numbers, and stay.

        Raises:
            RecipeError: a label outside the map, or a task that has no labels.
        """
        values = self.column("label")
        if len(classes) == 1 and all(isinstance(value, int | float) for value in values):
            return [float(value) for value in values]
        names = self.names
        unnamed = all(name == f"LABEL_{i}" for name, i in classes.items())
        found = []
        for value in values:
            name = value
            if names and not unnamed and value in range(len(names)):
                name = names[value]
            number = classes.get(name, -1) if isinstance(name, str) else name
            if number not in classes.values():
                raise RecipeError(
                    f"task '{self.task}' has the label {name!r}, which the head does not know",
                    where=self.where,
                    hint=did_you_mean(str(name), list(classes)),
                )
            found.append(number)
        return found


def digest(value: Any) -> str:
    """The sha256 of a text, or of an image's size and colours: how it is stored does not matter."""
    if isinstance(value, tuple):
        value = "\0".join(value)
    if isinstance(value, str):
        return sha256(value.encode()).hexdigest()
    if value.mode not in ("I", "F", "I;16"):  # these hold more than a byte a channel
        value = value.convert("RGBA")
    shape = f"{value.mode} {value.width} {value.height} ".encode()
    return sha256(shape + value.tobytes()).hexdigest()


def load(recipe: Recipe, task: str, use: str, *, labelled: bool = True) -> Items:
    """The items of a task for `use`: router, select or eval; in seeded order, limited.

    Where they need not be `labelled`, no column of labels is asked for.

    Raises:
        RecipeError: no such split or column.
        SourceError: `datasets` is not installed, or there is no data.
    """
    asked = recipe.tasks[task]
    where = recipe.where("tasks", task, "splits", use)
    split = getattr(asked.splits, use)
    if split is None:
        raise RecipeError(
            f"task '{task}' has no split for {use}",
            where=where,
            hint=f"name one: splits: {{{use}: ...}}",
        )
    splits = _load(recipe, task)
    if split not in splits:
        raise RecipeError(
            f"the data of task '{task}' has no split '{split}'",
            where=where,
            hint=did_you_mean(split, list(splits)),
        )
    data = splits[split]
    columns = {**TYPES[asked.type].columns, **asked.columns}
    columns = {k: v for k, v in columns.items() if v and (labelled or k in ("input", "pair"))}
    for name in columns.values():
        if name not in data.column_names:
            raise RecipeError(
                f"the data of task '{task}' has no column '{name}'",
                where=recipe.where("tasks", task, "columns"),
                hint=did_you_mean(name, data.column_names),
            )
    data = data.shuffle(seed=asked.seed, keep_in_memory=True)
    if asked.limit is not None:
        data = data.select(range(min(asked.limit, len(data))))
    return Items(task, split, where, data, columns)


def _load(recipe: Recipe, task: str) -> Mapping[str, Any]:
    """Every split of a task's data, by name."""
    where = recipe.where("tasks", task, "data")
    if not find_spec("datasets"):
        raise SourceError(
            "tasks need the package datasets, which is not installed",
            where=where,
            hint='pip install "mowmerge[tasks]"',
        )
    import datasets

    given = dict(recipe.tasks[task].data)
    if not isinstance(given.get("path"), str):
        raise RecipeError(
            f"the data of task '{task}' has no path that is text",
            where=where,
            hint="path: imagefolder, parquet, json, csv, text, or a Hub name",
        )
    if given["path"].startswith((".", "/")):
        given["path"] = recipe.locate(given["path"])
    try:
        for key in {"data_dir", "data_files"} & given.keys():
            given[key] = _located(recipe, given[key])
        with without_bars():
            loaded = datasets.load_dataset(**given)
    except Exception as error:  # missing files, no network, damaged files: each with its own type
        empty = isinstance(error, StopIteration) or "corresponds to no data" in str(error)
        what = "has an empty split" if empty else "cannot be loaded"
        why = "" if isinstance(error, StopIteration) else f": {str(error).strip() or repr(error)}"
        raise SourceError(
            f"the data of task '{task}' {what}{why}",
            where=where,
            hint="`data` takes the arguments of datasets.load_dataset; paths start at the recipe",
        ) from error
    if not isinstance(loaded, dict):
        raise RecipeError(
            f"the data of task '{task}' says which split, which is for `splits` to say",
            where=where,
            hint="remove `split` from `data`",
        )
    return loaded


def _located(recipe: Recipe, value: Any) -> Any:
    """Paths from the recipe's folder, or else from here."""
    if isinstance(value, Mapping):
        return {key: _located(recipe, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_located(recipe, inner) for inner in value]
    located = recipe.locate(str(value))
    if located == value and not Path(value).is_absolute() and any(recipe.folder.glob(value)):
        return str(recipe.folder / value)  # a pattern
    return located


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of datasets'."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
