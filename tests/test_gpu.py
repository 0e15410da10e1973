"""Merges on a GPU: the processor's values, the same bytes again, whatever blocks, workers and how
many devices; run by `pytest -m gpu` where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_elsewhere import GIVEN, cases
from zoo import Tensors, Zoo, raw

from mowmerge import memory, planner
from mowmerge.methods import registry
from mowmerge.plan import RUN
from mowmerge.replay import TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ONE = "cuda:0"
TURNED = 5e-3  # |A - B| / |B| of methods that iterate or decompose: bases of near-equal values turn
EXACT = ("linear", "task_arithmetic", "passthrough", "ties", "dare", "magmax", "breadcrumbs")


def apart(found: Tensors, wanted: Tensors) -> float:
    """The largest |A - B| / |B| over all tensors."""
    assert set(found) == set(wanted)
    worst = 0.0
    for name, value in wanted.items():
        if value.is_floating_point():
            norm = max(float(value.double().norm()), 1e-12)
            worst = max(worst, float((found[name].double() - value.double()).norm()) / norm)
        else:
            assert torch.equal(found[name], value), name
    return worst


@pytest.mark.parametrize("case", cases())
def test_a_method_gives_the_values_of_the_processor_and_the_same_bytes_again(
    zoo: Zoo, case: str
) -> None:
    name = case.partition(" ")[0]
    method = registry.get(name)
    count = method.count or 3
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (1000, 96), "model.norm.weight": (96,),
    }  # fmt: skip
    for i in range(2):
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (256, 96)
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (96, 96)
    zoo.family(shapes, count)
    content: dict[str, Any] = {"method": name, "parameters": GIVEN.get(case, {})}
    if not method.wants_base and not method.dynamic:
        content |= {"base": None, "models": {m: f"./{m}" for m in "abcdefgh"[:count]}}
    wanted, _ = zoo.merge(content, "wanted")
    found, report = zoo.merge(content, device=ONE)
    again, _ = zoo.merge(content, "again", device=ONE)
    assert raw(again) == raw(found)
    assert not [line for line in report["warnings"] if "too large" in line]
    distance = apart(found, wanted)
    print(f"{case}: {distance:.1e}")
    assert distance <= (TOLERANCE["F32"] if name in EXACT else TURNED)


@pytest.fixture
def large(zoo: Zoo) -> Zoo:
    """A base and two experts with a tensor of many blocks and small ones, bf16."""
    rows = {"model.layers.0.mlp.up_proj.weight": 1600, "model.layers.1.mlp.up_proj.weight": 300}
    for i, name in enumerate(("base", "a", "b")):
        draws = torch.Generator().manual_seed(i)
        wide = {key: torch.randn(n, 2048, generator=draws).bfloat16() for key, n in rows.items()}
        norm = torch.randn(64, generator=draws).bfloat16()
        zoo.save(name, wide | {"model.norm.weight": norm})
    return zoo


WAYS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties"},
    "ties, tensor": {"method": "ties", "parameters": {"trim": "tensor"}},
    "dare": {"method": "dare", "output": {"dtype": "float32"}},
    "emr": {"method": "emr"},
    "iso_c": {"method": "iso_c"},
}


@pytest.mark.parametrize("way", WAYS)
def test_blocks_and_workers_change_no_byte(
    large: Zoo, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = large.merge(WAYS[way], "wanted", device=ONE, workers=1)
    monkeypatch.setattr(memory, "LONGER", 1)
    for i, (block, workers) in enumerate(((RUN, 1), (3 * RUN, 4), (7 * RUN, 2))):
        monkeypatch.setattr(planner, "BLOCK", block)
        found, _ = large.merge(WAYS[way], f"out-{i}", device=ONE, workers=workers)
        assert raw(found) == raw(wanted), (block, workers)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_gpus_make_the_bytes_of_one(large: Zoo, way: str) -> None:
    wanted, _ = large.merge(WAYS[way], "wanted", device=ONE)
    for i, device in enumerate(("cuda", "cuda:1,cuda:0", "cuda:1")):
        found, _ = large.merge(WAYS[way], f"out-{i}", device=device, workers=4)
        assert raw(found) == raw(wanted), device


@pytest.mark.parametrize("way", ["linear", "ties"])
def test_little_memory_makes_blocks_shorter_and_then_the_processor_takes_over(
    large: Zoo, way: str
) -> None:
    """Memory that torch may use is cut to what few blocks take, and then to nothing."""
    wanted, _ = large.merge(WAYS[way], "wanted", device=ONE)
    there = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        held = torch.cuda.memory_reserved(0)
        torch.cuda.set_per_process_memory_fraction((held + (48 << 20)) / there, 0)
        found, report = large.merge(WAYS[way], "short", device=ONE, workers=1)
        assert raw(found) == raw(wanted)
        assert not report["warnings"]
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-9, 0)
        _, report = large.merge(WAYS[way], "none", device=ONE, workers=1)
        assert [line for line in report["warnings"] if "made on the cpu" in line]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_a_nan_on_the_device_is_an_error_that_names_its_model(large: Zoo) -> None:
    from mowmerge.errors import CheckpointError

    spoiled = {"model.layers.0.mlp.up_proj.weight": torch.ones(1600, 2048).bfloat16()}
    for name in ("base", "a", "b"):
        spoiled["model.layers.0.mlp.up_proj.weight"][7, 7] = torch.nan if name == "b" else 2.0
        large.save(name, spoiled)
    for way in ("linear", "ties", "iso_c"):
        with pytest.raises(CheckpointError, match="model 'b'"):
            large.merge(WAYS[way], device=ONE)
