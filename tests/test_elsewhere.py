"""Every method on a device that is not the processor: it mixes no tensors of two devices, and makes
the processor's bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import elsewhere
import pytest
import torch
from lanes import Watched
from zoo import Zoo, llama, raw

from mowmerge import devices, memory, planner, staging
from mowmerge.methods import registry
from mowmerge.methods.ops import settle
from mowmerge.methods.ops.selection import kth_largest
from mowmerge.plan import RUN

GIVEN: dict[str, dict[str, Any]] = {
    "wudi": {"steps": 3},
    "doge": {"steps": 3},
    "wudi closed": {"solver": "closed"},
    "drm vertical": {"direction": "vertical"},
    "knots tensor": {"trim": "tensor"},
    "ties tensor": {"trim": "tensor", "elect": "normmass", "rescale": True},
    "ties count": {"elect": "count", "aggregate": "max"},
    "sce signed": {},
}
ADAPTERS = ("pem_composition",)  # for adapters alone
FITTED = ("adamerging", "adamerging_pp")


def cases() -> list[str]:
    """Every method but those that read adapters or are fitted, and some with other parameters."""
    names = [n for n in registry.names() if n not in (*ADAPTERS, *FITTED)]
    return [*names, *(case for case in GIVEN if case not in names)]


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(devices, "in_turn", elsewhere.in_turn(devices.in_turn))
    monkeypatch.setattr(torch, "tensor", elsewhere.tensor)
    with elsewhere.Elsewhere():
        yield elsewhere.DEVICE


def test_the_device_refuses_what_a_gpu_refuses(there: str) -> None:
    one = torch.arange(6.0, device=there).view(2, 3)
    assert one.device.type == there
    one[1].add_(1.0)
    assert one.sum().item() == 18.0
    assert one.cpu().tolist() == [[0.0, 1.0, 2.0], [4.0, 5.0, 6.0]]
    with pytest.raises(RuntimeError, match="one device"):
        one + torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="numpy"):
        one.numpy()
    assert torch.equal((one * torch.tensor(2.0)).cpu(), 2 * one.cpu())  # a number goes along


@pytest.mark.parametrize("case", cases())
def test_a_method_makes_the_same_bytes_on_another_device(
    zoo: Zoo, case: str, request: pytest.FixtureRequest
) -> None:
    name = case.partition(" ")[0]
    method = registry.get(name)
    count = method.count or 3
    zoo.family(llama(layers=1), count, dtype=torch.bfloat16)
    content = {"method": name, "parameters": GIVEN.get(case, {})}
    if not method.wants_base and not method.dynamic:
        content |= {"base": None, "models": {m: f"./{m}" for m in "abcdefgh"[:count]}}
    wanted, told = zoo.merge(content, "wanted")
    there = request.getfixturevalue("there")
    found, report = zoo.merge(content, device=there)
    assert raw(found) == raw(wanted)
    assert report["devices"] == [there]
    assert not [w for w in report["warnings"] if w not in told["warnings"]]


@pytest.mark.parametrize("method", ["linear", "ties", "dare", "della", "iso_c", "emr", "one_bit"])
def test_pinned_memory_and_the_device_are_two_places(
    zoo: Zoo, method: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    zoo.family(llama(layers=1, hidden=300), 3)  # an MLP's matrix is of three blocks
    wanted, _ = zoo.merge({"method": method}, "wanted")
    lanes: list[Watched] = []

    def of(pools: staging.Memory, sizes: staging.Sizes, device: str) -> staging.Staged:
        lanes.append(Watched())
        return staging.Staged(pools, sizes, lanes[-1])

    monkeypatch.setattr(staging, "of", of)
    monkeypatch.setattr(memory, "LONGER", 1)
    monkeypatch.setattr(planner, "BLOCK", RUN)
    found, _ = zoo.merge({"method": method}, device=request.getfixturevalue("there"))
    assert raw(found) == raw(wanted)
    assert lanes
    assert not [race for lane in lanes for race in lane.races]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("coarse", [False, True])
def test_an_order_statistic_is_the_same_on_another_device(
    there: str, signed: bool, wide: torch.dtype, coarse: bool
) -> None:
    """With ties, zeros of both signs, and infinities; every rank that is an edge of something."""
    draws = torch.Generator().manual_seed(7)
    values = torch.randn(2, 200_000, generator=draws, dtype=wide)
    if coarse:
        values = (4 * values).round() / 4
    values[:, :3], values[:, 3:5], values[0, 5:9] = -0.0, 0.0, torch.inf
    values[1, 5:9] = -torch.inf
    order = (values if signed else values.abs()).sort(dim=1, descending=True).values
    for rank in (1, 4, 5, 40_000, 99_997, 100_000, 100_005, 199_999, 200_000):
        wanted = [float(row[rank - 1]) for row in order]
        for where in ("cpu", there):
            found = settle(
                lambda extents, rank=rank: kth_largest([rank] * 2, 200_000, signed=signed),
                values.to(where), {},
            )  # fmt: skip
            assert found == wanted, (rank, where)


def test_an_order_statistic_of_nothing_but_nan_ends(there: str) -> None:
    values = torch.full((1, 100_000), torch.nan)
    for where in ("cpu", there):
        (found,) = settle(lambda extents: kth_largest([5], 100_000), values.to(where), {})
        assert found != found
