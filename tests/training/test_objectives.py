"""Losses beside their formulas, the temperature, the order of samples."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from mowmerge.dynamic.format import Code, Gate, Manifest, Router
from mowmerge.errors import RecipeError
from mowmerge.training import classifier, objectives
from mowmerge.training.data import draw, parts
from mowmerge.training.settings import Options, settings


def test_entropy_is_that_of_the_distribution_and_finite_for_sure_ones() -> None:
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(objectives.entropy(logits), expected)
    sure = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    objectives.entropy(sure).sum().backward()
    assert objectives.entropy(sure).item() == 0.0
    assert sure.grad is not None and torch.isfinite(sure.grad).all()
    assert objectives.entropy(torch.zeros(1, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_divergence_is_kl_and_0_for_equals() -> None:
    t, s = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.kl_div(
        s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(objectives.divergence(t, s), expected)
    torch.testing.assert_close(objectives.divergence(t, t), torch.zeros(6))


def test_next_token_counts_what_is_to_be_said() -> None:
    logits = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    seen = objectives.prompt(mask)
    assert seen.long().tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]
    found = objectives.next_token(logits, ids, mask.bool() & ~seen)
    p = logits.log_softmax(-1)
    first = -sum(p[0, t - 1, ids[0, t]] for t in (3, 4, 5)) / 3
    torch.testing.assert_close(found, torch.stack([first, -p[1, 3, ids[1, 4]]]))


@pytest.mark.parametrize("true", [0.25, 1.0, 4.0])
def test_the_temperature_that_drew_the_labels_is_found(true: float) -> None:
    draw_ = torch.Generator().manual_seed(0)
    raw = 3 * torch.randn(20000, 4, generator=draw_)
    labels = torch.multinomial(torch.softmax(raw / true, 1), 1, generator=draw_).squeeze(1)
    assert objectives.temperature(raw, labels) == pytest.approx(true, rel=0.03)


def test_the_temperature_of_what_is_all_right_is_above_0() -> None:
    labels = torch.arange(3).repeat(10)
    found = objectives.temperature(5 * torch.eye(3)[labels], labels)
    p = torch.softmax(5 * torch.eye(3) / found, 1)[0, 0]
    assert found > 0 and float(p) == pytest.approx(1 - 2 / 3 / 32, abs=1e-3)


def test_every_sample_comes_once_an_epoch_and_the_seed_decides_when() -> None:
    taken = [draw(7, 3, step, 0, "t") for step in range(7)]
    flat = [i for some in taken for i in some]
    for epoch in range(3):
        assert sorted(flat[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert taken[3] == draw(7, 3, 3, 0, "t") != draw(7, 3, 3, 1, "t")
    assert Counter(len(some) for some in taken) == {3: 7}


def test_processes_and_parts_share_a_batch_without_rest() -> None:
    for world in (1, 2, 3):
        for count in (1, 2, 5):
            shares = [parts(range(7), rank, world, count) for rank in range(world)]
            assert sorted(i for rank in shares for part in rank for i in part) == list(range(7))
            assert all(len(rank) <= count for rank in shares)
    assert parts(range(1), 1, 2, 4) == []


def test_folding_leaves_the_linear_map() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 7 + 3
    mean, by = classifier.standard(x)
    linear = torch.nn.Linear(6, 3)
    expected = linear((x - mean) / by).detach()
    classifier.fold(linear, mean, by)
    torch.testing.assert_close(linear(x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_feature_that_hardly_moves_is_not_blown_up() -> None:
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1e-6
    _, by = classifier.standard(x)
    assert by[0] > 0.05
    assert (classifier.standard(torch.ones(4, 2))[1] > 0).all()


def manifest(router: Router, scope: str) -> Manifest:
    code = Code("x.weight", (2, 2), "full", 2, "0")
    return Manifest("m", ("a", "b"), (code,), {"0": Gate(scope, "0")}, {"0": router})


def test_defaults_are_those_of_objective_and_kind() -> None:
    linear, twin = Router("linear", 2, 2), Router("twin", 2, 2)
    found = settings(manifest(linear, "sample"), Options())
    assert (found.objective, found.steps, found.lr, found.factor(999)) == ("task", 1000, 1e-3, 1.0)
    found = settings(manifest(twin, "sample"), Options())
    assert (found.steps, found.lr, found.factor(1000)) == (2000, 1e-3, 0.5)
    found = settings(manifest(Router("mlp", 2, 2, objective="entropy"), "block"), Options())
    assert (found.steps, found.batch, found.lr) == (200, 16, 0.01)
    for width, lr in ((768, 1e-3), (4096, 1.875e-4)):
        wide = Router("mlp", width, 2, objective="distill")
        assert settings(manifest(wide, "block"), Options()).lr == pytest.approx(lr)
    assert found.factor(0) == 1.0 and found.factor(100) == pytest.approx(0.5)
    with pytest.raises(RecipeError, match="mean of each task's features"):
        settings(manifest(Router("centroid", 2, 2), "sample"), Options("entropy"))
    with pytest.raises(RecipeError, match="no objective 'nope'"):
        settings(manifest(linear, "sample"), Options("nope"))
