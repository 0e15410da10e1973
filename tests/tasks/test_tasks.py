"""Tasks: their data, the splits that must not overlap, labels and metrics."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mowmerge.errors import MowmergeError, RecipeError, SourceError
from mowmerge.recipe import parse
from mowmerge.recipe.model import Recipe
from mowmerge.tasks.data import digest, load
from mowmerge.tasks.metrics import accuracy, macro_f1
from mowmerge.tasks.splits import load_apart

SPLITS = {"router": "train", "select": "validation", "eval": "test"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe(folder: Path, data: dict[str, Any], **more: Any) -> Recipe:
    task = {"expert": "a", "type": "text-classification", "data": data, "splits": SPLITS} | more
    content = {"version": 1, "models": {"a": "./a"}, "method": "linear", "tasks": {"t": task}}
    (folder / "r.yaml").write_text(json.dumps(content))
    return parse.load(folder / "r.yaml")


def texts(folder: Path, kind: str = "json", **splits: list[tuple[str, Any]]) -> dict[str, Any]:
    """Files of text and label, a split each; returns the data specification."""
    files = {}
    for split, rows in splits.items():
        file = folder / f"{split}.{kind}"
        if kind == "csv":
            file.write_text("text,label\n" + "".join(f"{t},{v}\n" for t, v in rows))
        else:
            file.write_text("".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in rows))
        files[split] = f"./{file.name}"
    return {"path": kind, "data_files": files}


def pictures(folder: Path) -> dict[str, Any]:
    """An imagefolder: 3 train and 2 test pictures of two classes."""
    chance = random.Random(0)
    for split, count in (("train", 3), ("test", 2)):
        for i in range(count):
            at = folder / "pics" / split / ("cat", "dog")[i % 2]
            at.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (4, 4), chance.randbytes(48)).save(at / f"{i}.png")
    return {"path": "imagefolder", "data_dir": "./pics"}


def numbered(n: int) -> list[tuple[str, Any]]:
    return [(f"text {i}", i % 3) for i in range(n)]


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_the_seed_decides_the_order_and_the_limit_cuts_it(tmp_path: Path, kind: str) -> None:
    data = texts(tmp_path, kind, train=numbered(20), test=[("x", 0)])
    orders = []
    for seed in (0, 0, 1):
        items = load(recipe(tmp_path, data, seed=seed, limit=12), "t", "router")
        assert len(items) == 12
        orders.append([items.input(i) for i in range(12)])
        labels = items.labels({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2})
        assert labels == [int(text.split()[1]) % 3 for text in orders[-1]]
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == 12


def test_labels_go_by_name_where_the_head_has_names(tmp_path: Path) -> None:
    made = recipe(tmp_path, pictures(tmp_path), type="image-classification")
    items = load(made, "t", "eval")
    assert items.input(0).size == (4, 4)
    assert sorted(items.labels({"dog": 0, "cat": 1})) == [0, 1]
    by_name = dict(zip(items.digests, items.labels({"dog": 0, "cat": 1}), strict=True))
    turned = dict(zip(items.digests, items.labels({"cat": 0, "dog": 1}), strict=True))
    assert all(turned[d] == 1 - label for d, label in by_name.items())
    with pytest.raises(RecipeError, match="the label 'cat', which the head does not know"):
        items.labels({"cow": 0, "dog": 1})


def test_words_as_labels(tmp_path: Path) -> None:
    data = texts(tmp_path, train=[("a", "good"), ("b", "bad")])
    items = load(recipe(tmp_path, data), "t", "router")
    found = {items.input(i): label for i, label in enumerate(items.labels({"bad": 0, "good": 1}))}
    assert found == {"a": 1, "b": 0}
    with pytest.raises(RecipeError, match="'good', which the head does not know"):
        items.labels({"bad": 0, "goood": 1})


def test_splits_that_share_a_text_are_refused(tmp_path: Path) -> None:
    data = texts(tmp_path, train=numbered(9), test=[("new", 0), ("text 3", 1), ("text 4", 0)])
    with pytest.raises(RecipeError, match=r"for router and eval share 2 sample\(s\)") as caught:
        load_apart(recipe(tmp_path, data), "t", ["router", "eval"])
    assert "r.yaml:1" in str(caught.value)
    apart = texts(tmp_path, train=numbered(9), test=[("new", 0)])
    loaded = load_apart(recipe(tmp_path, apart), "t", ["router", "eval"])
    assert {use: len(items) for use, items in loaded.items()} == {"router": 9, "eval": 1}


def test_a_picture_stored_in_another_format_is_the_same_picture(tmp_path: Path) -> None:
    made = recipe(tmp_path, pictures(tmp_path), type="image-classification")
    assert set(load_apart(made, "t", ["router", "eval"])) == {"router", "eval"}
    with Image.open(tmp_path / "pics/train/cat/0.png") as image:
        image.save(tmp_path / "pics/test/dog/copy.bmp")
    with pytest.raises(RecipeError, match=r"share 1 sample\(s\)"):
        load_apart(made, "t", ["router", "eval"])


def test_pictures_are_told_apart_by_colour_not_by_storage() -> None:
    red, green = (Image.new("RGB", (2, 2), colour) for colour in ("red", "green"))
    palettes = [image.convert("P", palette=Image.Palette.ADAPTIVE) for image in (red, green)]
    assert digest(red) == digest(palettes[0]) != digest(palettes[1]) == digest(green)
    deep = [Image.new("I;16", (1, 1), value) for value in (256, 257)]
    assert digest(deep[0]) != digest(deep[1])


def test_unlabelled_items_and_lists_of_labels_are_refused(tmp_path: Path) -> None:
    import datasets

    label = datasets.ClassLabel(names=["bad", "good"])
    made = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, -1]},
        features=datasets.Features({"text": datasets.Value("string"), "label": label}),
    )
    made.to_parquet(tmp_path / "test-0.parquet")
    data = {"path": "parquet", "data_files": {"test": "test-*.parquet"}}
    items = load(recipe(tmp_path, data), "t", "eval")
    with pytest.raises(RecipeError, match="the label -1, which the head does not know"):
        items.labels({"bad": 0, "good": 1})
    both = load(recipe(tmp_path, texts(tmp_path, train=[("a", [0, 1])])), "t", "router")
    with pytest.raises(RecipeError, match=r"the label \[0, 1\], which"):
        both.labels({"bad": 0, "good": 1})


def test_a_picture_that_does_not_decode_is_named(tmp_path: Path) -> None:
    data = pictures(tmp_path)
    file = tmp_path / "pics/test/cat/0.png"
    file.write_bytes(file.read_bytes()[:40])
    items = load(recipe(tmp_path, data, type="image-classification"), "t", "eval")
    with pytest.raises(SourceError, match=r"item \d of 'test' in task 't' does not decode"):
        _ = items.digests


@pytest.mark.parametrize(
    ("data", "more", "use", "message"),
    [
        ({"path": "json", "data_files": "./none.json"}, {}, "eval", "cannot be loaded"),
        ({"path": "imagefolder", "data_dir": "./none"}, {}, "eval", "cannot be loaded"),
        ({"data_files": "./none.json"}, {}, "eval", "has no path"),
        ({"path": 3, "data_files": "./none.json"}, {}, "eval", "has no path that is text"),
        ({"path": "json", "data_files": "./a**b.json"}, {}, "eval", "cannot be loaded"),
        (None, {"splits": {"eval": "tests"}}, "eval", "(?s)no split 'tests'.*did you mean 'test'"),
        (None, {"splits": {"eval": "test"}}, "router", "no split for router"),
        (None, {"columns": {"input": "txt"}}, "eval", "(?s)no column 'txt'.*did you mean 'text'"),
        (None, {"columns": {"label": "class"}}, "eval", "no column 'class'"),
        ({"path": "csv", "data_files": {"test": "./header.csv"}}, {}, "eval", "no data"),
    ],
)
def test_bad_data_is_named(
    tmp_path: Path, data: Any, more: dict[str, Any], use: str, message: str
) -> None:
    rows: dict[str, Any] = {"train": numbered(3), "test": [("x", 0)]}
    texts(tmp_path, "csv", header=[])
    if data is None:
        data = texts(tmp_path, "csv", **rows)
    with pytest.raises(MowmergeError, match=message) as caught:
        load(recipe(tmp_path, data, **more), "t", use)
    assert "r.yaml:1" in str(caught.value)


def test_metrics_by_hand() -> None:
    predicted, true = [0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 2, 3]
    assert accuracy(predicted, true) == pytest.approx(3 / 6)
    # F1: class 0: 2/(2+2), 1: 2/(1+2), 2: 2/(3+1), 3: 0
    assert macro_f1(predicted, true) == pytest.approx((1 / 2 + 2 / 3 + 1 / 2 + 0) / 4)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_macro_f1_from_precision_and_recall(pairs: list[tuple[int, int]]) -> None:
    predicted, true = zip(*pairs, strict=True)
    scores = []
    for c in set(predicted) | set(true):
        hits = sum(p == t == c for p, t in pairs)
        precision = hits / predicted.count(c) if c in predicted else 0.0
        recall = hits / true.count(c) if c in true else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert macro_f1(predicted, true) == pytest.approx(sum(scores) / len(scores))
    assert macro_f1(true, true) == accuracy(true, true) == 1
