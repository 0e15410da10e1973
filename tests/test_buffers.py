"""What jobs leave to each other: blocks that lie there already, buffers, open files."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from zoo import Zoo, load

from mowmerge import api
from mowmerge.buffers import Desk
from mowmerge.checkpoint import reader, source
from mowmerge.engine import Engine
from mowmerge.plan import RUN
from mowmerge.planner import Options

TIES = {"method": "ties", "parameters": {"density": 0.4, "trim": "tensor"}}


@pytest.fixture
def family(zoo: Zoo) -> Zoo:
    """A base and three experts: two tensors of one block, one of two."""
    draws = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b", "c"):
        zoo.save(name, {
            "one.weight": torch.randn(30, 40, generator=draws).bfloat16(),
            "two.weight": torch.randn(30, 40, generator=draws).bfloat16(),
            "long.weight": torch.randn(5 * RUN, generator=draws).bfloat16(),
        })  # fmt: skip
    return zoo


@pytest.mark.parametrize("stats", [False, True])
def test_a_tensor_of_one_block_is_read_once(
    family: Zoo, monkeypatch: pytest.MonkeyPatch, stats: bool
) -> None:
    reads: list[str] = []
    true = reader._FileHandle.read

    def read(self: Any, start: int, stop: int, out: memoryview) -> None:
        reads.append(self._name)
        true(self, start, stop, out)

    monkeypatch.setattr(reader._FileHandle, "read", read)
    family.merge(TIES, stats=stats, workers=1)
    assert reads.count("one.weight") == 4  # the sign's pass and the thresholds' among them
    assert reads.count("long.weight") > 8


def test_jobs_of_one_make_sit_at_one_desk(family: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    true = Desk.__init__

    def init(self: Desk, make: Any) -> None:
        made.append(make.block)
        true(self, make)

    monkeypatch.setattr(Desk, "__init__", init)
    family.merge(TIES, workers=1)
    assert made == [4 * RUN, 1200]


def test_a_desk_has_nothing_of_the_last_job(family: Zoo) -> None:
    """Two tensors of one shape: the block that lies there is the first one's."""
    inputs = {name: load(family.folder / name) for name in "abc"}
    recipe = {"method": "linear", "output": {"dtype": "float32"}}
    merged, _ = family.merge(recipe, workers=1)
    for name in ("one.weight", "two.weight"):
        mean = torch.stack([inputs[m][name].float() for m in "abc"]).mean(0)
        assert torch.allclose(merged[name], mean, atol=1e-6)


def test_no_desk_is_left_by_a_job_that_failed_nor_more_than_there_are_workers(family: Zoo) -> None:
    engine = Engine(api.plan(family.recipe(TIES), options=Options(workers=1)))
    job = engine.plan.jobs[0]
    with pytest.raises(RuntimeError), engine.open(job):
        raise RuntimeError
    assert engine._desks == []
    with engine.open(job), engine.open(job):
        pass
    assert len(engine._desks) == 1


def test_finite_values_whose_sum_is_not_stay_what_they_are(zoo: Zoo) -> None:
    for name, value in (("base", 1e38), ("a", 2.4e38), ("b", 2.4e38)):
        zoo.save(name, {"w": torch.full((4, 4), value)})
    given = {"density": 1.0, "trim": "tensor", "elect": "count"}
    merged, _ = zoo.merge({"method": "ties", "parameters": given})
    assert torch.allclose(merged["w"], torch.full((4, 4), 2.4e38))


def test_a_file_stays_open_for_the_next_handle(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = reader.StoredReader(source.find(str(family.folder / "a")))
    with closing(opened.open("one.weight")):
        pass
    monkeypatch.delattr(reader.os, "open")
    out = memoryview(bytearray(2400))
    with closing(opened.open("two.weight")) as handle:
        handle.read(0, 1200, out)
    assert any(out)


def test_reading_without_preadv(family: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = family.merge(TIES, "one")
    monkeypatch.delattr(reader.os, "preadv")
    found, _ = family.merge(TIES, "other", workers=2)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
