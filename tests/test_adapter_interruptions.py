"""Adapters that are cut off: nothing is left, or a whole one; what the system refuses is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_interruptions import KILLED
from test_resume import Cut, cut, folder
from zoo import Zoo, left, llama

from mowmerge import api, updates
from mowmerge.checkpoint import journal
from mowmerge.checkpoint.journal import Journal
from mowmerge.checkpoint.peft import WEIGHTS
from mowmerge.engine import Engine
from mowmerge.errors import ResourceError
from mowmerge.planner import Options

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


def merge(zoo: Zoo, content: dict[str, Any] = RECIPE, out: str = "out", **kwargs: Any) -> Any:
    """One run; the files that it wrote, the report without what a clock says."""
    options = Options(workers=kwargs.pop("workers", 1))
    return folder(api.merge(zoo.recipe(content), zoo.folder / out, options=options, **kwargs).path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The matrices that are decomposed."""
    names: list[str] = []
    true = updates._factors

    def factors(difference: Any, name: str, cut: Any) -> Any:
        names.append(name)
        return true(difference, name, cut)

    monkeypatch.setattr(updates, "_factors", factors)
    return names


@pytest.fixture
def varied(zoo: Zoo) -> Zoo:
    """Two experts of a small llama, with matrices, norms that are saved whole, and one of either
    that no expert changes."""
    models = zoo.family(llama(layers=3), 2)
    for name in ("a", "b"):
        same = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight")
        models[name] |= {key: models["base"][key] for key in same}
        zoo.save(name, models[name])
    return zoo


WAYS: dict[str, dict[str, Any]] = {
    "ties": RECIPE,
    "by energy": {"method": "dare", "output": {"format": "adapter", "energy": 0.9}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after", [0, 1, 9, 22, 27])
def test_an_adapter_that_was_cut_off_is_taken_up(
    varied: Zoo, way: str, after: int, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = merge(varied, WAYS[way], "wanted")
    with monkeypatch.context() as patch:
        cut(patch, after)
        with pytest.raises(Cut):
            merge(varied, WAYS[way], resume=True)
    held = Journal(varied.folder / ".out.partial")
    held.read()
    assert len(held.done) == after
    made.clear()
    moves: list[int] = []
    assert merge(varied, WAYS[way], resume=True, begin=lambda plan: moves.append) == wanted
    assert not set(held.done) & set(made)
    assert left(varied.folder) == []
    matrices = [shape for shape in llama(layers=3).values() if len(shape) == 2]
    assert sum(moves) == 4 * sum(rows * columns for rows, columns in matrices)


def test_a_statistic_and_what_is_no_matrix_are_not_found_again(
    varied: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = merge(varied, out="wanted")
    with monkeypatch.context() as patch:
        cut(patch, 1)
        with pytest.raises(Cut):
            merge(varied, resume=True)

    def again(*args: Any) -> None:
        raise AssertionError("the journal has it")

    monkeypatch.setattr(Engine, "_settle_group", again)
    monkeypatch.setattr(updates, "rest", again)
    assert merge(varied, resume=True) == wanted


def test_another_rank_is_another_adapter(varied: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        cut(patch, 3)
        with pytest.raises(Cut):
            merge(varied, resume=True)
    with pytest.raises(ResourceError, match=r"3 tensor\(s\) were done"):
        merge(varied)
    other = {**RECIPE, "output": {"format": "adapter", "rank": 7}}
    with pytest.raises(ResourceError, match="output.rank was 8, is 7"):
        merge(varied, other, resume=True)
    assert merge(varied, other, force=True) == merge(varied, other, "wanted")


def test_a_journal_without_its_file_counts_for_nothing(
    varied: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = merge(varied, out="wanted")
    for spoil in (lambda file: file.unlink(), lambda file: os.truncate(file, 1_000)):
        with monkeypatch.context() as patch:
            cut(patch, 9)
            with pytest.raises(Cut):
                merge(varied, resume=True)
        part = varied.folder / ".out.partial/part-0"
        assert part.stat().st_size > 1_000
        spoil(part)
        assert merge(varied, resume=True) == wanted
        shutil.rmtree(varied.folder / "out")


def test_after_a_loss_of_power_only_what_was_on_disk_counts(
    varied: Zoo, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boot id is another, and what was written to the part since the last sync is gone."""
    wanted = merge(varied, out="wanted")
    matrices, finished = set(made), Journal.finished

    def waited(self: Journal, *args: Any) -> None:
        finished(self, *args)
        if self._syncing and len(self.done) == 5:
            self._syncing.result()
            monkeypatch.setattr(journal, "SYNC_BYTES", 1 << 40)

    with monkeypatch.context() as patch:
        monkeypatch.setattr(journal, "SYNC_BYTES", 1)
        patch.setattr(Journal, "finished", waited)
        cut(patch, 9)
        with pytest.raises(Cut):
            merge(varied, resume=True)
    stage = varied.folder / ".out.partial"
    lines = [json.loads(x[9:]) for x in (stage / "journal-0.jsonl").read_text().splitlines()]
    synced = [line["synced"] for line in lines if "synced" in line][-1]
    told = [line for line in lines if "tensor" in line or "fact" in line]
    sure = {line["tensor"]: line["entry"] for line in told[:synced] if "tensor" in line}
    assert 0 < len(sure) < 9
    (length,) = updates.lengths(sure).values()
    assert 0 < length < (stage / "part-0").stat().st_size
    os.truncate(stage / "part-0", length)
    (varied.folder / "boot_id").write_text("another")
    monkeypatch.setattr(journal, "_BOOT", varied.folder / "boot_id")
    made.clear()
    assert merge(varied, resume=True) == wanted
    assert set(made) == matrices - set(sure)


TAKEN_UP = """
import random, shutil, sys
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from killing import killed, steps
from test_resume import folder
from mowmerge import merge, updates
from mowmerge.checkpoint.journal import Journal
from mowmerge.planner import Options
from mowmerge.tensors import torch
torch.set_num_threads(1)
true, draws, repeated, early = updates._factors, random.Random(5), 0, 0

def noted(difference, name, cut):
    with open("log", "a") as log:
        log.write(name + "\\n")
    return true(difference, name, cut)

def run(out="out"):
    updates._factors = noted
    merge("recipe.yaml", out, options=Options(workers=2), resume=True)

wanted = folder(merge("recipe.yaml", "wanted", options=Options(workers=2)).path)
last = steps(partial(run, "counted"))
for i in range(int(sys.argv[1])):
    held = Journal(Path(".out.partial"))
    held.read()
    Path("log").write_text("")
    killed(run, draws.randrange(last))
    repeated += len(set(held.done) & set(Path("log").read_text().split()))
    early += bool(held.done)
    if Path("out").exists():
        if folder(Path("out")) != wanted:
            sys.exit(f"killed run {i} left something else")
        shutil.rmtree("out")
if killed(run, -1) or folder(Path("out")) != wanted:
    sys.exit("the run after the kills is another")
print(repeated, early, *(p.name for p in Path().glob(".*")))
"""


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_at_any_moment_cost_no_finished_matrix(zoo: Zoo, kills: int) -> None:
    zoo.family(llama(layers=2, hidden=64), 2)
    zoo.recipe(RECIPE)
    ran = zoo.python(TAKEN_UP, kills, Path(__file__).parent)
    assert ran.rc == 0, ran.err
    repeated, early, *leftovers = ran.out.split()
    assert int(repeated) == 0
    assert leftovers == []
    assert int(early) > kills / 4
