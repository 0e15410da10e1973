"""The writer: every byte's place known beforehand; a folder that is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from zoo import Zoo, environment, left, load, raw

from mowmerge import api
from mowmerge.checkpoint import writer
from mowmerge.checkpoint.layout import ALIGN, index, layout
from mowmerge.checkpoint.writer import Staging
from mowmerge.errors import ResourceError
from mowmerge.plan import Shard
from mowmerge.tensors import DTYPES, TensorSpec

MERGE = {"method": "linear", "output": {"shard_size": "4kB"}}
KNOWN = [code for code, dtype in DTYPES.items() if dtype.kind != "packed"]
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def any_specs(draw: Any) -> list[TensorSpec]:
    keys = draw(st.lists(names.filter(lambda n: n != "__metadata__"), min_size=1, unique=True))
    return [TensorSpec(key, draw(st.sampled_from(KNOWN)), draw(shapes)) for key in keys]


def write(folder: Path, shards: list[Shard]) -> None:
    for shard in shards:
        content = shard.header.ljust(shard.nbytes, b"\1")
        (folder / shard.file).write_bytes(content)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(specs=any_specs(), size=st.integers(1, 3000))
def test_any_layout_is_read_by_safetensors(specs: list[TensorSpec], size: int) -> None:
    shards = layout(specs, size, {"format": "pt"})
    place = {spec.name: spec for spec in specs}
    assert sorted(place) == sorted(name for s in shards for name in s.offsets)
    with TemporaryDirectory() as folder:
        write(Path(folder), shards)
        for i, shard in enumerate(shards, 1):
            single = len(shards) == 1
            name = f"model-{i:05d}-of-{len(shards):05d}" if not single else "model"
            assert shard.file == f"{name}.safetensors"
            assert len(shard.header) % ALIGN == 0
            held = [place[name] for name in shard.offsets]
            assert [s.itemsize for s in held] == sorted((s.itemsize for s in held), reverse=True)
            end = len(shard.header)
            for spec in held:
                assert shard.offsets[spec.name] == end
                assert (end - len(shard.header)) % spec.itemsize == 0
                end += spec.nbytes
            assert end == shard.nbytes
            assert sum(s.nbytes for s in held) <= size or len([s for s in held if s.nbytes]) == 1
            with safe_open(Path(folder) / shard.file, "np") as file:
                assert set(file.keys()) == set(shard.offsets)
                assert file.metadata() == {"format": "pt"}
                for spec in held:
                    part = file.get_slice(spec.name)
                    assert (part.get_shape(), part.get_dtype()) == (list(spec.shape), spec.dtype)
    listing = index(shards, place)
    if len(shards) == 1:
        assert listing is None
        return
    assert listing is not None
    found = json.loads(listing)
    assert found["metadata"] == {
        "total_parameters": sum(s.numel for s in specs), "total_size": sum(s.nbytes for s in specs)
    }  # fmt: skip
    assert found["weight_map"] == {n: s.file for s in shards for n in s.offsets}
    assert list(found["weight_map"]) == sorted(place)


# --- the staged folder


@pytest.fixture
def two(zoo: Zoo) -> Zoo:
    zoo.family("llama", 2)
    return zoo


def whole(zoo: Zoo) -> bool:
    """Whether the output is there and loads, with nothing left beside it."""
    return set(load(zoo.folder / "out")) == set(load(zoo.folder / "base")) and not left(zoo.folder)


def nothing(zoo: Zoo) -> bool:
    return not (zoo.folder / "out").exists() and left(zoo.folder) == []


def test_commit_and_replace(two: Zoo) -> None:
    two.merge(MERGE)
    assert whole(two)
    (two.folder / "out" / "old").write_text("")
    with pytest.raises(ResourceError, match="is not empty") as caught:
        two.merge(MERGE)
    assert "--force" in caught.value.problems[0].hint
    assert (two.folder / "out" / "old").exists()
    two.merge(MERGE, force=True)
    assert whole(two)
    assert not (two.folder / "out" / "old").exists()


def test_an_empty_folder_and_a_linked_one_are_taken(two: Zoo) -> None:
    (two.folder / "out").mkdir()
    two.merge(MERGE)
    assert whole(two)
    (two.folder / "link").symlink_to("out")
    two.merge(MERGE, "link", force=True)
    assert whole(two)
    assert (two.folder / "link").is_symlink()


def test_force_replaces_nothing_but_checkpoints(two: Zoo) -> None:
    (two.folder / "out").mkdir()
    (two.folder / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ResourceError, match="does not look like one"):
        two.merge(MERGE, force=True)
    (two.folder / "file").write_text("mine")
    with pytest.raises(ResourceError, match="is a file"):
        two.merge(MERGE, "file", force=True)
    assert (two.folder / "out" / "thesis.txt").read_text() == "mine"
    assert left(two.folder) == []


@pytest.mark.parametrize("out", ["a", ".", "..", "/", "b/../a", "link"])
def test_an_output_that_holds_an_input_is_refused(two: Zoo, out: str) -> None:
    (two.folder / "link").symlink_to("b")
    before = sorted(p.name for p in two.folder.iterdir())
    with pytest.raises(ResourceError, match="holds one of the inputs"):
        two.merge(MERGE, out, force=True)
    after = sorted(p.name for p in two.folder.iterdir())
    assert [name for name in after if name != "recipe.yaml"] == before


def test_nested_inputs_are_inputs(two: Zoo) -> None:
    inner = {"method": "linear", "models": {"a": "./a", "b": "./b"}}
    with pytest.raises(ResourceError, match="holds one of the inputs"):
        two.merge({"method": "linear", "models": {"n": {"source": inner}}}, "a", force=True)


def test_a_second_merge_is_told_to_wait(two: Zoo) -> None:
    out = two.folder / "out"
    with Staging(out) as first:
        (first.path / "half").write_text("")
        with pytest.raises(ResourceError, match="another merge is writing to"):
            two.merge(MERGE)
        assert (first.path / "half").exists()
        two.recipe(MERGE)
        ran = two.cli("merge", "recipe.yaml", "out")
        assert (ran.rc, "another merge is writing to" in ran.err) == (6, True)
    two.merge(MERGE)
    assert whole(two)


def test_leftovers_of_a_killed_run_are_cleared(two: Zoo) -> None:
    stage = two.folder / ".out.partial"
    (stage / "1_Pooling").mkdir(parents=True)
    (stage / "stale.safetensors").write_text("")
    two.merge(MERGE)
    assert whole(two)
    assert not (two.folder / "out" / "stale.safetensors").exists()


def test_a_replacement_that_was_cut_off_is_restored(two: Zoo) -> None:
    two.merge(MERGE)
    wanted = raw(load(two.folder / "out"))
    (two.folder / "out").rename(two.folder / ".out.replaced")
    with pytest.raises(ResourceError, match="is not empty"):  # what was there counts as there
        two.merge(MERGE)
    assert raw(load(two.folder / "out")) == wanted
    assert left(two.folder) == []


def test_a_replacement_that_was_cut_off_at_its_end_is_finished(two: Zoo) -> None:
    two.merge(MERGE)
    shutil.copytree(two.folder / "out", two.folder / ".out.replaced")
    two.merge(MERGE, force=True)
    assert whole(two)


def test_a_rename_that_fails_leaves_what_was_there(
    two: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.merge(MERGE)
    wanted, rename = raw(load(two.folder / "out")), Path.rename

    def denied(self: Path, target: Path) -> Path:
        if self.parent.name == ".out.partial":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", denied)
    with pytest.raises(ResourceError, match="cannot write"):
        two.merge({"method": "ties"}, force=True)
    assert raw(load(two.folder / "out")) == wanted
    assert left(two.folder) == []


# --- a system that says no


def test_short_writes_are_continued(two: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = raw(two.merge(MERGE, "wanted")[0])
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    assert raw(two.merge(MERGE)[0]) == wanted


def test_without_pwrite_and_fallocate(two: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = raw(two.merge(MERGE, "wanted")[0])
    monkeypatch.delattr(os, "pwrite")
    monkeypatch.delattr(os, "posix_fallocate")
    assert raw(two.merge(MERGE, workers=1)[0]) == wanted


def counted(monkeypatch: pytest.MonkeyPatch, name: str, fail_at: int, code: int) -> list[int]:
    """Makes the n-th call of an os function fail; the list counts the calls."""
    real: Callable[..., Any] = getattr(os, name)
    calls: list[int] = []

    def call(*args: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == fail_at:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, name, call)
    return calls


@pytest.mark.parametrize("name", ["pwrite", "posix_fallocate"])
def test_a_full_disk_at_any_call_leaves_nothing(
    two: Zoo, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        calls = counted(patch, name, 0, errno.ENOSPC)
        two.merge(MERGE, "fine")
        total = len(calls)
    assert total > 2
    for n in range(1, total + 1):
        with monkeypatch.context() as patch:
            counted(patch, name, n, errno.ENOSPC)
            with pytest.raises(ResourceError, match="cannot write: No space left") as caught:
                two.merge(MERGE)
        assert caught.value.exit_code == 6
        assert "free some space" in caught.value.problems[0].hint
        assert nothing(two), n


def test_a_full_disk_beside_the_weights_leaves_nothing(
    two: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = two.recipe(MERGE)
    for place, name in ((shutil, "copyfile"), (Path, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(ResourceError, match="No space left"):
                api.merge(recipe, two.folder / "out")
        assert nothing(two)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_where_files_cannot_be_allocated_they_are_extended(
    two: Zoo, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    two.merge(MERGE)
    assert whole(two)


def test_a_disk_too_small_is_seen_before_anything_is_written(
    two: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9, writer.SPARE)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    calls = counted(monkeypatch, "posix_fallocate", 0, 0)
    with pytest.raises(ResourceError, match="the disk is too small") as caught:
        two.merge(MERGE)
    assert caught.value.exit_code == 6
    assert calls == []
    assert nothing(two)


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes by prlimit")
def test_a_real_limit_through_the_command_line(two: Zoo) -> None:
    recipe = two.recipe({"method": "linear"})
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "from mowmerge.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", str(recipe), "out"], cwd=two.folder, text=True,
        env=environment(), capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert "cannot write: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert nothing(two)
