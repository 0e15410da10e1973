"""drm: merged in a shared basis; by hand, where it is the mean, and turned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import Zoo

from mowmerge import planner
from mowmerge.methods.static.drm import _coordinates, _least, drm
from mowmerge.plan import RUN


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    # [D1 D2] has orthogonal rows, so that the basis is that of the outputs
    deltas = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[-5.0, 12.0], [24.0, 10.0]]])
    # rows of length 1: (3, 4)/5, 0 and (-5, 12)/13, (12, 5)/13. Of eight six and one more: all
    # the sums (-2, 16), (24, 10): -5 stands alone, 4 and 12 have the mean 8
    out = drm(deltas, density=0.75)
    assert torch.allclose(out, torch.tensor([[-5.0, 8.0], [24.0, 10.0]]), atol=1e-5)
    # three and one more: 12/13 twice, 4/5 and 3/5
    out = drm(deltas, density=0.375)
    assert torch.allclose(out, torch.tensor([[3.0, 8.0], [24.0, 0.0]]), atol=1e-5)
    plain = drm(deltas, density=0.75, elect=False, weight=[2.0, 1.0], scale=0.5)
    assert torch.allclose(plain, torch.tensor([[0.25, 5.0], [12.0, 5.0]]), atol=1e-5)
    every = drm(deltas, density=0.75, mean="all")
    assert torch.allclose(every, torch.tensor([[-2.5, 8.0], [12.0, 5.0]]), atol=1e-5)


def test_the_share_kept_is_of_all_rows_together() -> None:
    rows = torch.tensor([[[0.9, 0.1, -0.4]], [[0.5, -0.5, 0.3]]])
    # at index 6 - 3 = 3 of the ascending .1 .3 .4 .5 .5 .9, less one: .4
    assert _least(rows, 0.5) == pytest.approx(0.4)
    assert _least(rows, 1.0) == 0.0
    assert _least(rows, 0.0) == pytest.approx(0.9)  # one above nominal


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_without_trim_and_election_it_is_the_mean(direction: str) -> None:
    deltas = normal(3, 6, 4)
    given = {"density": 1.0, "tol": 0.0, "elect": False, "mean": "all", "direction": direction}
    assert torch.allclose(drm(deltas, **given), deltas.mean(0))
    weighed = drm(deltas, weight=[1.0, 2.0, -3.0], **given)
    assert torch.allclose(weighed, (deltas[0] + 2 * deltas[1] - 3 * deltas[2]) / 3)


def test_equal_task_vectors() -> None:
    one = normal(1, 5, 6)
    equal = one.expand(3, -1, -1).contiguous()
    assert torch.allclose(drm(equal, density=1.0, tol=0.0), one[0])
    assert torch.allclose(drm(one, density=1.0, tol=0.0), one[0])


def test_turned_outputs_and_transposes() -> None:
    deltas = normal(2, 5, 7)
    turn = torch.linalg.qr(normal(5, 5, seed=1)).Q
    assert torch.allclose(drm(turn @ deltas), turn @ drm(deltas))
    vertical = drm(deltas.mT.contiguous(), direction="vertical")
    assert torch.allclose(vertical, drm(deltas).T)


def test_small_directions_are_dropped() -> None:
    deltas = torch.diag(torch.tensor([10.0, 1.0, 0.05]))[None].repeat(2, 1, 1)
    kept = drm(deltas, density=1.0)
    assert torch.allclose(kept, torch.diag(torch.tensor([10.0, 1.0, 0.0])), atol=1e-5)


def test_a_model_without_a_share() -> None:
    deltas = torch.cat([normal(2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.float64)])
    out = drm(deltas, density=1.0, tol=0.0)
    assert torch.isfinite(out).all()
    assert torch.allclose(out, drm(deltas[:2], density=1.0, tol=0.0))
    assert not drm(torch.zeros(2, 3, 3)).any()


def test_what_is_no_matrix_is_elected_as_it_is() -> None:
    deltas = torch.tensor([[1.0, -2.0, 0.0], [3.0, 1.0, 0.0]])
    assert drm(deltas).tolist() == [2.0, -2.0, 0.0]
    # an even vote goes to the sign that most entries have, and to none where that is even too
    assert drm(torch.tensor([[1.0, -2.0], [-1.0, -2.0]])).tolist() == [-1.0, -2.0]
    assert drm(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 2.0, -4.0]])).tolist() == [0.0, 2.0, -4.0]


def test_an_even_vote_is_the_whole_tensors_however_it_is_cut(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 * RUN + 5
    moved = torch.ones(size)
    moved[: RUN + 7] = -1.0  # less than half of all, and all of the first block
    even = torch.zeros(size)
    even[:9], even[-9:] = 2.0, 2.0
    moved *= even == 0
    zoo.save("base", {"a": torch.zeros(size), "b": torch.zeros(2)})
    zoo.save("a", {"a": moved + even, "b": torch.tensor([1.0, 0.0])})
    zoo.save("b", {"a": moved - even, "b": torch.tensor([-1.0, -3.0])})
    monkeypatch.setattr(planner, "BLOCK", RUN)
    found, _ = zoo.merge({"method": "drm"}, workers=2)
    assert torch.equal(found["a"], moved + even)
    assert found["b"].tolist() == [-1.0, -3.0]


def test_embeddings_and_heads_are_no_matrices(zoo: Zoo) -> None:
    models = zoo.family({"model.embed_tokens.weight": (9, 6), "a.weight": (6, 6)})
    names = models["base"]
    for table in (False, True):
        found, _ = zoo.merge({"method": "drm", "parameters": {"vocabulary": table}}, f"out{table}")
        for name, base in names.items():
            deltas = torch.stack([models[e][name] - base for e in "abc"])
            flat = "embed" in name and not table
            merged = drm(deltas.flatten(1) if flat else deltas).view_as(base)
            assert torch.allclose(found[name], base + merged, atol=1e-6), (name, table)


def test_a_share_that_is_rounding_is_none() -> None:
    draws = torch.Generator().manual_seed(0)

    def orthonormal(rank: int) -> Tensor:
        return torch.linalg.qr(torch.randn(768, rank, generator=draws).double()).Q

    left, sizes = orthonormal(8), torch.logspace(0, -1.9, 8, dtype=torch.float64)
    deltas = torch.stack([
        (left[:, i::2] * sizes[i::2]) @ orthonormal(4).T for i in range(2)
    ]).float()  # fmt: skip
    _, rows, lengths = _coordinates(deltas, 0.01)
    assert ((lengths > 0).sum(1) == 4).all()
    assert torch.equal(rows.norm(dim=-1, keepdim=True) > 0.5, lengths > 0)


def test_a_model_of_no_weight_is_not_counted() -> None:
    deltas, given = normal(3, 6, 5), {"density": 1.0, "elect": False, "tol": 0.0}
    weighed = drm(deltas, weight=[1.0, 0.0, 1.0], **given)
    assert torch.allclose(weighed, (deltas[0] + deltas[2]) / 2, atol=1e-5)
    assert not drm(deltas, weight=0.0, **given).any()
