"""Adapters that are cut off: nothing is left, or a whole one; what the system refuses is said."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_interruptions import KILLED
from zoo import Zoo, left

from mowmerge import api
from mowmerge.checkpoint.peft import WEIGHTS
from mowmerge.errors import ResourceError

RECIPE = {"method": "ties", "output": {"format": "adapter", "rank": 8}}


@pytest.fixture
def family(zoo: Zoo) -> Zoo:
    torch.set_num_threads(1)
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (40,)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (60, 40) for i in range(2)}
    zoo.family(shapes, 2)
    return zoo


@pytest.mark.parametrize("call", ["pwrite", "write_text"])
def test_a_full_disk_at_any_write_leaves_nothing(
    family: Zoo, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    whole = api.merge(family.recipe(RECIPE), family.folder / "whole").path
    owner: Any = os if call == "pwrite" else Path
    real, count, full = getattr(owner, call), 0, 0

    def refusing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    recipe = family.recipe(RECIPE)
    monkeypatch.setattr(owner, call, refusing)
    while True:
        full, count = full + 1, 0
        try:
            made = api.merge(recipe, family.folder / "out").path
        except ResourceError as error:
            assert "No space left" in str(error)
            assert not (family.folder / "out").exists()
            assert left(family.folder) == []
        else:
            break
    assert full > (6 if call == "pwrite" else 5)  # factors, norm and header; config, lock ...
    assert (made / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_short_writes_change_nothing(family: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = api.merge(family.recipe(RECIPE), family.folder / "whole").path
    real = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: real(fd, data[: max(1, len(data) // 3)], at)
    )
    made = api.merge(family.recipe(RECIPE), family.folder / "out").path
    assert (made / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_nothing_or_a_whole_adapter(zoo: Zoo, kills: int) -> None:
    zoo.family({f"model.layers.{i}.mlp.up_proj.weight": (400, 300) for i in range(3)}, 2)
    zoo.recipe({"method": "ties", "output": {"format": "adapter", "rank": 100}})
    code = KILLED.replace("config.json", "adapter_config.json")
    ran = zoo.python(code, kills, Path(__file__).parent)
    assert ran.rc == 0, ran.err
    in_the_middle, *leftovers = ran.out.split()
    assert leftovers == []
    assert int(in_the_middle) > 0
