"""What is kept between the passes of a merge: used instead of working it out, and never missed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zoo import Zoo, left, raw

from mowmerge import planner
from mowmerge.methods.contracts import Kept
from mowmerge.methods.ops import spectral
from mowmerge.methods.static import knots, opcm
from mowmerge.planner import Options
from mowmerge.recipe import parse
from mowmerge.scratch import FULL, Scratch

KNOTS = {"method": "knots", "parameters": {"density": 0.5}}
OPCM = {"method": "opcm"}
MATRICES = 14  # of a llama-shaped model of two layers, its vocabulary tables left out


class Counted:
    """What makes a pair of tensors, counting how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Kept:
        self.calls += 1
        return torch.arange(12.0).view(3, 4).T, torch.tensor([1.5, -0.0], dtype=torch.float64)


def same(one: Kept, two: Kept) -> bool:
    return all(
        a.dtype == b.dtype and torch.equal(a, b) and a.stride() == b.stride()
        for a, b in zip(one, two, strict=True)
    )


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    made, again = Counted(), Counted()
    with Scratch(tmp_path / "scratch", 0) as scratch:
        once = scratch.once(0, "layers.0/weight", "cpu")
        first = once(made)
        assert same(first, Counted()())
        assert same(once(made), first)
        assert same(scratch.once(0, "layers.0/weight", "cpu")(again), first)
        assert (made.calls, again.calls) == (1, 0)
        for group, tensor in ((1, "layers.0/weight"), (0, "layers.1/weight")):
            scratch.once(group, tensor, "cpu")(again)
        assert again.calls == 2
        scratch.drop(0, "layers.0/weight")
        assert len(list(scratch.folder.iterdir())) == 2
        assert same(once(made), first)
        assert made.calls == 2
        assert not scratch.full
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [0, 40, 136, 300, 440])
def test_what_is_not_whole_is_made_again(tmp_path: Path, kept: int) -> None:
    made = Counted()
    with Scratch(tmp_path / "scratch", 0) as scratch:
        once = scratch.once(0, "weight", "cpu")
        first = once(made)
        (file,) = scratch.folder.iterdir()
        file.write_bytes(file.read_bytes()[:kept])
        assert same(once(made), first)
        assert same(once(made), first)
        assert made.calls == 2


def test_a_disk_without_room_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Counted()
    with Scratch(tmp_path / "scratch", shutil.disk_usage(tmp_path).total) as scratch:
        once = scratch.once(0, "weight", "cpu")
        assert same(once(made), once(made))
        assert (made.calls, scratch.full, list(scratch.folder.iterdir())) == (2, True, [])

    def refused(*args: Any, **given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", refused)
    with Scratch(tmp_path / "scratch", 0) as scratch:
        once = scratch.once(0, "weight", "cpu")
        assert same(once(made), once(made))
        assert (made.calls, scratch.full, list(scratch.folder.iterdir())) == (4, True, [])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("content", "home", "name", "each"),
    [(KNOTS, knots, "left_basis", 1), (OPCM, opcm, "spectrum", 2)],
)
def test_a_merge_decomposes_each_matrix_once(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, workers: int, content: dict[str, Any], home: Any,
    name: str, each: int,
) -> None:  # fmt: skip
    zoo.family("llama", 3)
    calls: list[int] = []
    real = getattr(spectral, name)
    monkeypatch.setattr(home, name, lambda *given: (calls.append(1), real(*given))[1])
    got, report = zoo.merge(content, workers=workers)
    assert len(calls) == MATRICES * each  # opcm: of the sum before each model but the first
    assert FULL not in report["warnings"]
    assert not left(zoo.folder)
    assert not list((zoo.folder / "out").glob("scratch*"))

    calls.clear()
    monkeypatch.setattr(Scratch, "_write", lambda self, file, parts: setattr(self, "full", True))
    found, report = zoo.merge(content, "anew", workers=workers)
    assert raw(found) == raw(got)
    assert len(calls) > MATRICES * each
    assert report["warnings"].count(FULL) == 1


def test_a_matrix_has_no_files_once_it_is_written(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.family("llama", 2)
    there: list[int] = []
    leaving = Scratch.__exit__
    monkeypatch.setattr(
        Scratch,
        "__exit__",
        lambda self, *exc: (there.append(len(list(self.folder.iterdir()))), leaving(self, *exc))[1],
    )
    zoo.merge(KNOTS)
    assert there == [0]


def test_the_plan_says_how_much(zoo: Zoo) -> None:
    zoo.family("llama", 2)

    def kept(content: dict[str, Any]) -> int:
        found = planner.build(parse.load(zoo.recipe(content)), Options()).algebra
        assert found is not None
        return found.kept

    # bases of outputs: q, o of 16, k, v of 8, gate, up of 32, down of 16; and a value for each
    assert kept(KNOTS) == 4 * 2 * (3 * 17 * 16 + 2 * 9 * 8 + 2 * 33 * 32)
    assert kept({"method": "opcm"}) == 4 * 2 * (2 * 256 + 2 * 128 + 3 * 512)
    assert kept({"method": "knots"}) == 0  # nothing is trimmed: each matrix is merged at once
    assert kept({"method": "tsv_m"}) == 0
    shown = zoo.here("merge", zoo.recipe(KNOTS), "--dry-run")
    assert "kB lie on the disk meanwhile" in shown.out
    told = json.loads(zoo.here("merge", "recipe.yaml", "--dry-run", "--json").out)["algebra"]
    assert told["kept"] == kept(KNOTS)
