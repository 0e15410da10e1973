"""widen: columns weighed by rank; by hand, with one model, and where nothing moved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from zoo import Zoo

from mowmerge import planner
from mowmerge.methods.static.widen import widen
from mowmerge.plan import RUN


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def soft(one: float, other: float) -> float:
    return math.exp(one) / (math.exp(one) + math.exp(other))


def test_by_hand() -> None:
    base = torch.eye(2)
    # model 1 lengthens column 0 by 2 and turns column 1 by 45 degrees, lengthening it by .41;
    # model 2 lengthens column 1 by 1 and leaves column 0: its ranks are 0 and 1/2 in both
    models = torch.tensor([[[3.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]])
    # lengths: model 1 ranks (1/2, 0), model 2 (0, 1/2); both beat their mean 1/4 where 1/2
    # directions: model 1 (0, 1/2); model 2 has not turned and ranks by index: (0, 1/2)
    first = [(1.0 + soft(0.0, 0.0)) / 2, (soft(0.0, 0.5) + 1.0) / 2]
    second = [(soft(0.0, 0.5) + soft(0.0, 0.0)) / 2, 1.0]
    want = [[1 + first[0] * 2, first[1]], [0.0, 1 + second[1] * 1.0]]
    out = widen(models, base)
    assert out.flatten().tolist() == pytest.approx([x for row in want for x in row])
    # another score for what beats the mean, and no such thing at all
    assert widen(models, base, calibration=3.0)[1, 1].item() == pytest.approx(1 + 3.0)
    mixed = widen(models, base, above=2.0)[0, 0].item()
    assert mixed == pytest.approx(1 + 2 * (soft(0.5, 0.0) + soft(0.0, 0.0)) / 2)


def test_a_vector_by_hand() -> None:
    base = torch.zeros(2)
    models = torch.tensor([[1.0, 3.0], [4.0, 2.0]])
    # sizes (1, 3) about 2 and (4, 2) about 3: the 3 and the 4 count in full
    want = [soft(1, 4) + 4.0, 3.0 + 2 * soft(2, 3)]
    assert widen(models, base).tolist() == pytest.approx(want)


def test_a_single_model_is_itself() -> None:
    models, base = normal(1, 5, 6), normal(5, 6, seed=1)
    assert torch.allclose(widen(models, base), models[0], atol=1e-6)
    assert torch.allclose(widen(models[:, 0], base[0]), models[0, 0], atol=1e-6)


def test_without_importance_the_weights_of_a_column_sum_to_one() -> None:
    one, base = normal(5, 6), normal(5, 6, seed=1)
    equal = one.expand(3, -1, -1).contiguous()
    assert torch.allclose(widen(equal, base, above=2.0), one, atol=1e-6)
    # every model's upper half counts in full: three times the change there
    far = widen(equal, base) - base
    ratio = (far / (one - base)).mean(0)
    assert ratio.min() == pytest.approx(1.0, abs=1e-4)
    assert ratio.max() == pytest.approx(3.0, abs=1e-4)


def test_scaling_everything_changes_no_weight() -> None:
    models, base = normal(3, 7, 9), normal(7, 9, seed=1)
    assert torch.allclose(widen(8 * models, 8 * base), 8 * widen(models, base))


def test_columns_of_zeros() -> None:
    models, base = normal(2, 4, 5), normal(4, 5, seed=1)
    models[:, :, 2], base[:, 2] = 0.0, 0.0  # zero in all
    models[0, :, 3] = 0.0  # only in one
    out = widen(models, base)
    assert torch.isfinite(out).all()
    assert not out[:, 2].any()
    assert torch.equal(widen(base.expand(2, 4, 5).contiguous(), base), base)


def test_an_embedding_has_a_column_for_each_token(zoo: Zoo) -> None:
    models, base = normal(3, 20, 6), normal(20, 6, seed=1)
    out = widen(models, base, role="embedding", above=1.2)
    assert torch.allclose(out, widen(models.mT, base.T, above=1.2).T)
    assert not torch.allclose(out, widen(models, base, above=1.2), atol=1e-3)
    place = widen(models[:, :, None], base[:, None], role="embedding")  # no table: as a kernel
    assert torch.allclose(place, widen(models[:, :, None], base[:, None]))
    family = zoo.family("llama", 2)
    found, _ = zoo.merge({"method": "widen"})
    for name, turned in (("model.embed_tokens.weight", True), ("lm_head.weight", False)):
        models = torch.stack([family[m][name] for m in "ab"])
        base = family["base"][name]
        want = widen(models.mT, base.T).T if turned else widen(models, base)
        assert torch.allclose(found[name], want, atol=1e-6)


def test_tokens_that_moved_alike_rank_in_order() -> None:
    base = torch.ones(4, 2)
    models = torch.stack([base, base + torch.tensor([[3.0], [2.0], [1.0], [0.0]])])
    # model 1 changes nothing, and nothing turns: ranks 0, 1/4, 1/2 and 3/4; model 2's lengths have
    # 3/4, 1/2, 1/4 and 0; the mean is 3/8
    lengths = [1.0, 1.0, soft(0.25, 0.5), soft(0, 0.75)]
    turns = [soft(0, 0), soft(0.25, 0.25), 1.0, 1.0]
    want = [k * (s + t) / 2 for k, s, t in zip((3, 2, 1, 0), lengths, turns, strict=True)]
    moved = widen(models, base, role="embedding") - base
    assert moved[:, 0].tolist() == pytest.approx(want)


def test_the_middle_of_an_odd_number_of_columns_does_not_beat_the_mean() -> None:
    for columns in (3, 7, 13, 49):  # its rank is the mean, whatever that rounds to
        models, base = torch.arange(1.0, columns + 1)[None, None], torch.zeros(1, columns)
        counted = widen(models, base, calibration=0.0)[0] == models[0, 0]
        # all turned alike, and rank in order: the lower half and the middle keep their change
        assert counted.tolist() == [k <= columns // 2 for k in range(columns)]


def test_a_kernel_has_a_column_for_each_input_and_place() -> None:
    models, base = normal(2, 4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    flat = widen(models.flatten(2), base.flatten(1))
    assert torch.allclose(widen(models, base).flatten(1), flat)


def test_tokens_rank_over_the_whole_table_however_it_is_cut(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.family({"model.embed_tokens.weight": (3000, 70)}, 3)
    whole, _ = zoo.merge({"method": "widen"}, "whole", workers=1)
    monkeypatch.setattr(planner, "BLOCK", RUN)
    cut, _ = zoo.merge({"method": "widen"}, "cut", workers=2)
    assert torch.equal(*(found["model.embed_tokens.weight"] for found in (whole, cut)))


def test_columns_and_tokens_in_another_order() -> None:
    models, base = normal(3, 7, 9), normal(7, 9, seed=1)
    columns, tokens = torch.randperm(9), torch.randperm(7)
    moved = widen(models[:, :, columns], base[:, columns])
    assert torch.allclose(moved, widen(models, base)[:, columns])
    moved = widen(models[:, tokens], base[tokens], role="embedding")
    assert torch.allclose(moved, widen(models, base, role="embedding")[tokens])
