"""Blocks through pinned memory: what goes up, is worked on and comes back is in order by its marks,
and each of them is needed; nothing here needs a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lanes import Watched
from torch import Tensor
from zoo import Zoo, raw

from mowmerge import staging
from mowmerge.errors import CheckpointError
from mowmerge.plan import RUN

KINDS = (torch.bfloat16, torch.float32)
BLOCK, PIECE, TOTAL = 10, 4, 47


class Pools:
    """Buffers by name, kept: no address is used twice."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def __call__(self, name: str, length: int, dtype: Any, *rest: Any) -> Tensor:
        return self.held.setdefault(name, torch.full((length,), 99, dtype=dtype))[:length]


def passed(lane: Watched) -> tuple[Tensor, Tensor]:
    """What a lane gives for the sum of two inputs in blocks, as the engine asks; what it is."""
    inputs = [torch.arange(TOTAL).to(kind) * (k + 1) for k, kind in enumerate(KINDS)]
    stage = staging.Staged(
        Pools(), staging.Sizes(KINDS, torch.float32, torch.bfloat16, BLOCK, PIECE), lane
    )
    found: list[Tensor] = []
    waiting: deque[staging.Given] = deque()

    def give(ready: staging.Given) -> None:
        out, total = ready()
        lane.touch("host", out, wrote=False)
        assert total == total  # a number
        found.append(out.clone())

    def read(i: int, first: int, last: int, out: memoryview) -> None:
        target = torch.frombuffer(out, dtype=KINDS[i])
        lane.touch("host", target, wrote=True)
        target.copy_(inputs[i][first:last])

    for start in range(0, TOTAL, BLOCK):
        values = stage.fill(start, min(start + BLOCK, TOTAL), read)
        lane.touch("work", values, wrote=True)
        waiting.append(stage.take(values[0].add_(values[1])))
        if len(waiting) > 1:
            give(waiting.popleft())
    for ready in waiting:
        give(ready)
    stage.close()
    return torch.cat(found), (3 * torch.arange(TOTAL)).bfloat16()


def test_blocks_come_back_in_order_whatever_is_late() -> None:
    lane = Watched()
    found, wanted = passed(lane)
    assert torch.equal(found, wanted)
    assert lane.races == []
    assert len(lane.waits) == 5  # to read, to send, to widen, to send back, to give


@pytest.mark.parametrize("i", range(5))
def test_without_any_of_the_waits_the_order_is_left_to_chance(i: int) -> None:
    lane = Watched()
    passed(lane)
    deaf = Watched(deaf=sorted(lane.waits)[i])
    passed(deaf)
    assert deaf.races


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """Merges go through lanes that are late; those that were."""
    lanes: list[Watched] = []

    def of(memory: staging.Memory, sizes: staging.Sizes, device: str) -> staging.Staged:
        lanes.append(Watched())
        return staging.Staged(memory, sizes, lanes[-1])

    monkeypatch.setattr(staging, "of", of)
    return lanes


@pytest.fixture
def large(zoo: Zoo) -> Zoo:
    """Three models with a tensor of several blocks, the last of them short, and small ones."""
    for i, name in enumerate(("base", "a", "b")):
        draws = torch.Generator().manual_seed(i)
        kind = torch.float32 if name == "b" else torch.bfloat16
        shapes = {"model.layers.0.mlp.up_proj.weight": (700, 500), "n": (64,), "z": (0, 3)}
        zoo.save(name, {
            key: torch.randn(shape, generator=draws).to(kind) for key, shape in shapes.items()
        } | {"same": torch.linspace(0, 1, RUN + 7), "count": torch.arange(9)})  # fmt: skip
    return zoo


WAYS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties"},
    "ties, tensor": {"method": "ties", "parameters": {"trim": "tensor"}},
    "dare": {"method": "dare", "output": {"dtype": "float16"}},
    "a matrix": {"method": "iso_c"},
    "rows": {"method": "della"},
    "dynamic": {"method": "emr"},
    "nested": {
        "method": "linear", "base": "./base",
        "models": {"n": {"source": {
            "method": "ties", "base": "./base", "models": {"a": "./a", "b": "./b"},
        }}, "b": "./b"},
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_merges_through_pinned_memory_have_the_same_bytes(
    large: Zoo, way: str, request: pytest.FixtureRequest
) -> None:
    wanted, told = large.merge(WAYS[way], "wanted")
    lanes = request.getfixturevalue("staged")
    found, report = large.merge(WAYS[way], workers=2)
    assert raw(found) == raw(wanted)
    assert lanes
    assert all(not lane.races for lane in lanes)
    for one, two in zip(report["tensors"], told["tensors"], strict=True):
        assert one["action"] == two["action"]
        assert one.get("kept_share") == two.get("kept_share")


FAULTS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Any], str]] = {
    "a NaN": ({"method": "ties"}, lambda w: w[3, 4].fill_(torch.nan), "model 'b'.*NaN or Inf"),
    "a NaN in a matrix": ({"method": "iso_c"}, lambda w: w[3, 4].fill_(torch.nan), "model 'b'"),
    "an overflow": (
        {"method": "linear", "output": {"dtype": "float16"}, "parameters": {"normalize": False}},
        lambda w: w[3, 4].fill_(70_000.0), "overflows F16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_finite_is_said_when_it_comes_back(
    large: Zoo, staged: list[Watched], fault: str
) -> None:
    content, spoil, says = FAULTS[fault]
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(700, 500)}
    for name in ("base", "a", "b"):
        large.save(name, tensors)
    spoil(tensors["model.layers.0.mlp.up_proj.weight"])
    large.save("b", tensors)
    with pytest.raises(CheckpointError, match=says):
        large.merge(content)


def test_a_sum_too_large_for_fp32_is_no_fault(large: Zoo, staged: list[Watched]) -> None:
    for name, value in (("base", 0.0), ("a", 3e38), ("b", 3e38)):
        large.save(name, {"w": torch.full((4, RUN), value)})
    found, _ = large.merge({"method": "linear"}, stats=False)
    assert torch.equal(found["w"], torch.full((4, RUN), 3e38))
