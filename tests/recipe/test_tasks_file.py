"""A file of tasks alone: the folder's models, the file's tasks, and the faults of a recipe."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from mowmerge.errors import RecipeError
from mowmerge.recipe import parse, tasks_file

TASK = "{expert: a, type: text-classification, data: {path: json}, splits: {eval: test}}"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A merged folder as far as its recipe goes, and the models that it names."""
    for name in ("base", "a", "b", "work/out"):
        (tmp_path / name).mkdir(parents=True)
    kept = {
        "base": "../../base", "models": {"a": {"source": "../../a", "weight": 0.5}, "b": "org/b"},
        "method": "linear", "heads": {"match": "classifier.*"},
        "tasks": {"old": {"expert": "a", "type": "lm-eval"}},
    }  # fmt: skip
    (tmp_path / "work/out/recipe.yaml").write_text(json.dumps(kept))
    return tmp_path / "work/out"


def written(out: Path, text: str) -> Path:
    file = out.parent.parent / "other" / "tasks.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def test_tasks_are_the_files_and_all_else_the_folders(out: Path) -> None:
    found = tasks_file.load(written(out, f"version: 1\ntasks:\n  new: {TASK}\n"), out)
    assert list(found.tasks) == ["new"] and found.tasks["new"].expert == "a"
    assert found.name == "recipe" and found.method == "linear" and found.heads is not None
    root = out.parent.parent
    assert found.base == str(root / "base")
    assert found.models["a"].source == str(root / "a")
    assert found.models["a"].parameters == {"weight": 0.5}
    assert found.models["b"].source == "org/b"
    assert found.folder == root / "other"  # where the data's paths start
    assert found.where("tasks", "new").endswith("tasks.yaml:3")
    assert parse.load(out / "recipe.yaml").tasks.keys() == {"old"}


def test_a_recipe_stays_a_recipe(out: Path) -> None:
    file = written(out, "models: {c: org/c}\nmethod: linear\n")
    assert list(tasks_file.load(file, out).models) == ["c"]
    with pytest.raises(RecipeError, match="'method' is missing"):
        tasks_file.load(written(out, f"models: {{c: org/c}}\ntasks: {{new: {TASK}}}\n"), out)


def test_a_fitted_merge_is_scored_on_tasks_without_a_router_split(out: Path) -> None:
    kept = json.loads((out / "recipe.yaml").read_text()) | {"method": "adamerging"}
    fit = {"type": "text-classification", "data": {"path": "json"}, "splits": {"router": "train"}}
    kept["tasks"] = {name: fit | {"expert": name} for name in "ab"}
    (out / "recipe.yaml").write_text(json.dumps(kept))
    found = tasks_file.load(written(out, f"tasks: {{new: {TASK}}}\n"), out)
    assert found.method == "adamerging" and list(found.tasks) == ["new"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("taks:\n  new: x\n", 1, "unknown key 'taks'.*did you mean 'tasks'"),
        (f"tasks:\n  new: {TASK.replace('expert: a', 'expert: aa')}\n", 2, "did you mean 'a'"),
        (f"tasks:\n  new: {TASK.replace('text-class', 'txt-class')}\n", 2,
         "did you mean 'text-classification'"),
        ("tasks:\n  new:\n    expert: a\n    type: lm-eval\n    metrc: acc\n", 5,
         "unknown key 'tasks.new.metrc'.*did you mean 'metric'"),
        ("tasks:\n  new: {type: generation}\n", 2, "'tasks.new.data' is missing"),
        (f"tasks: {{new: {TASK}}}\nheads: {{match: x}}\n", 2, "'heads' has no meaning"),
        (f"tasks:\n  new: {TASK[:-1]}, benchmark: org/x}}\n", 2, "must be org/dataset:task_id"),
        ("version: 1\n", None, "names no tasks"),
        ("tasks: [a]\n", 1, "must be a mapping"),
    ],
)  # fmt: skip
def test_its_faults_are_told_with_their_line(
    out: Path, text: str, line: int | None, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        tasks_file.load(written(out, text), out)
    said = str(caught.value)
    assert re.search(message, said, re.DOTALL), said
    assert line is None or f"tasks.yaml:{line}" in said, said


def test_what_cannot_be_read_or_has_no_models_is_said(out: Path, tmp_path: Path) -> None:
    file = written(out, f"tasks: {{new: {TASK}}}\n")
    with pytest.raises(RecipeError, match="no recipe that names models"):
        tasks_file.load(file, tmp_path / "base")
    with pytest.raises(
        RecipeError, match="(?s)there is no file.*did you mean 'tasks.yaml'"
    ) as caught:
        tasks_file.load(file.with_name("task.yaml"), out)
    assert "Traceback" not in str(caught.value)


def test_it_comes_by_stdin_too(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"tasks: {{new: {TASK}}}\n"))
    assert list(tasks_file.load("-", out).tasks) == ["new"]
