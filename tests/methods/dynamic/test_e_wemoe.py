"""e_wemoe: an exact count of the largest entries, and one router for a stack."""

from __future__ import annotations

import torch
from made import made
from zoo import Zoo

from mowmerge.dynamic.format import Code
from mowmerge.methods.dynamic.e_wemoe import e_wemoe


def test_by_hand() -> None:
    base = torch.zeros(2, 2)
    deltas = torch.tensor([[[1.0, -3.0], [2.0, 0.5]], [[1.0, 1.0], [1.0, 1.0]]])
    parts = e_wemoe(deltas, base, Code("w", (2, 2), "sparse", 2, "g", kept=2), scale=0.5)
    assert parts["val"].tolist() == [-3.0, 2.0, 1.0, 1.0]  # of equals, the first
    assert parts["occ"].tolist() == [[[2], [1]], [[3], [0]]]
    assert parts["ptr"].tolist() == [0, 2, 4]
    assert parts["anchor"].tolist() == [[0.5, -1.0], [1.0, 0.0]]


def test_one_router_for_a_stack_or_one_a_block(zoo: Zoo) -> None:
    zoo.family("bert", 2)
    sizes = {}
    for way in ("shared", "block"):
        zoo.merge({"method": "e_wemoe", "parameters": {"router": way, "layer_code": 8}}, way)
        found = made(zoo.folder / way)
        sizes[way] = len(found.manifest.routers)
        assert {g.index for g in found.manifest.gates.values()} == {0, 1}
        assert {r.code for r in found.manifest.routers.values()} == {8}
        assert found.tensors["mow_router.0.first.weight"].shape == (24, 24)
    assert sizes == {"shared": 1, "block": 2}


def test_the_rest_is_task_arithmetic_of_whole_task_vectors(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    static, _ = zoo.merge({"method": "task_arithmetic", "parameters": {"scale": 0.4}}, "static")
    zoo.merge({"method": "e_wemoe", "parameters": {"scale": 0.4, "density": 0.5}})
    found = made(zoo.folder / "out")
    for name, value in static.items():
        assert torch.equal(found.tensors[name], value) == (name not in found.codes)
    for code in found.codes.values():
        assert code.kept == found.tensors[code.name].numel() // 2


def test_a_density_that_keeps_nothing(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    zoo.merge({"method": "e_wemoe", "parameters": {"density": 0.0}})
    found = made(zoo.folder / "out")
    for name in found.codes:
        assert torch.equal(found.tensors[name], models["base"][name])
        assert not any(d.any() for d in found.slots(name))
