"""A small evaluation that was never run, with everything in it that a report can show."""

from __future__ import annotations

import json
import random
from pathlib import Path

from mowmerge.evals import report
from mowmerge.evals.schema import Report
from mowmerge.evals.score import Cost, Data, Evaluation, Gates, Model, Score
from mowmerge.recipe import parse

NASTY = "<script>alert('&')</script>"
TASKS = {"sky": "a", "sea": "b", "old": None}
SKILL = {"base": 0.6, "expert": 0.95, "merged": 0.9, NASTY: 0.7}
N = 120


def recipe_text() -> str:
    tasks = {
        task: {
            **({"expert": expert} if expert else {}),
            "type": "text-classification",
            "data": {"path": "json"},
            "splits": {"eval": "test"},
        }
        for task, expert in TASKS.items()
    }
    return json.dumps({"base": "./base", "models": {"a": "./a", "b": "./b"}, "method": "mow",
                       "tasks": tasks})  # fmt: skip


def score(row: str, task: str, skill: float, seed: str) -> Score:
    """A classifier of three classes that is right as often as its skill says."""
    rng = random.Random(f"{task} {seed}")
    true = [rng.randrange(3) for _ in range(N)]
    predicted = [t if rng.random() < skill else (t + 1) % 3 for t in true]
    items = [int(p == t) for p, t in zip(predicted, true, strict=True)]
    confidence = [rng.uniform(0.3, 1) for _ in range(N)]
    model, _, way = row.partition(", ")
    routed = [rng.randrange(2) for _ in range(N)] if row == "merged" and TASKS[task] else []
    return Score(model, way, task, "accuracy", sum(items) / N, predicted, true, items, (),
                 confidence, [0.5] * N, routed)  # fmt: skip


def evaluation(folder: Path | str = "./merged", **skill: float) -> Evaluation:
    """Base, expert, a dynamic merge run in three ways, and another whose name is markup."""
    rows = {**SKILL, **skill}
    rows |= {"merged, task given": rows["merged"], "merged, oracle": rows["expert"]}
    scores = [
        score(row, task, value, row)
        for row, value in rows.items()
        for task, expert in TASKS.items()
        if expert or row in ("base", "merged", NASTY)
    ]
    here = {"machine": "a processor, 2 cores", "device": "cpu", "threads": 1, "batch": 64}
    there = here | {"machine": "another"}
    costs = [
        Cost(row, 1000, 4000, 9000, 2.0, N, 0.001, 60.0, there if row == NASTY else here,
             row == "base")
        for row in rows
    ]  # fmt: skip
    crossed = [
        score(f"expert {expert}", task, skill, f"{expert} {task}")
        for expert, task, skill in (("a", "sea", 0.4), ("a", "old", 0.3), ("b", "sky", 0.65))
    ]
    blank = {"b": {"old": "its head does not know the label 'x'"}}
    gate = Gates([0.7, 0.3], [0.1, 0.1], 0.61)
    data = {task: Data("text-classification", "json", "test", N, f"{task:0<64}") for task in TASKS}
    models = {row: Model(f"./{row}", "", "0" * 64, "float32") for row in ("base", "expert a")}
    models["merged"] = Model(str(folder), "", "0" * 64, "float32")
    settings = {"batch": 64, "seed": 0, "device": "cpu", "versions": {"torch": "2.13.0"}}
    flags = {row: {"needs_task_id": ", " in row, "tuned_on": ["train"]} for row in rows}
    gates = {"merged": {t: {"0": gate, "encoder.1": gate} for t, e in TASKS.items() if e}}
    return Evaluation(
        scores, costs, gates, data, models, settings, flags, crossed, blank
    )  # fmt: skip


def tensor(name: str, cosine: float, action: str) -> dict[str, object]:
    """A line of a merge's report."""
    return {
        "name": name, "shape": [4, 4], "action": action, "method": "mow", "models": ["a", "b"],
        "codec": "full_abs", "delta_norms": [3.0, 4.0], "mean_cosine": cosine,
        "sign_conflict": 0.25, "kept_share": 1.0,
    }  # fmt: skip


def merged(folder: Path) -> Path:
    """What a report reads of a dynamic merge: its config and its own report."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "mowmerge", "mowmerge": {"experts": ["a", "b"]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    tensors = [
        tensor(f"encoder.layer.{i}.{role}", 0.1 * i, action)
        for i in range(3)
        for role, action in (("attention.query.weight", "merged"), ("mlp.up.weight", "dynamic"))
    ]
    tensors.append(tensor("embeddings.word", 0.5, "copied"))
    dissimilarity = {"mlp": {f"encoder.layer.{i}": 0.01 * (i + 1) for i in range(3)}}
    told = {
        "models": ["base", "a", "b"], "base": "base", "tensors": tensors, "seconds": 1.0,
        "planned_peak_bytes": 10, "read_bytes": 20, "written_bytes": 30, "warnings": [],
        "survey": {"dissimilarity": dissimilarity, "dynamic": {}},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(told))
    return folder


def made(folder: Path, found: Evaluation | None = None) -> tuple[Report, str]:
    """The report of that evaluation, and its items."""
    file = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe_text())
    out = merged(folder / "merged")
    return report.build(found or evaluation(out), parse.load(file), "mowmerge eval merged")
