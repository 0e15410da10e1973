"""wemoe: task arithmetic outside, and inside once the offset is taken off the anchor."""

from __future__ import annotations

import pytest
import torch
from made import made
from zoo import Zoo

from mowmerge.methods.dynamic.wemoe import wemoe


def test_by_hand() -> None:
    base, deltas = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [3.0, -2.0]])
    parts = wemoe(deltas, base, scale=0.5)
    assert parts["anchor"].tolist() == [3.0, 1.0]
    assert parts["delta"].tolist() == deltas.tolist()


def test_the_anchor_is_task_arithmetic(zoo: Zoo) -> None:
    zoo.family("bert", 3)
    static, _ = zoo.merge({"method": "task_arithmetic", "parameters": {"scale": 0.3}}, "static")
    zoo.merge({"method": "wemoe"})
    found = made(zoo.folder / "out")
    for name, value in static.items():
        torch.testing.assert_close(found.tensors[name], value)
    assert all(".intermediate." in n or ".output.dense" in n for n in found.codes)
    assert not any(".attention." in n for n in found.codes)


@pytest.mark.parametrize(("depth", "kind"), [(0, "constant"), (1, "linear"), (2, "mlp")])
def test_a_router_for_each_block(zoo: Zoo, depth: int, kind: str) -> None:
    zoo.family("bert", 3)
    zoo.merge({"method": "wemoe", "parameters": {"depth": depth, "scale": 0.2, "seed": 5}})
    found = made(zoo.folder / "out").manifest
    assert [(g.scope, g.offset, g.index) for g in found.gates.values()] == [
        ("block", 0.2, 0), ("block", 0.2, 1),
    ]  # fmt: skip
    assert list(found.gates) == ["encoder.layer.0", "encoder.layer.1"]
    for i, router in enumerate(found.routers.values()):
        assert (router.kind, router.width, router.outputs) == (kind, 16, 3)
        assert (router.activation, router.init, router.seed) == ("none", 0.2, 5 + i)
        assert router.objective == "distill"
