"""tall_mask: an entry is an expert's where its own change outweighs the others'."""

from __future__ import annotations

import torch
from made import made
from zoo import Zoo

from mowmerge.dynamic import codecs
from mowmerge.methods.dynamic.tall_mask import tall_mask


def masks(parts: dict[str, torch.Tensor], n: int) -> list[list[bool]]:
    return [m[0].tolist() for m in codecs.unpack(parts["mask"], n)]


def test_by_hand() -> None:
    # the others' change beside |D_1| = 4 1 0 2 is 2 3 5 -4, times 0.5: 1 1.5 2.5 2, strictly
    deltas = torch.tensor([[4.0, 1.0, 0.0, 2.0], [2.0, 3.0, 5.0, -4.0]])
    parts = tall_mask(deltas, torch.zeros(4), threshold=0.5)
    assert parts["unified"].tolist() == [6.0, 4.0, 5.0, -2.0]
    assert masks(parts, 4) == [[True, False, False, False], [False, True, True, True]]
    assert parts["scale"].tolist() == [1.0, 1.0]
    each = tall_mask(deltas, torch.zeros(4), threshold=[0.1, 2.0])
    assert masks(each, 4) == [[True, True, False, True], [False, True, True, False]]


def test_disjoint_changes_come_back_exactly() -> None:
    deltas = torch.zeros(3, 9)
    for k in range(3):
        deltas[k, 3 * k : 3 * k + 3] = torch.tensor([1.0, -2.0, 0.5])
    parts = tall_mask(deltas, torch.zeros(9))
    for delta, mask in zip(deltas, masks(parts, 9), strict=True):
        assert torch.equal(parts["unified"] * torch.tensor(mask), delta)


def test_masks_are_nested_in_the_threshold() -> None:
    deltas = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    last = torch.ones(3, 500, dtype=torch.bool)
    for t in (0.0, 0.2, 0.4, 0.6, 100.0):
        now = torch.tensor(masks(tall_mask(deltas, torch.zeros(500), threshold=t), 500))
        assert (last | ~now).all()
        last = now
    assert int(last.sum()) < 30


def test_thresholds_by_model(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": "tall_mask", "parameters": {"threshold": {"a": 1e9, "b": 0}}})
    found = made(zoo.folder / "out")
    for name in found.codes:
        first, second = found.slots(name)
        assert not first.any()
        torch.testing.assert_close(
            second.float(), found.parts(found.codes[name])["unified"], rtol=1e-6, atol=0
        )


def test_the_ties_merge_of_task_vectors_that_stay_whole() -> None:
    # the two largest of each are 4 0 0 2 and 0 0 5 -4; the sign that weighs more: + + + -
    deltas = torch.tensor([[4.0, 1.0, 0.0, 2.0], [2.0, 3.0, 5.0, -4.0]])
    parts = tall_mask(deltas, torch.zeros(4), threshold=0.5, merge="ties", density=0.25)
    assert parts["unified"].tolist() == [4.0, 0.0, 5.0, -4.0]
    assert masks(parts, 4) == [[True, True, False, False], [True, True, True, True]]


def test_ties_trims_over_the_whole_model(zoo: Zoo) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (4, 8), "model.norm.weight": (8,)}
    models = zoo.family(shapes, 2)
    for expert in "ab":  # the norm's changes are the largest, and all that is kept
        models[expert]["model.norm.weight"] = models["base"]["model.norm.weight"] + 9
        zoo.save(expert, models[expert])
    zoo.merge({"method": "tall_mask", "parameters": {"merge": "ties", "density": 0.19}})
    found = made(zoo.folder / "out")
    norm, matrix = (found.parts(found.codes[name])["unified"] for name in reversed(shapes))
    assert not matrix.any()
    torch.testing.assert_close(norm.float(), torch.full((8,), 18.0))
