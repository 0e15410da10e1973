"""`mowmerge eval` and `merge --eval` from the command line, on a merge of two tiny experts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.evals.test_evaluator import COUNT, recipe
from tests.zoo import Ran, Zoo

__all__ = ["recipe"]


def test_eval_prints_a_table_and_writes_a_report(tmp_path: Path, recipe: Path) -> None:
    ran = Zoo(tmp_path).here("eval", "out", "--tasks", "recipe.yaml")
    assert ran.rc == 0, ran.err
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[0] == ["model", "pets", "sky", "mean", "normalised"]
    assert [line[0] for line in lines[2:5]] == ["base", "expert", "merged"]
    folder = tmp_path / "out-eval"
    told = json.loads((folder / "report.json").read_text())
    assert told["run"]["command"].startswith("mowmerge eval out --tasks")
    assert told["data"]["sky"]["metric"] == "macro_f1"
    assert all(score["interval"] for score in told["scores"])
    assert {t["kind"] for t in told["tests"] if t["task"] == "sky"} == {"bootstrap"}
    assert {t["kind"] for t in told["tests"] if t["task"] == "pets"} == {"mcnemar"}
    assert told["failures"] == []
    assert told["merge"]["method"] == "task_arithmetic"
    items = json.loads((folder / "items.json").read_text())["tasks"]["pets"]["rows"]
    assert [len(row["predicted"]) for row in items.values()] == [COUNT] * 3
    for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def test_json_is_the_report_and_nothing_else(tmp_path: Path, recipe: Path) -> None:
    ran = Zoo(tmp_path).here("eval", "out", "--against", "", "--json", "--report", "there")
    assert ran.rc == 0, ran.err
    assert json.loads(ran.out) == json.loads((tmp_path / "there" / "report.json").read_text())


def test_a_rival_that_is_not_there_is_a_message(tmp_path: Path, recipe: Path) -> None:
    ran = Zoo(tmp_path).here("eval", "out", "--against", "x")
    assert ran.rc == 5
    assert "no folder or file 'x'" in ran.err


def test_a_threshold_sets_the_exit_code_after_the_report(tmp_path: Path, recipe: Path) -> None:
    def run(*asked: str) -> Ran:
        words = [word for each in asked for word in ("--fail-under", each)]
        return Zoo(tmp_path).here("eval", "out", "--tasks", "recipe.yaml", *words)

    ran = run("avg=0", "avg=1.01", "pets=1.01")
    assert ran.rc == 7
    assert ran.err.count("below 1.01") == 2
    assert (tmp_path / "out-eval" / "report.json").exists()
    assert run("avg=0").rc == 0
    (tmp_path / "out-eval" / "report.json").unlink()
    ran = run("avg_normalised=0.9")
    assert ran.rc == 3
    assert "did you mean 'avg_normalized'?" in ran.err
    assert not (tmp_path / "out-eval" / "report.json").exists()  # nothing was scored
    assert run("avg").rc == 2
    assert run("avg=nan").rc == 2  # nothing is below it


def test_two_reports_are_compared(tmp_path: Path, recipe: Path) -> None:
    zoo = Zoo(tmp_path)
    for name, scale in (("one", "0.3"), ("two", "3.0")):
        parameters = f"parameters.scale={scale}"
        ran = zoo.here("merge", "recipe.yaml", name, "--set", parameters, "--eval", "--quiet")
        assert ran.rc == 0, ran.err
        assert ran.out == ""
    ran = zoo.here("eval", "--compare", "one-eval", "two-eval/report.json", "--json")
    assert ran.rc == 0, ran.err
    told = json.loads(ran.out)
    reports = [json.loads((tmp_path / f"{n}-eval/report.json").read_text()) for n in ("one", "two")]
    values = [{s["task"]: s["value"] for s in r["scores"] if s["row"] == "merged"} for r in reports]
    for change in told["changes"]:
        task = change["task"]
        assert (change["before"], change["after"]) == (values[0][task], values[1][task])
    assert [c["kind"] for c in told["changes"]] == ["mcnemar", "bootstrap"]
    assert set(told["differing"]) == {"weights of the subject"}
    ran = zoo.here("eval", "--compare", "one-eval", "one-eval")
    assert ran.rc == 0
    assert ran.out.count("noise") == 3
    assert "more than noise" not in ran.out
    assert zoo.here("eval", "--compare", "one-eval", "gone").rc == 5
    assert zoo.here("eval", "out", "--compare", "one-eval", "two-eval").rc == 2
    assert zoo.here("eval").rc == 2


def test_merge_and_eval_in_one_go(tmp_path: Path, recipe: Path) -> None:
    from huggingface_hub import ModelCard

    from mowmerge.checkpoint.verify import verify

    ran = Zoo(tmp_path).here("merge", "recipe.yaml", "new", "--eval", "--json")
    assert ran.rc == 0, ran.err
    told = json.loads(ran.out)
    assert told["path"].endswith("new")
    assert told["evaluation"]["subject"] == "merged"
    card = ModelCard.load(tmp_path / "new" / "README.md")
    results = card.data.eval_results
    assert results is not None
    values = {s["task"]: s["value"] for s in told["evaluation"]["scores"] if s["row"] == "merged"}
    assert {r.dataset_name: r.metric_value for r in results} == values
    assert "| pets | 70 | accuracy |" in card.text
    assert verify(tmp_path / "new").problems == ()
    assert {p.name for p in tmp_path.glob(".*partial")} == set()


def test_eval_without_tasks_is_refused_before_a_merge(tmp_path: Path, recipe: Path) -> None:
    content = json.loads(recipe.read_text())
    del content["tasks"]
    recipe.write_text(json.dumps(content))
    ran = Zoo(tmp_path).here("merge", "recipe.yaml", "new", "--eval")
    assert ran.rc == 3
    assert "has none" in ran.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["weights", "report"])
def test_a_card_is_not_told_of_other_weights(tmp_path: Path, recipe: Path, what: str) -> None:
    from mowmerge import api, scoring

    zoo = Zoo(tmp_path)
    assert zoo.here("eval", "out", "--tasks", "recipe.yaml").rc == 0
    assert scoring.results(tmp_path / "out") is not None
    if what == "report":
        (tmp_path / "out-eval" / "report.json").unlink()
    else:
        api.merge(recipe, tmp_path / "out", overrides=["parameters.scale=0.7"], force=True)
    assert scoring.results(tmp_path / "out") is None
