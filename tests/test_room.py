"""A device without room: blocks grow shorter, then the processor takes over and the report says so.

A processor under another name stands for the device, and runs out of memory by decree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo import Zoo, raw

from mowmerge.buffers import Pools
from mowmerge.errors import ResourceError
from mowmerge.plan import RUN

DEVICE = "cpu:0"
GLOBAL = {"method": "ties", "parameters": {"trim": "global"}}


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Refuses more elements at once than that on the device; tells what was asked for in vain."""

    def limit(most: int) -> list[int]:
        true, refused = Pools.__call__, list[int]()

        def memory(self: Pools, name: str, length: int, *args: Any) -> Any:
            if self.device == DEVICE and length > most and name == "values":
                refused.append(length)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return true(self, name, length, *args)

        monkeypatch.setattr(Pools, "__call__", memory)
        return refused

    return limit


@pytest.fixture
def large(zoo: Zoo) -> Zoo:
    """A base and two experts with a tensor of several blocks and a small one."""
    for i, name in enumerate(("base", "a", "b")):
        draws = torch.Generator().manual_seed(i)
        zoo.save(name, {
            "w": torch.randn(5, RUN, generator=draws), "n": torch.randn(64, generator=draws),
        })  # fmt: skip
    return zoo


@pytest.mark.parametrize("content", [{"method": "linear"}, GLOBAL])
def test_shorter_blocks_give_the_same_bytes(
    large: Zoo, limited: Callable[[int], list[int]], content: dict[str, Any]
) -> None:
    wanted, _ = large.merge(content, "wanted")
    refused = limited(3 * RUN)  # a base, two experts: one run each
    found, report = large.merge(content, device=DEVICE)
    assert raw(found) == raw(wanted)
    assert refused and not report["warnings"]


@pytest.mark.parametrize("content", [{"method": "linear"}, GLOBAL, {"method": "iso_c"}])
def test_the_processor_takes_over_and_the_report_says_so(
    large: Zoo, limited: Callable[[int], list[int]], content: dict[str, Any]
) -> None:
    wanted, _ = large.merge(content, "wanted")
    limited(1024)
    found, report = large.merge(content, device=DEVICE)
    assert raw(found) == raw(wanted)
    assert report["warnings"] == [f"w: too large for {DEVICE}: made on the cpu"]


def test_the_processor_has_nobody_behind_it(large: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(self: Pools, name: str, *args: Any) -> Any:
        raise ResourceError("not enough memory")

    monkeypatch.setattr(Pools, "__call__", memory)
    with pytest.raises(ResourceError, match="not enough memory"):
        large.merge({"method": "linear"})
