"""rank_one_moe: a slot a singular pair, task by task; biases constant."""

from __future__ import annotations

import torch
from made import made
from zoo import Zoo

from mowmerge.dynamic import codecs
from mowmerge.dynamic.format import Code
from mowmerge.methods.dynamic.rank_one_moe import rank_one_moe


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_at_full_rank_the_anchor_is_task_arithmetic_and_a_tasks_columns_its_expert() -> None:
    base, deltas = normal(5, 4), normal(3, 5, 4)
    code = Code("w", (5, 4), "low_rank", 12, "g", rank=1)
    parts = rank_one_moe(deltas, base, code, rank=4, scale=0.3)
    assert parts["slot"].tolist() == list(range(12))
    torch.testing.assert_close(parts["anchor"], base + 0.3 * deltas.sum(0))
    slots = [codecs.slot(code, parts, s, base) for s in range(12)]
    for k in range(3):
        torch.testing.assert_close(sum(slots[4 * k : 4 * k + 4]), deltas[k])
    sizes = [float(s.norm()) for s in slots[:4]]
    assert sizes == sorted(sizes, reverse=True)


def test_a_task_vector_of_zeros_has_zero_factors() -> None:
    deltas = normal(2, 5, 4)
    deltas[1] = 0
    code = Code("w", (5, 4), "low_rank", 4, "g", rank=1)
    parts = rank_one_moe(deltas, normal(5, 4), code, rank=2)
    assert not parts["u"][:, 2:].any()
    assert not parts["v"][2:].any()


def test_coefficients_and_biases(zoo: Zoo) -> None:
    zoo.family("bert", 3)
    static, _ = zoo.merge({"method": "task_arithmetic", "parameters": {"scale": 0.3}}, "static")
    for depth, hidden in ((1, 0), (2, 2 * 3 * 5)):
        way = {"rank": 5, "depth": depth}
        zoo.merge({"method": "rank_one_moe", "parameters": way}, f"out{depth}")
        found = made(zoo.folder / f"out{depth}")
        for router in found.manifest.routers.values():
            assert (router.outputs, router.hidden, router.init) == (15, hidden, 0.3)
        assert all(len(code.shape) == 2 for code in found.codes.values())
        for name, value in static.items():
            if name.endswith(".bias"):
                assert torch.equal(found.tensors[name], value)


def test_the_rank_is_at_most_the_matrix_rank(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": "rank_one_moe"})  # its rank is 32
    assert {code.slots for code in made(zoo.folder / "out").codes.values()} == {2 * 16}


def test_how_many_coefficients_stay(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": "rank_one_moe", "parameters": {"top_k": 3}})
    routers = made(zoo.folder / "out").manifest.routers.values()
    assert {(r.top_k, r.activation, r.rest) for r in routers} == {(3, "none", 0.0)}
