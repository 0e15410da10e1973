"""Two reports side by side, and thresholds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mowmerge.errors import RecipeError, ThresholdError
from mowmerge.evals import aggregates, figures, published, thresholds
from mowmerge.evals.compare import Comparison, compare
from mowmerge.evals.report import Items, read_items, write
from mowmerge.evals.schema import Report
from tests.evals.reporting import TASKS, evaluation, made


def reports(
    folder: Path, second: float
) -> tuple[Report, Report, tuple[Items | None, Items | None]]:
    found, items = [], []
    for name, skill in (("one", 0.9), ("two", second)):
        made_, text = made(folder, evaluation(folder / "merged", merged=skill))
        write(made_, text, folder / f"{name}-eval")
        found.append(made_)
        items.append(read_items(folder / f"{name}-eval", made_))
    return found[0], found[1], (items[0], items[1])


def by_task(found: Comparison) -> dict[str, object]:
    return {change.task: change for change in found.changes}


def test_the_same_evaluation_twice_has_not_changed(tmp_path: Path) -> None:
    first, second, items = reports(tmp_path, 0.9)
    found = compare(first, second, items)
    assert [c.difference for c in found.changes] == [0.0] * len(TASKS)
    assert [c.p for c in found.changes] == [1.0] * len(TASKS)
    assert found.mean is not None
    assert (found.mean.kind, found.mean.interval) == ("bootstrap", (0.0, 0.0))
    assert found.differing == {}
    assert found.notes == []


def test_the_same_items_are_tested_in_pairs(tmp_path: Path) -> None:
    first, second, items = reports(tmp_path, 0.5)
    found = compare(first, second, items)
    assert items[0] is not None
    for change in found.changes:
        assert change.kind == "mcnemar"
        assert change.p is not None
        assert change.p_holm is not None
        assert change.p_holm < 0.001
        assert change.interval is not None
        assert change.interval[0] < change.difference < change.interval[1] < 0
    scores = [s for skill, way in ((0.9, "before"), (0.5, "after"))
              for s in [next(s for s in evaluation(merged=skill).scores
                             if (s.row, s.task) == ("merged", "sky"))]]  # fmt: skip
    wins = sum(a > b for a, b in zip(scores[1].items, scores[0].items, strict=True))
    losses = sum(a < b for a, b in zip(scores[1].items, scores[0].items, strict=True))
    by = next(c for c in found.changes if c.task == "sky")
    from scipy.stats import binomtest

    assert by.p == pytest.approx(binomtest(wins, wins + losses).pvalue)
    own = [c.difference for c in found.changes if c.task != "old"]
    assert found.mean is not None
    assert found.mean.difference == pytest.approx(sum(own) / 2)
    assert found.mean.kind == "bootstrap"
    assert found.mean.interval is not None
    low, high = found.mean.interval
    assert low < found.mean.difference < high < 0


def test_other_items_are_not_paired_and_it_says_so(tmp_path: Path) -> None:
    first, second, items = reports(tmp_path, 0.5)
    data = {t: d.model_copy(update={"sha256": "0"}) for t, d in second.data.items()}
    other = second.model_copy(update={"data": data})
    found = compare(first, other, items)
    assert {c.kind for c in found.changes} == {"unpaired"}
    assert found.notes == [
        f"{t}: not the same items, so that the test is not paired" for t in TASKS
    ]
    assert found.differing["sky sha256"] == (first.data["sky"].sha256, "0")
    for change in found.changes:
        a, b = (next(s for s in r.scores if s.row == "merged" and s.task == change.task)
                for r in (first, second))  # fmt: skip
        assert a.interval is not None and b.interval is not None
        widths = [(high - low) / 2 for low, high in (a.interval, b.interval)]
        assert change.interval is not None
        low, high = change.interval
        assert (high - low) / 2 == pytest.approx((widths[0] ** 2 + widths[1] ** 2) ** 0.5)
    assert found.mean is not None
    assert found.mean.kind == "unpaired"


def test_items_that_are_gone_leave_the_interval(tmp_path: Path) -> None:
    first, second, _ = reports(tmp_path, 0.5)
    assert {c.kind for c in compare(first, second).changes} == {"unpaired"}


def test_settings_and_tasks_that_differ_are_named(tmp_path: Path) -> None:
    first, second, items = reports(tmp_path, 0.9)
    run = second.run.model_copy(update={"settings": {**second.run.settings, "batch": 8}})
    data = {t: d for t, d in second.data.items() if t != "sea"}
    found = compare(first, second.model_copy(update={"run": run, "data": data}), items)
    assert found.differing["batch"] == (64, 8)
    assert found.notes == ["the second report lacks sea"]
    assert [c.task for c in found.changes] == ["sky", "old"]
    assert found.mean is None


def test_thresholds_hold_or_say_what_is_below(tmp_path: Path) -> None:
    found, _ = made(tmp_path)
    summary = next(s for s in found.summary if s.row == "merged")
    assert summary.normalised is not None
    reached = {"avg_normalized": summary.normalised, "sky": 0.5, "sea.normalized": 0.5}
    thresholds.require(found, {**reached, "at_least_expert": 0})
    with pytest.raises(
        ThresholdError, match=r"avg_normalized of merged is 0\.\d+, below 1"
    ) as caught:
        thresholds.require(found, {"avg_normalized": 1.0, "sky": 1.0})
    assert len(caught.value.problems) == 2
    assert caught.value.exit_code == 7
    with pytest.raises(ThresholdError, match=r"old.normalized is absent: no expert was scored"):
        thresholds.require(found, {"old.normalized": 0.1})


def test_every_named_figure_can_be_had(tmp_path: Path) -> None:
    found, _ = made(tmp_path)
    thresholds.require(found, dict.fromkeys(thresholds.FIGURES, -1.0))


def test_a_figure_that_there_is_not_is_known_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match="did you mean 'avg_normalized'"):
        thresholds.check({"avg_normalised": 0.9}, ["sky"])
    thresholds.check({"sky": 1, "sky.normalized": 1}, ["sky"])


def test_a_card_is_told_of_the_subject(tmp_path: Path) -> None:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    found, _ = made(tmp_path)
    results = [EvalResult(**each) for each in published.figures(found)]
    (model,) = eval_results_to_model_index("merged", results)
    assert [r["dataset"]["name"] for r in model["results"]] == list(TASKS)
    values = [s.value for s in found.scores if s.row == "merged"]
    assert [r["metrics"][0]["value"] for r in model["results"]] == values
    lines = published.lines(found)
    assert lines[0].startswith("recipe keeps ")
    assert sum(line.startswith("| ") for line in lines) == 2 + len(TASKS)


def test_scores_of_the_hubs_benchmarks_are_what_it_reads(tmp_path: Path) -> None:
    from huggingface_hub import eval_result_entries_to_yaml, parse_eval_result_entries

    found, _ = made(tmp_path)
    assert published.benchmarks(found) == []
    commit = "5503434ddd753f426f4b38109466949a1217c2bb"
    told = {"benchmark": "org/sky:default", "source": json.dumps({"revision": commit})}
    data = {**found.data, "sky": found.data["sky"].model_copy(update=told)}
    held = published.benchmarks(found.model_copy(update={"data": data}))
    (entry,) = parse_eval_result_entries(held)
    (sky,) = [s for s in found.scores if (s.row, s.task) == ("merged", "sky")]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/sky", "default", sky.value)
    assert entry.dataset_revision == commit and entry.verify_token is None
    assert entry.notes == "accuracy on 120 items of test, by mowmerge eval"
    assert eval_result_entries_to_yaml([entry]) == held


def test_a_table_of_rivals_is_not_confused_by_the_order_of_scores() -> None:
    scores = list(evaluation().scores)
    one = aggregates.tests(figures.tabled(scores), "merged", ["base"])
    two = aggregates.tests(figures.tabled(scores[::-1]), "merged", ["base"])
    assert {t.task: t.p for t in one} == {t.task: t.p for t in two}
