"""Merges that are cut off and taken up: only what is unfinished is done, and the bytes are those of
a merge that ran through."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import Zoo, left, llama

from mowmerge import api, lock
from mowmerge.checkpoint import journal
from mowmerge.checkpoint.writer import ShardSink
from mowmerge.errors import CheckpointError, MowmergeError, ResourceError
from mowmerge.planner import Options

TIES = {"method": "ties", "output": {"shard_size": "2kB"}}
INNER = {"method": "ties", "base": "./base", "models": {"a": "./a", "b": "./b"}}
NESTED = {"method": "linear", "models": {"n": {"source": INNER}, "c": "./c"}}
WAYS = {
    "ties": TIES,
    "dare": {"method": "dare", "parameters": {"density": 0.5}, "output": {"dtype": "bfloat16"}},
    "nested": NESTED,
    "knots": {"method": "knots", "parameters": {"density": 0.4}},
    "opcm": {"method": "opcm"},
    "mow": {"method": "mow"},
    "emr": {"method": "emr"},
    "heads": {"method": "linear", "heads": {"match": "lm_head*"}},
}


class Cut(Exception):
    """Stands for whatever ends a run."""


def folder(out: Path) -> dict[str, Any]:
    """Every file of an output, the report without what a clock says."""
    found: dict[str, Any] = {
        p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()
    }
    report = json.loads(found["report.json"])
    for part in (report, *report["tensors"], report.get("fit", {})):
        part.pop("seconds", None)
    return {**found, "report.json": report}


def merge(zoo: Zoo, content: Mapping[str, Any], out: str = "out", **kwargs: Any) -> dict[str, Any]:
    """One run; the files that it wrote."""
    options = Options(workers=kwargs.pop("workers", 1))
    return folder(api.merge(zoo.recipe(content), zoo.folder / out, options=options, **kwargs).path)


@pytest.fixture
def family(zoo: Zoo) -> Zoo:
    zoo.family("llama", 3)
    return zoo


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are written, in order."""
    names: list[str] = []
    real = ShardSink.write

    def write(self: ShardSink, name: str, start: int, data: memoryview) -> None:
        names.append(name)
        real(self, name, start, data)

    monkeypatch.setattr(ShardSink, "write", write)
    return names


def cut(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ends a run when that many tensors are finished."""
    real, count = journal.Journal.finished, [0]

    def finished(self: journal.Journal, *args: Any) -> None:
        if count[0] == after:
            raise Cut
        count[0] += 1
        real(self, *args)

    monkeypatch.setattr(journal.Journal, "finished", finished)


@pytest.mark.parametrize("way", WAYS)
def test_the_work_of_a_run_that_was_cut_off_is_taken_up(
    family: Zoo, way: str, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = merge(family, WAYS[way], "wanted")
    with monkeypatch.context() as patch:
        cut(patch, 7)
        with pytest.raises(Cut):
            merge(family, WAYS[way], resume=True)
    assert not (family.folder / "out").exists()
    lines = (family.folder / ".out.partial/journal-0.jsonl").read_text().splitlines()
    done = [json.loads(line[9:])["tensor"] for line in lines if '"tensor":' in line[:20]]
    assert len(done) == 7
    written.clear()
    assert merge(family, WAYS[way], resume=True) == wanted
    assert not set(done) & set(written)
    assert len(set(written)) >= 12  # of 21
    assert left(family.folder) == []


def test_a_statistic_of_the_whole_model_is_not_taken_again(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mowmerge.engine import Engine

    wanted = merge(family, TIES, "wanted")
    with monkeypatch.context() as patch:
        cut(patch, 1)
        with pytest.raises(Cut):
            merge(family, TIES, resume=True)

    def settle(*args: Any) -> None:
        raise AssertionError("the journal has it")

    monkeypatch.setattr(Engine, "_settle_group", settle)
    assert merge(family, TIES, resume=True) == wanted


def test_workers_and_memory_may_change(family: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = merge(family, TIES, "wanted", workers=3)
    unfinished(family, monkeypatch, TIES)
    assert merge(family, TIES, resume=True, workers=3) == wanted


def test_progress_begins_where_the_work_does(family: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        cut(patch, 5)
        with pytest.raises(Cut):
            merge(family, TIES, resume=True)
    moves: list[int] = []
    total = []

    def begin(plan: Any) -> Callable[[int], None]:
        total.append(plan.data_bytes)
        return moves.append

    merge(family, TIES, resume=True, begin=begin)
    assert moves[0] > 0
    assert sum(moves) == total[0]


def unfinished(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, content: Mapping[str, Any]) -> Path:
    """A merge that was cut off after seven tensors; its stage."""
    with monkeypatch.context() as patch:
        cut(patch, 7)
        with pytest.raises(Cut):
            merge(zoo, content, resume=True)
    return zoo.folder / ".out.partial"


def test_without_resume_it_is_refused_and_nothing_is_lost(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = merge(family, TIES, "wanted")
    stage = unfinished(family, monkeypatch, TIES)
    with pytest.raises(ResourceError, match=r"cut off when 7 tensor\(s\) were done") as caught:
        merge(family, TIES)
    assert caught.value.problems[0].hint == "--resume takes it up, --force starts afresh"
    assert stage.is_dir()
    ran = family.cli("merge", "recipe.yaml", "out", "--resume", "--json", "--workers", "1")
    assert (ran.rc, ran.err) == (0, "")
    assert folder(family.folder / "out") == wanted


def test_force_starts_afresh(
    family: Zoo, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = merge(family, TIES, "wanted")
    unfinished(family, monkeypatch, TIES)
    written.clear()
    assert merge(family, TIES, force=True) == wanted
    assert len(set(written)) == 21


def test_resume_of_nothing_is_a_merge(family: Zoo) -> None:
    assert merge(family, TIES, resume=True) == merge(family, TIES, "wanted")
    with pytest.raises(ResourceError, match="is not empty"):
        merge(family, TIES, resume=True)


def test_an_error_without_resume_leaves_nothing(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, 7)
    with pytest.raises(Cut):
        merge(family, TIES)
    assert left(family.folder) == []


CHANGES = {
    "parameters.density was 0.2, is 0.3": {**TIES, "parameters": {"density": 0.3}},
    "method was": {**TIES, "method": "dare"},
    "output.shard_size was 2000, is 5000": {**TIES, "output": {"shard_size": 5000}},
}


@pytest.mark.parametrize("says", CHANGES)
def test_another_recipe_is_refused_with_what_changed(
    family: Zoo, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = unfinished(family, monkeypatch, TIES)
    before = folder_bytes(stage)
    with pytest.raises(ResourceError, match="something has changed") as caught:
        merge(family, CHANGES[says], resume=True)
    assert says in str(caught.value)
    assert caught.value.exit_code == 6
    assert folder_bytes(stage) == before


def folder_bytes(stage: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in stage.rglob("*") if p.is_file()}


def test_a_comment_or_another_name_is_no_change(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(family, monkeypatch, TIES)
    recipe = family.folder / "recipe.yaml"
    renamed = family.folder / "other.yaml"
    renamed.write_text("# a comment\n" + recipe.read_text())
    done = api.merge(renamed, family.folder / "out", options=Options(workers=1), resume=True)
    assert done.report["recipe"] == "other"


@pytest.mark.parametrize("way", ["ties", "nested"])
def test_another_input_is_refused_and_named(
    family: Zoo, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(family, monkeypatch, WAYS[way])
    file = family.folder / "b/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    model = {"ties": "b", "nested": "n-b"}[way]
    match = rf"{model}\.model\.safetensors is no longer the file it was"
    with pytest.raises(ResourceError, match=match):
        merge(family, WAYS[way], resume=True)


def test_another_torch_is_refused(family: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished(family, monkeypatch, TIES)
    monkeypatch.setattr(lock.torch, "__version__", "99.0", raising=False)
    with pytest.raises(ResourceError, match='torch was .*, is "99.0"'):
        merge(family, TIES, resume=True)


def test_an_input_that_changes_or_vanishes_during_a_run(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = merge(family, TIES, "wanted")
    file, aside = family.folder / "b/model.safetensors", family.folder / "aside"
    finished = journal.Journal.finished

    def touch(self: journal.Journal, *args: Any) -> None:
        finished(self, *args)
        if not aside.exists():
            aside.touch()
            os.utime(file, ns=(1, 1))

    def vanish(self: journal.Journal, *args: Any) -> None:
        finished(self, *args)
        if file.exists():
            file.rename(aside)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "finished", touch)
        with pytest.raises(CheckpointError, match="was changed while the merge was running"):
            merge(family, TIES)
    assert left(family.folder) == []
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "finished", vanish)
        with pytest.raises(CheckpointError, match="cannot be read any more"):
            merge(family, TIES, resume=True)
    aside.rename(file)
    assert merge(family, TIES, resume=True) == wanted


def fail_at(
    monkeypatch: pytest.MonkeyPatch, name: str, n: int, *, short: bool = False
) -> list[int]:
    """Lets the n-th call of an os function fail for want of room, or write but a part."""
    real: Callable[..., Any] = getattr(os, name)
    calls: list[int] = []

    def call(fd: int, data: Any, *rest: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == n and short:
            return real(fd, data[: max(1, len(data) // 2)], *rest)
        if len(calls) == n:
            if name == "write":
                real(fd, data[: len(data) // 2], *rest)  # a torn line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, *rest)

    monkeypatch.setattr(os, name, call)
    return calls


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_full_disk_as_a_state_is_kept(tmp_path: Path) -> None:
    """What writes it is not `os`: torch says of a full disk that its own stream is broken."""
    kept = journal.Journal(tmp_path)
    kept.begin({"merge": 1}, [])
    (tmp_path / "state-0.new").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match="No space left"):
        kept.keep_state(0, {"edge": torch.zeros(9)})
    kept.close()


@pytest.mark.parametrize("name", ["pwrite", "write"])
def test_a_full_disk_at_any_write_and_then_room_again(
    zoo: Zoo, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.family(llama(layers=1), 2)
    family, wanted = zoo, merge(zoo, TIES, "wanted")
    with monkeypatch.context() as patch:
        calls = fail_at(patch, name, 0)
        merge(family, TIES, "fine")
    assert len(calls) >= 12
    for n in range(1, len(calls) + 1):
        with monkeypatch.context() as patch:
            fail_at(patch, name, n)
            with pytest.raises(ResourceError, match="No space left"):
                merge(family, TIES, resume=True, workers=2)
        assert not (family.folder / "out").exists()
        assert merge(family, TIES, resume=True) == wanted, n
        shutil.rmtree(family.folder / "out")


@pytest.mark.parametrize("name", ["pwrite", "write"])
def test_short_writes_change_nothing(
    family: Zoo, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = merge(family, TIES, "wanted")
    real = getattr(os, name)
    monkeypatch.setattr(os, name, lambda fd, data, *rest: real(fd, data[:5000], *rest))
    unfinished(family, monkeypatch, TIES)
    assert merge(family, TIES, resume=True) == wanted


def test_a_torn_line_and_all_behind_it_count_for_nothing(
    family: Zoo, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = merge(family, TIES, "wanted")
    stage = unfinished(family, monkeypatch, TIES)
    kept = (stage / "journal-0.jsonl").read_bytes()
    lines = kept.splitlines(keepends=True)
    tensors = [i for i, line in enumerate(lines) if b'{"tensor"' in line]
    assert len(tensors) == 7
    hurt = bytearray(kept)
    hurt[len(b"".join(lines[: tensors[4]])) + 30] ^= 1
    for content, done in (
        (kept[:-1], 6), (kept[: -len(lines[-1]) // 2], 6), (bytes(hurt), 4),
        (lines[0][:40], 0), (b"", 0),
    ):  # fmt: skip
        copy = family.folder / ".again.partial"
        shutil.copytree(stage, copy)
        (copy / "journal-0.jsonl").write_bytes(content)
        written.clear()
        assert merge(family, TIES, "again", resume=True) == wanted
        assert len(set(written)) == 21 - done
        shutil.rmtree(family.folder / "again")


def test_a_journal_without_its_shards_counts_for_nothing(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = merge(family, TIES, "wanted")
    stage = unfinished(family, monkeypatch, TIES)
    first, second, *_ = sorted((stage / "checkpoint").glob("*.safetensors"))
    first.unlink()
    second.write_bytes(b"")
    assert merge(family, TIES, resume=True) == wanted


def test_after_a_loss_of_power_only_what_was_on_disk_counts(
    family: Zoo, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boot id is another, and what was written since the last sync is gone."""
    wanted = merge(family, TIES, "wanted")
    with monkeypatch.context() as patch:
        patch.setattr(journal, "SYNC_BYTES", 1)
        stage = unfinished(family, patch, TIES)
    lines = [json.loads(x[9:]) for x in (stage / "journal-0.jsonl").read_text().splitlines()]
    synced = [line["synced"] for line in lines if "synced" in line][-1]
    told = [line for line in lines if "tensor" in line or "fact" in line]
    assert 0 < synced <= len(told) == 8
    sure = {line["tensor"] for line in told[:synced] if "tensor" in line}
    plan = api.plan(family.recipe(TIES), options=Options(workers=1))
    for shard in plan.shards:
        content = bytearray((stage / "checkpoint" / shard.file).read_bytes())
        for name, at in shard.offsets.items():
            if name not in sure:
                content[at : at + plan.specs[name].nbytes] = bytes(plan.specs[name].nbytes)
        (stage / "checkpoint" / shard.file).write_bytes(content)
    other = family.folder / "boot_id"
    other.write_text("another")
    monkeypatch.setattr(journal, "_BOOT", other)
    written.clear()
    assert merge(family, TIES, resume=True) == wanted
    assert set(written) == set(plan.specs) - sure


def test_bytes_are_forced_to_disk_before_the_line_that_says_so(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two `synced` lines every shard is synced, after the lines they vouch for."""
    events: list[str] = []
    append, sync, finished = journal.Journal._append, journal.sync, journal.Journal.finished

    def waited(self: journal.Journal, *args: Any) -> None:
        finished(self, *args)
        if self._syncing:
            self._syncing.result()

    def noted(self: journal.Journal, content: Mapping[str, Any]) -> None:
        events.append(f"synced {content['synced']}" if "synced" in content else "line")
        append(self, content)

    def synced(file: Path) -> None:
        events.append(file.name)
        sync(file)

    monkeypatch.setattr(journal, "SYNC_BYTES", 3000)
    monkeypatch.setattr(journal.Journal, "_append", noted)
    monkeypatch.setattr(journal.Journal, "finished", waited)
    monkeypatch.setattr(journal, "sync", synced)
    merge(family, TIES)
    shards = {shard.file for shard in api.plan(family.recipe(TIES)).shards}
    marks = [i for i, event in enumerate(events) if event.startswith("synced")]
    assert len(marks) > 1
    for before, at in zip([0, *marks], marks, strict=False):
        covered = int(events[at].split()[1])
        lines = [i for i, event in enumerate(events) if event == "line"][:covered]
        first = min(i for i in range(before, at) if events[i] in shards and i > lines[-1])
        assert {e for e in events[first:at] if e != "line"} == shards


def test_what_the_disk_refuses_to_keep_is_an_error(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path) -> None:
        if file.suffix == ".safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(journal, "sync", refuse)
        with pytest.raises(ResourceError, match="Input/output error"):
            merge(family, TIES)
    assert left(family.folder) == []


def test_an_extraction_does_not_wipe_an_unfinished_merge(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = unfinished(family, monkeypatch, TIES)
    merge(family, {"method": "mow"}, "dynamic")
    with pytest.raises(MowmergeError, match="was cut off"):
        api.extract(family.folder / "dynamic", family.folder / "out", expert="a")
    assert stage.is_dir()


KILLED = """
import random, shutil, sys
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from killing import killed, steps
from test_resume import folder
from mowmerge import merge
from mowmerge.checkpoint import journal
from mowmerge.checkpoint.writer import ShardSink
from mowmerge.planner import Options
from mowmerge.tensors import torch
torch.set_num_threads(1)
ways, draws = ["ties", "nested", "mow"], random.Random(5)
wanted, last, repeated, early = {}, {}, 0, 0
write = ShardSink.write

def noted(self, name, start, data):
    write(self, name, start, data)
    with open("log", "a") as log:
        log.write(name + "\\n")

def known(out):
    held = journal.Journal(Path(f".{out}.partial"))
    held.read()
    return set(held.done)

def run(way, out):
    ShardSink.write = noted
    merge(f"{way}.yaml", out, options=Options(workers=2), resume=True)

for way in ways:
    wanted[way] = folder(merge(f"{way}.yaml", f"{way}-wanted", options=Options(workers=2)).path)
    last[way] = steps(partial(run, way, f"{way}-counted"))
for i in range(int(sys.argv[1])):
    way = ways[i % len(ways)]
    out = f"{way}-out"
    done = known(out)
    Path("log").write_text("")
    killed(partial(run, way, out), draws.randrange(last[way]))
    repeated += len(done & set(Path("log").read_text().split()))
    early += Path(f".{out}.partial").exists()
    if Path(out).exists():
        if folder(Path(out)) != wanted[way]:
            sys.exit(f"killed run {i} left something else")
        shutil.rmtree(out)
for way in ways:
    out = f"{way}-out"
    if killed(partial(run, way, out), -1) or folder(Path(out)) != wanted[way]:
        sys.exit(f"{way}: the run after the kills is another")
print(repeated, early, *(p.name for p in Path().glob(".*")))
"""


@pytest.mark.parametrize("kills", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_at_any_moment_cost_no_finished_tensor(zoo: Zoo, kills: int) -> None:
    zoo.family(llama(layers=4, hidden=192, vocab=400), 3)
    for way in ("ties", "nested", "mow"):
        zoo.recipe(WAYS[way], way)
    ran = zoo.python(KILLED, kills, Path(__file__).parent)
    assert ran.rc == 0, ran.err
    repeated, early, *leftovers = ran.out.split()
    assert int(repeated) == 0
    assert leftovers == []
    assert int(early) > kills / 3
