"""Intervals, tests and calibration: worked by hand, and against scipy and scikit-learn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics
from sklearn.calibration import calibration_curve

from mowmerge.evals import statistics as ours

ONES = np.ones(1)


def drawn(n: int, classes: int, seed: int = 0) -> tuple[ours.Array, ours.Array]:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, n)
    predicted = np.where(rng.random(n) < 0.7, true, rng.integers(0, classes, n))
    return predicted.astype(float), true.astype(float)


@pytest.mark.parametrize(
    ("statistic", "oracle"),
    [
        (ours.macro_f1, lambda p, t: metrics.f1_score(t, p, average="macro")),
        (ours.matthews, lambda p, t: metrics.matthews_corrcoef(t, p)),
        (ours.spearman, lambda p, t: stats.spearmanr(p, t).statistic),
        (ours.pearson, lambda p, t: stats.pearsonr(p, t).statistic),
    ],
)
def test_a_statistic_of_counts_is_that_of_the_repeated_items(
    statistic: ours.Statistic, oracle: Callable[[ours.Array, ours.Array], float]
) -> None:
    predicted, true = drawn(60, 4)
    counts = np.random.default_rng(1).multinomial(60, [1 / 60] * 60, size=5).astype(float)
    found = statistic(predicted, true, counts)
    for row, value in zip(counts.astype(int), found, strict=True):
        assert value == pytest.approx(oracle(predicted.repeat(row), true.repeat(row)), abs=1e-12)


def test_a_correlation_with_a_constant_is_nought() -> None:
    flat, true = np.zeros(4), np.array([0.0, 1.0, 0.0, 1.0])
    for statistic in (ours.matthews, ours.spearman, ours.pearson):
        assert statistic(flat, true, np.ones((1, 4))).tolist() == [0.0]


def test_the_interval_of_an_accuracy_is_that_of_the_binomial() -> None:
    right = np.array([1.0] * 80 + [0.0] * 20)
    values = ours.resample([(right, np.ones(100))], [ours.mean], 0)[0]
    assert values.shape == (10_000,)
    assert values.std() == pytest.approx(0.04, abs=0.001)  # sqrt(.8 .2 / 100)
    low, high = stats.binom.ppf([0.025, 0.975], 100, 0.8) / 100
    assert ours.interval(values) == pytest.approx((low, high), abs=0.0101)


def test_the_interval_of_a_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=300)  # every item is its own group
    found = ours.resample([(values, np.ones(300))], [ours.mean], 0)[0]
    oracle = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(5)
    )
    ours_, theirs = ours.interval(found), oracle.confidence_interval
    assert ours_ == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert found.std() == pytest.approx(oracle.standard_error, rel=0.03)


def test_weights_weigh() -> None:
    values, weights = np.array([1.0, 3.0]), np.array([3.0, 1.0])
    assert ours.mean(values, weights, np.array([[1.0, 1.0], [0.0, 2.0]])).tolist() == [1.5, 3.0]
    assert ours.perplexity(values, weights, np.ones((1, 2)))[0] == pytest.approx(np.exp(1.5))


@pytest.mark.parametrize("n", [8, 4000])  # one group an item, and few groups
def test_rows_share_their_draws(n: int) -> None:
    right = (np.arange(n) % 3 > 0).astype(float)
    one, two, opposite = ours.resample(
        [(right, np.ones(n)), (right, np.ones(n)), (1 - right, np.ones(n))], [ours.mean] * 3, 7
    )
    assert (one == two).all()
    assert np.allclose(one + opposite, 1.0)
    assert one.std() == pytest.approx(np.sqrt(right.var() / n), rel=0.05)


def test_a_seed_decides_and_blocks_do_not_change_the_statistics() -> None:
    predicted, true = drawn(500, 5)
    first = ours.resample([(predicted, true)], [ours.macro_f1], 1)
    assert (first == ours.resample([(predicted, true)], [ours.macro_f1], 1)).all()
    assert (first != ours.resample([(predicted, true)], [ours.macro_f1], 2)).any()


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(0, 0, 1.0), (5, 0, 2 / 32), (1, 8, 2 * 10 / 512), (4, 4, 1.0)]
)
def test_mcnemar_by_hand(wins: int, losses: int, p: float) -> None:
    first = [1] * wins + [0] * losses + [1, 0]
    second = [0] * wins + [1] * losses + [1, 0]
    assert ours.mcnemar(first, second) == (wins, losses, pytest.approx(p))


def test_mcnemar_is_the_sign_test() -> None:
    first, second = [1] * 1300 + [0] * 1200, [0] * 1300 + [1] * 1200
    oracle = stats.binomtest(1300, 2500, 0.5).pvalue
    assert ours.mcnemar(first, second)[2] == pytest.approx(oracle, rel=1e-9)


def test_bootstrap_p_is_near_that_of_a_t_test() -> None:
    d = np.random.default_rng(2).normal(0.12, 1.0, 400)
    values = ours.resample([(d, np.ones(400))], [ours.mean], 0)[0]
    assert ours.bootstrap_p(values) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.005)
    assert ours.bootstrap_p(np.zeros(100)) == 1.0
    assert ours.bootstrap_p(np.ones(9999)) == pytest.approx(2 / 10_000)


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm_by_hand(p: Sequence[float], adjusted: Sequence[float]) -> None:
    assert ours.holm(p) == pytest.approx(adjusted)


def test_calibration_by_hand() -> None:
    bins, ece = ours.calibration([0.9, 0.8, 0.3, 0.5], [1, 0, 0, 1], bins=2)
    assert [(b.low, b.high, b.n) for b in bins] == [(0.0, 0.5, 2), (0.5, 1.0, 2)]
    assert [b.accuracy for b in bins] == [0.5, 0.5]
    assert [b.confidence for b in bins] == pytest.approx([0.4, 0.85])
    assert ece == pytest.approx(0.5 * 0.1 + 0.5 * 0.35)


def test_bins_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(1000)
    right = (rng.random(1000) < confidence).astype(float)
    bins, _ = ours.calibration(confidence.tolist(), right.tolist())
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    assert [b.accuracy for b in bins] == pytest.approx(accuracy.tolist())
    assert [b.confidence for b in bins] == pytest.approx(mean.tolist())


def test_ten_models_on_five_thousand_items_take_a_second_or_so() -> None:
    columns = [drawn(5000, 10, seed) for seed in range(10)]
    began = time.process_time()
    ours.resample(
        [((p == t).astype(float), np.ones(5000)) for p, t in columns], [ours.mean] * 10, 0
    )
    assert time.process_time() - began < 15
