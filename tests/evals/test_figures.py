"""Figures worked by hand on two tasks of four items."""

from __future__ import annotations

import pytest

from mowmerge.evals import aggregates, figures, words
from mowmerge.evals.schema import ScorePart, Summary
from mowmerge.evals.score import Cost, Score


def score(row: str, task: str, items: str, **more: object) -> Score:
    """A row's accuracy from a string of 1 and 0, repeated often enough to be sure of."""
    held = [int(c) for c in items] * 25
    model, _, way = row.partition(", ")
    true = [1] * len(held)
    return Score(model, way, task, "accuracy", sum(held) / len(held), held, true, held, **more)  # type: ignore[arg-type]


SCORES = [
    score("base", "sky", "1000"), score("base", "sea", "1100"),
    score("expert", "sky", "1111"), score("expert", "sea", "1110"),
    score("merged", "sky", "1110"), score("merged", "sea", "1111"),
]  # fmt: skip


def parts(
    scores: list[Score], held_out: list[str] | None = None
) -> tuple[figures.Table, dict[tuple[str, str], ScorePart], dict[str, Summary]]:
    table = figures.tabled(scores, held_out or ())
    found = figures.scored(table, {}, {})
    rows = {s.row: s for s in aggregates.summaries(table, found)}
    return table, {(p.row, p.task): p for p in found}, rows


def test_a_task_is_measured_against_base_and_expert() -> None:
    _, found, _ = parts(SCORES)
    sky, sea = found["merged", "sky"], found["merged", "sea"]
    assert (sky.value, sky.normalised, sky.recovery) == (0.75, 0.75, pytest.approx(2 / 3))
    assert (sea.value, sea.normalised, sea.recovery) == (
        1.0,
        pytest.approx(4 / 3),
        pytest.approx(2.0),
    )
    assert sky.interval == pytest.approx((0.66, 0.83), abs=0.015)
    assert found["base", "sky"].recovery == 0.0
    assert found["expert", "sky"].recovery == 1.0


def test_the_mean_is_of_ratios_and_says_the_other_too() -> None:
    _, _, rows = parts(SCORES)
    merged = rows["merged"]
    assert merged.mean == pytest.approx(0.875)
    assert merged.normalised == pytest.approx((0.75 + 4 / 3) / 2)
    assert merged.ratio_of_means == pytest.approx(1.0)
    assert (merged.worst_task, merged.worst, merged.at_least_expert) == ("sky", 0.75, 1)
    assert merged.recovery == pytest.approx((2 / 3 + 2) / 2)
    assert merged.mean_interval is not None
    low, high = merged.mean_interval
    assert (high - low) / 2 == pytest.approx(1.96 * (0.75 * 0.25 / 100) ** 0.5 / 2, rel=0.1)
    expert = rows["expert"]
    assert (expert.normalised, expert.normalised_interval) == (1.0, (1.0, 1.0))


def test_a_mean_is_of_tasks_and_not_of_items() -> None:
    few = Score("merged", "", "sky", "accuracy", 0.0, [0], [1], [0])
    many = Score("merged", "", "sea", "accuracy", 1.0, [1] * 99, [1] * 99, [1] * 99)
    assert parts([few, many])[2]["merged"].mean == 0.5


def test_an_expert_near_nought_has_no_ratio() -> None:
    nothing = Score("expert", "", "sky", "matthews", 0.0, [1, 0] * 50, [1, 1, 0, 0] * 25)
    merged = Score("merged", "", "sky", "matthews", 1.0, [1, 0] * 50, [1, 0] * 50)
    _, found, rows = parts([nothing, merged])
    assert found["merged", "sky"].normalised is None
    assert "not told from 0" in found["merged", "sky"].absent["normalised"]
    assert rows["merged"].normalised is None
    assert "sky" in rows["merged"].absent["normalised"]
    assert rows["merged"].mean == 1.0


def test_recovery_needs_an_expert_that_is_better() -> None:
    _, found, rows = parts([score("base", "sky", "1110"), score("expert", "sky", "1110"),
                            score("merged", "sky", "1111")])  # fmt: skip
    assert found["merged", "sky"].recovery is None
    assert "2 SE" in found["merged", "sky"].absent["recovery"]
    assert (rows["merged"].recovery, rows["merged"].recovery_tasks) == (None, 0)


def test_a_row_that_lacks_a_task_has_no_mean() -> None:
    _, _, rows = parts([*SCORES, score("other", "sky", "1111")])
    assert rows["other"].mean is None
    assert rows["other"].absent["mean"] == "not scored on sea"


def test_lower_is_better_for_perplexity() -> None:
    def row(name: str, nll: float) -> Score:
        items = [nll - 0.1, nll + 0.1] * 50
        return Score(
            name, "", "text", "perplexity", 2.718281828459045**nll, (), (), items, [1, 1] * 50
        )

    _, found, _ = parts([row("base", 3.0), row("expert", 1.0), row("merged", 2.0)])
    merged = found["merged", "text"]
    assert merged.normalised == pytest.approx(2.718281828459045**-1)
    e, m, b = (2.718281828459045**x for x in (1, 2, 3))
    assert merged.recovery == pytest.approx((b - m) / (b - e))


def test_items_that_do_not_give_the_score_are_a_failure() -> None:
    table, found, _ = parts([Score("merged", "", "sky", "accuracy", 0.9, [1, 0], [1, 1], [1, 0])])
    assert found["merged", "sky"].interval is None
    assert table.failures == ["sky, merged: the items give 0.5, the score is 0.9: no interval"]


def test_tests_are_paired_and_adjusted_together() -> None:
    table, _, _ = parts(SCORES)
    tests = {(t.rival, t.task): t for t in aggregates.tests(table, "merged", ["base", "expert"])}
    against = tests["expert", "sky"]
    assert (against.kind, against.wins, against.losses) == ("mcnemar", 0, 25)
    assert against.p == pytest.approx(2 / 2**25)
    assert against.difference == -0.25
    assert against.interval == pytest.approx((-0.34, -0.17), abs=0.015)
    ordered = sorted(tests.values(), key=lambda t: t.p)
    assert ordered[0].p_holm == pytest.approx(4 * ordered[0].p)
    assert all(t.p_holm >= t.p for t in ordered)


def test_forgetting_is_signed_and_relative() -> None:
    held = [score("base", "old", "1110"), score("merged", "old", "1000")]
    table, _, rows = parts([*SCORES, *held], ["old"])
    assert table.held_out == ["old"]
    assert rows["merged"].tasks == 2
    found = {(f.row, f.on): f for f in aggregates.forgetting(table)}
    old = found["merged", aggregates.HELD_OUT]
    assert (old.signed, old.relative) == (-0.5, pytest.approx(-2 / 3))
    assert old.worse_than_base == ["old"]
    own = found["merged", aggregates.OWN]
    assert own.signed == pytest.approx(0.5)
    assert own.relative == pytest.approx((2 + 1) / 2)
    assert ("expert", aggregates.HELD_OUT) not in found


def test_the_router_is_judged_by_the_tasks_own_expert() -> None:
    routed = [score("mow", "sky", "1111", routed=[0] * 90 + [1] * 10),
              score("mow", "sea", "1111", routed=[1] * 70 + [0] * 30)]  # fmt: skip
    table = figures.tabled(routed)
    owner = {"sky": "a", "sea": "b"}
    (found,) = aggregates.routing(table, {"mow": ["a", "b"]}, owner)
    assert found.counts == {"sky": [90, 10], "sea": [30, 70]}
    assert found.accuracy == pytest.approx(0.8)
    shares = [p.routing_accuracy for p in figures.scored(table, {"mow": ["a", "b"]}, owner)]
    assert shares == [0.9, 0.7]


def test_costs_are_multiples_of_the_expert() -> None:
    expert = Cost("expert", 100, 400, 1000, 2.0, 10, 0.5, 5.0)
    merged = Cost("merged", 300, 800, 1500, 4.0, 10, 0.0, 2.5)
    _, found = aggregates.costs([expert, merged])
    assert found.ratios == {
        "parameters": 3.0,
        "bytes_on_disk": 2.0,
        "peak_bytes": 1.5,
        "throughput": 0.5,
    }
    assert aggregates.costs([merged])[0].ratios == {}


def test_scores_in_different_units_are_not_added() -> None:
    """Nats of one task and hits of another have no mean; two of a kind have."""
    rows = [
        Score(model, "", task, metric, value)
        for model, nats, hits in (("base", 4.0, 0.5), ("mow", 2.0, 0.75))
        for task, metric, value in (("a", "perplexity", nats), ("c", "accuracy", hits))
    ]
    (mixed,) = aggregates.forgetting(figures.tabled(rows, ["a", "c"]))
    assert mixed.signed is None and mixed.interval is None
    assert mixed.relative == pytest.approx(0.5)  # of the base's, which has no unit
    (alike,) = aggregates.forgetting(figures.tabled([rows[0], rows[2]], ["a"]))
    assert (alike.signed, alike.unit) == (2.0, "perplexity")
    assert words.gap(alike.signed, None, alike.unit) == ("+2", "")
    assert words.gap(0.25, (0.2, 0.3)) == ("+25.0", "+20.0 to +30.0")
    _, _, summaries = parts(rows)
    assert summaries["base"].mean is None
    assert "different units" in summaries["base"].absent["mean"]


def test_the_joint_row_speaks_before_the_task_given() -> None:
    scores = [score(row, "sky", "1111") for row in ("base", "mow, oracle", "mow, task given")]
    assert figures.headline(scores) == "mow, task given"
    assert figures.headline([*scores, score("mow", "sky", "1")]) == "mow"
    assert figures.headline([score("base", "sky", "1")]) is None


def test_a_score_that_is_no_number_is_left_out_and_named() -> None:
    broken = Score("merged", "", "sky", "perplexity", float("nan"), (), (), [1.0] * 4)
    table, found, rows = parts([score("base", "sky", "1100"), broken])
    assert table.failures == ["sky, merged: the score is nan: left out"]
    assert set(found) == {("base", "sky")}
    assert set(rows) == {"base"}
    endless = score("merged", "sky", "1111", nll=[float("inf")] * 100, extras={"x": float("nan")})
    _, found, _ = parts([endless])
    assert (found["merged", "sky"].nll, dict(found["merged", "sky"].extras)) == (None, {})
    assert "probability" in found["merged", "sky"].absent["nll"]


def test_a_small_gap_is_no_gap() -> None:
    few = [
        score("base", "sky", "1110"),
        score("expert", "sky", "1110"),
        score("merged", "sky", "1"),
    ]
    lucky = [1.0] * 2 + list(few[1].items[2:-2]) + [1.0] * 2
    expert = Score("expert", "", "sky", "accuracy", sum(lucky) / 100, [1] * 100, [1] * 100, lucky)
    assert expert.value - few[0].value == pytest.approx(0.01)  # SE 0.01: one item of a hundred
    _, found, _ = parts([few[0], expert, few[2]])
    assert found["merged", "sky"].recovery is None


def test_a_mean_of_what_is_partly_missing_is_missing() -> None:
    assert aggregates.mean([1.0, None]) is None
    assert aggregates.mean([]) is None
    assert aggregates.mean([1.0, 2.0]) == 1.5
