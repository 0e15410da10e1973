"""Extractions of adapters that are cut off and taken up: the bytes of one that ran through."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import Cut, cut, folder
from zoo import Zoo, left, llama

from mowmerge import api, updates
from mowmerge.checkpoint.journal import Journal
from mowmerge.errors import CheckpointError, ResourceError


@pytest.fixture
def pair(zoo: Zoo) -> Zoo:
    """A base and a model, of three layers, of which three matrices and a norm are the base's."""
    models = zoo.family(llama(layers=3), 1)
    same = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    for name in (*same, "model.layers.0.input_layernorm.weight"):
        models["a"][name] = models["base"][name]
    zoo.save("a", models["a"])
    return zoo


def extract(zoo: Zoo, out: str = "out", model: str = "a", **asked: Any) -> dict[str, Any]:
    """One run; the files that it wrote, the report without what a clock says."""
    given = {"workers": 1, **({} if "energy" in asked else {"rank": 8}), **asked}
    where = [zoo.folder / name for name in (model, "base", out)]
    return folder(api.extract_lora(*where, **given).path)


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


def unfinished(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, after: int = 7, **asked: Any) -> Path:
    """An extraction that was cut off after so many tensors; its stage."""
    with monkeypatch.context() as patch:
        cut(patch, after)
        with pytest.raises(Cut):
            extract(zoo, resume=True, **asked)
    return zoo.folder / ".out.partial"


@pytest.mark.parametrize("asked", [{}, {"energy": 0.9}])
@pytest.mark.parametrize("after", [1, 9, 27])
def test_an_extraction_that_was_cut_off_is_taken_up(
    pair: Zoo, asked: dict[str, Any], after: int, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = extract(pair, "wanted", **asked)
    held = Journal(unfinished(pair, monkeypatch, after, **asked))
    held.read()
    assert len(held.done) == after
    assert not (pair.folder / "out").exists()
    made.clear()
    moves: list[int] = []
    again = extract(pair, resume=True, begin=lambda total: moves.append, **asked)
    assert again == wanted
    assert len(made) == len(set(made)) == max(0, 23 - after)
    assert not set(held.done) & set(made)
    assert left(pair.folder) == []
    matrices = [shape for shape in llama(layers=3).values() if len(shape) == 2]
    assert sum(moves) == 4 * sum(rows * columns for rows, columns in matrices)


def test_what_is_no_matrix_is_not_compared_again(
    pair: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = extract(pair, "wanted")
    unfinished(pair, monkeypatch, 1)

    def again(*args: Any) -> None:
        raise AssertionError("the journal has it")

    monkeypatch.setattr(updates, "rest", again)
    assert extract(pair, resume=True) == wanted


def test_without_resume_it_is_refused_and_force_starts_afresh(
    pair: Zoo, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = extract(pair, "wanted")
    unfinished(pair, monkeypatch)
    with pytest.raises(ResourceError, match=r"cut off when 7 tensor\(s\) were done"):
        extract(pair)
    words = ("extract-lora", "a", "out", "--base", "base", "--rank", "8", "--workers", "1")
    ran = pair.here(*words)
    assert ran.rc == 6 and "--resume takes it up, --force starts afresh" in ran.err
    made.clear()
    assert extract(pair, force=True) == wanted
    assert len(made) == 23


def test_the_command_takes_it_up(
    pair: Zoo, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = extract(pair, "wanted")
    unfinished(pair, monkeypatch)
    made.clear()
    words = ("extract-lora", "a", "out", "--base", "base", "--rank", "8", "--workers", "1")
    ran = pair.here(*words, "--resume", "--quiet")
    assert (ran.rc, ran.out, ran.err) == (0, "", "")
    assert folder(pair.folder / "out") == wanted
    assert len(made) == 23 - 7


def test_without_resume_an_error_leaves_nothing(pair: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 7)
    with pytest.raises(Cut):
        extract(pair)
    assert left(pair.folder) == []


def test_another_option_model_or_base_is_refused_and_named(
    pair: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = unfinished(pair, monkeypatch)
    before = {str(p): p.read_bytes() for p in stage.rglob("*") if p.is_file()}
    other = pair.save("other", {name: torch.zeros(shape) for name, shape in llama(3).items()})
    for asked, says in (
        ({"rank": 7}, "rank was 8, is 7"),
        ({"energy": 0.9}, "rank was 8, is nothing; energy was nothing, is 0.9"),
        ({"model": other.name}, "model.model.safetensors is no longer the file it was"),
    ):
        with pytest.raises(ResourceError, match="something has changed") as caught:
            extract(pair, resume=True, **asked)
        assert says in str(caught.value)
    for name, file in (("base", "config.json"), ("model", "model.safetensors"),
                       ("base", "model.safetensors")):  # fmt: skip
        os.utime(pair.folder / ("a" if name == "model" else name) / file, ns=(1, 1))
        with pytest.raises(ResourceError, match="something has changed") as caught:
            extract(pair, resume=True)
        assert f"{name}.{file} is no longer the file it was" in str(caught.value)
    assert {str(p): p.read_bytes() for p in stage.rglob("*") if p.is_file()} == before


def test_a_merge_does_not_take_up_an_extraction(pair: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished(pair, monkeypatch)
    recipe = pair.recipe({"method": "linear", "output": {"format": "adapter", "rank": 8}})
    for options in ({}, {"resume": True}):
        with pytest.raises(ResourceError, match="cut off|something has changed"):
            api.merge(recipe, pair.folder / "out", **options)


def test_an_input_that_changes_meanwhile_is_an_error(
    pair: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, file = Journal.finished, pair.folder / "a/model.safetensors"

    def touched(self: Journal, *args: Any) -> None:
        finished(self, *args)
        os.utime(file, ns=(1, 1))

    monkeypatch.setattr(Journal, "finished", touched)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while"):
        extract(pair)
    assert left(pair.folder) == [] and not (pair.folder / "out").exists()


KILLED = """
import random, shutil, sys
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from killing import killed, steps
from test_resume import folder
from mowmerge import api, updates
from mowmerge.checkpoint.journal import Journal
from mowmerge.tensors import torch
torch.set_num_threads(1)
true, draws, repeated, early = updates._factors, random.Random(5), 0, 0

def noted(difference, name, cut):
    with open("log", "a") as log:
        log.write(name + "\\n")
    return true(difference, name, cut)

def run(out="out"):
    updates._factors = noted
    api.extract_lora("a", "base", out, rank=8, workers=2, resume=True)

wanted = folder(api.extract_lora("a", "base", "wanted", rank=8, workers=2).path)
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
    zoo.family(llama(layers=2, hidden=64), 1)
    ran = zoo.python(KILLED, kills, Path(__file__).parent)
    assert ran.rc == 0, ran.err
    repeated, early, *leftovers = ran.out.split()
    assert int(repeated) == 0
    assert leftovers == []
    assert int(early) > kills / 4
