"""Several devices: each worker has its own in turn, and the bytes are those of one.

The processor under two names stands for two of them.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import pytest
import torch
from zoo import ROOT, Zoo, raw, run

from mowmerge import devices, memory, planner
from mowmerge.buffers import Pools
from mowmerge.errors import ResourceError
from mowmerge.plan import RUN
from mowmerge.streaming import OpenJob

TWO = "cpu,cpu:0"


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """The threads that opened tensors on each device."""
    found: dict[str, set[int]] = {}
    true = OpenJob.__enter__

    def enter(self: OpenJob) -> OpenJob:
        found.setdefault(self.plan.device, set()).add(threading.get_ident())
        return true(self)

    monkeypatch.setattr(OpenJob, "__enter__", enter)
    return found


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: count)


def test_what_a_name_means(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 3)
    assert devices.named("cpu") == ("cpu",)
    assert devices.named("cuda") == ("cuda:0", "cuda:1", "cuda:2")
    assert devices.named("cuda:1") == ("cuda:1",)
    assert devices.named("cuda:2, cuda:0") == ("cuda:2", "cuda:0")
    gpus(monkeypatch, 0)
    assert devices.named("cuda") == ("cuda",)  # refused by the merge, and not by its plan


def test_the_processor_beside_a_gpu_is_refused(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe({"method": "linear"})
    ran = zoo.here("merge", "recipe.yaml", "out", "--device", "cpu,cuda:0")
    assert ran.rc == 6
    assert "the devices 'cpu,cuda:0' are of several kinds" in ran.err


@pytest.mark.parametrize("name", ["", "cuda:0,", "warp,warp:1"])
def test_a_device_that_is_none_is_said(zoo: Zoo, name: str) -> None:
    zoo.family("llama", 2)
    zoo.recipe({"method": "linear"})
    ran = zoo.here("merge", "recipe.yaml", "out", "--device", name)
    assert ran.rc == 6
    assert "Traceback" not in ran.err


NESTED = {
    "method": "linear", "base": "./base",
    "models": {"n": {"source": {
        "method": "ties", "base": "./base", "models": {"a": "./a", "b": "./b"},
    }}, "c": "./c"},
}  # fmt: skip


@pytest.mark.parametrize("content", [{"method": "ties"}, {"method": "emr"}, NESTED])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_two_devices_make_the_bytes_of_one(
    zoo: Zoo, used: dict[str, set[int]], monkeypatch: pytest.MonkeyPatch, content: dict[str, Any],
    workers: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("mowmerge.engine.BUNCH", 1)  # a task a tensor
    zoo.family("llama", 3)
    wanted, told = zoo.merge(content, "wanted", workers=1)
    used.clear()
    found, report = zoo.merge(content, device=TWO, workers=workers)
    assert raw(found) == raw(wanted)
    assert report["fingerprint"] == told["fingerprint"]
    assert set(used) <= {"cpu", "cpu:0"}


def test_workers_take_the_devices_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, found = devices.in_turn(("a", "b", "c")), list[str | None]()

    def work() -> None:
        begin()
        found.append(devices.own())

    for _ in range(7):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == ["a", "b", "c", "a", "b", "c", "a"]
    assert devices.own() is None


def test_every_device_has_a_worker_of_its_own(
    zoo: Zoo, used: dict[str, set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors wait for each other, so that as many workers as there are have to be there."""
    together, true = threading.Barrier(4), OpenJob.blocks

    def blocks(self: OpenJob, *args: Any) -> Any:
        together.wait(30)
        return true(self, *args)

    monkeypatch.setattr("mowmerge.engine.BUNCH", 1)
    monkeypatch.setattr(OpenJob, "blocks", blocks)
    monkeypatch.setattr(OpenJob, "identical", lambda self: False)
    zoo.family({f"w{i}": (8, 8) for i in range(4)}, 2)
    _, report = zoo.merge({"method": "linear"}, device=TWO, workers=4)
    assert {device: len(threads) for device, threads in used.items()} == {"cpu": 2, "cpu:0": 2}
    assert report["warnings"] == []


def test_one_of_two_devices_without_room(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had to make falls to the processor, and the report says so."""
    zoo.family({f"w{i}": (2, RUN) for i in range(3)}, 2)
    wanted, _ = zoo.merge({"method": "ties"}, "wanted")
    true = Pools.__call__

    def memory(self: Pools, name: str, length: int, *args: Any) -> Any:
        if self.device == "cpu:0" and name == "values":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return true(self, name, length, *args)

    monkeypatch.setattr(Pools, "__call__", memory)
    found, report = zoo.merge({"method": "ties"}, device="cpu:0,cpu:0", workers=2)
    assert raw(found) == raw(wanted)
    assert len(report["warnings"]) == 3
    assert all("too large for cpu:0: made on the cpu" in line for line in report["warnings"])


def test_the_plan_of_gpus_counts_what_is_pinned_and_what_lies_on_each(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 2)
    rows = 600
    zoo.family({"w": (rows, RUN)}, 2, dtype=torch.bfloat16)
    file = zoo.recipe({"method": "linear", "models": {"a": "./a", "b": "./b"}})
    from mowmerge import api

    plan = api.plan(file, options=planner.Options(workers=4, device="cuda"))
    block = memory.LONGER * planner.BLOCK
    assert (plan.devices, plan.workers, plan.block) == (("cuda:0", "cuda:1"), 4, block)
    pieces, out = 2 * 2 * block, 2 * block  # two models in bf16, the result
    assert plan.peak_bytes == memory.RUNTIME + 2 * (pieces + out) + pieces  # one tensor, one worker
    temporaries = 2 + 1  # the values, and what a method makes of them, in fp32
    assert plan.device_bytes == 2 * (pieces + out) + 4 * block * temporaries
    ran = zoo.here("merge", file, "--dry-run", "--device", "cuda", "--workers", "4")
    assert "on each of cuda:0, cuda:1" in ran.out
    told = json.loads(zoo.here("merge", file, "--dry-run", "--device", "cuda", "--json").out)
    assert (told["devices"], told["device_bytes"]) == (["cuda:0", "cuda:1"], plan.device_bytes)
    one = api.plan(file, options=planner.Options(workers=1, device="cuda"))
    assert one.workers == 2  # a device without one would be idle


def test_memory_that_may_be_used_is_that_of_the_process(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 1)
    zoo.family({"w": (600, RUN)}, 2, dtype=torch.bfloat16)
    zoo.recipe({"method": "linear"})
    from mowmerge import api

    free = api.plan(zoo.folder / "recipe.yaml", options=planner.Options(device="cuda"))
    limit = (free.peak_bytes + memory.RUNTIME) // 2
    options = planner.Options(device="cuda", max_memory=limit)
    held = api.plan(zoo.folder / "recipe.yaml", options=options)
    assert held.block < free.block
    assert held.peak_bytes <= limit
    with pytest.raises(ResourceError, match="is too little"):
        api.plan(
            zoo.folder / "recipe.yaml",
            options=planner.Options(device="cuda", max_memory=memory.RUNTIME + 1000),
        )


def test_pinned_memory_comes_in_powers_of_two() -> None:
    assert [memory._pinned(n) for n in (0, 1, 2, 3, 4096, 4097)] == [1, 1, 2, 4, 4096, 8192]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_bench_says_that_there_is_no_gpu() -> None:
    ran = run([sys.executable, "-m", "tests.bench.gpu", "family"], ROOT)
    assert ran.rc == 1
    assert ran.err == "there is no CUDA device here: nothing of this can be measured\n"
