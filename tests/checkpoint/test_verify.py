"""A folder is what was written, or every way in which it is not is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import Zoo, rewrite

from mowmerge.checkpoint.verify import Verified, verify
from mowmerge.checkpoint.writer import sha256
from mowmerge.errors import SourceError

SHARDS = {"method": "linear", "output": {"shard_size": "8kB"}}


@pytest.fixture
def merged(zoo: Zoo) -> Path:
    """A static merge in several shards."""
    zoo.family("llama", 2)
    zoo.merge(SHARDS, hashes=True)
    return zoo.folder / "out"


@pytest.fixture
def dynamic(zoo: Zoo) -> Path:
    """A dynamic merge."""
    zoo.family("llama", 2)
    zoo.merge({"method": "wemoe"}, hashes=True)
    return zoo.folder / "out"


def said(found: Verified) -> list[str]:
    return [problem.message for problem in found.problems]


def resum(folder: Path, name: str) -> None:
    """Makes SHA256SUMS say of a file what it is now."""
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    kept = [line for line in lines if not line.endswith(f"  {name}")]
    text = "\n".join([*kept, f"{sha256(folder / name)}  {name}"])
    (folder / "SHA256SUMS").write_text(text + "\n")


@pytest.mark.parametrize("kind", ["merged", "dynamic"])
def test_what_was_written_is_whole(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    moved: list[int] = []
    total: list[int] = []
    found = verify(folder, finite=True, begin=lambda n: total.append(n) or moved.append)
    assert (found.problems, found.unlisted) == ((), ())
    there = {p.name for p in folder.iterdir()} - {"README.md", "report.json", "SHA256SUMS"}
    assert set(found.sums) == there
    assert found.nbytes == sum((folder / name).stat().st_size for name in there)
    assert found.tensors == sum(len(load_file(p)) for p in folder.glob("*.safetensors"))
    assert [sum(moved)] == total


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.1"}\n'),
        "tokenizer.json is not what SHA256SUMS says",
    ),
    "a lost file": (
        lambda f: (f / "generation_config.json").unlink(),
        "generation_config.json is not there",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "a lost shard": (
        lambda f: next(f.glob("model-00002*")).unlink(),
        "the shard model-00002-of-00003.safetensors that the index names is not there",
    ),
    "a cut shard": (
        lambda f: os.truncate(next(f.glob("model-00002*")), 4000),
        "the file is truncated",
    ),
    "no sums": (lambda f: (f / "SHA256SUMS").unlink(), "there is no SHA256SUMS"),
    "a line of noise": (
        lambda f: (f / "SHA256SUMS").write_text("noise\n"), "not a digest and a file of this folder"
    ),
    "a path out of the folder": (
        lambda f: (f / "SHA256SUMS").write_text(f"{'0' * 64}  ../secret\n"),
        "not a digest and a file of this folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(DAMAGE))
def test_damage_is_named(merged: Path, what: str) -> None:
    damage, words = DAMAGE[what]
    damage(merged)
    assert any(words in line for line in said(verify(merged)))


def test_all_damage_is_named_at_once(merged: Path) -> None:
    (merged / "tokenizer.json").write_text("{}")
    (merged / "LICENSE").unlink()
    (merged / "config.json").unlink()
    assert len(verify(merged).problems) == 4  # the config is both missing and listed


def test_a_merge_of_bare_weights_has_no_config(zoo: Zoo) -> None:
    for model in ("base", "a", "b"):
        folder = zoo.folder / model
        folder.mkdir()
        save_file({"w": torch.randn(4, 6)}, folder / "model.safetensors")
    zoo.merge({"method": "ties", "models": {"a": "./a", "b": "./b"}, "base": "./base"}, hashes=True)
    out = zoo.folder / "out"
    assert not (out / "config.json").exists()
    found = verify(out, finite=True)
    assert (found.problems, found.tensors) == ((), 1)
    (out / "SHA256SUMS").unlink()
    assert said(verify(out))[1] == "there is no config.json, or an empty one"


def test_a_tensor_has_to_be_where_the_index_says(merged: Path) -> None:
    index = merged / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    held["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    del held["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(held))
    resum(merged, index.name)
    lines = "\n".join(said(verify(merged)))
    assert "tensor 'lm_head.weight' is in model-00001-of-00003.safetensors" in lines
    assert "and the index says no file" in lines
    assert "tensor 'model.norm.weight' is in" in lines


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_found_where_it_is_looked_for(
    zoo: Zoo, value: float, dtype: torch.dtype
) -> None:
    zoo.family("llama", 2, dtype=dtype)
    zoo.merge({"method": "linear"}, hashes=True)
    file = zoo.folder / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3:5] = value
    save_file(tensors, file, {"format": "pt"})
    resum(zoo.folder / "out", file.name)
    assert verify(zoo.folder / "out").problems == ()
    assert said(verify(zoo.folder / "out", finite=True)) == [
        "tensor 'model.norm.weight' has 2 values that are NaN or Inf"
    ]


def test_a_dynamic_checkpoint_needs_its_code_and_its_routers(dynamic: Path) -> None:
    def without(name: str) -> str:
        kept = (dynamic / name).read_bytes()
        (dynamic / name).unlink()
        found = "\n".join(said(verify(dynamic)))
        (dynamic / name).write_bytes(kept)
        return found

    assert "the modeling code modeling.py is not there" in without("modeling.py")
    assert "the modeling code codecs.py is not there" in without("codecs.py")
    assert "the shard router.safetensors that the index names is not there" in without(
        "router.safetensors"
    )
    assert "there is no config.json" in without("config.json")
    assert said(verify(dynamic)) == []


def test_a_router_file_with_other_shapes_is_found(dynamic: Path) -> None:
    file = dynamic / "router.safetensors"
    held = load_file(file)
    wide = {k: torch.cat([v, v]) if v.dim() == 2 else v for k, v in held.items()}
    save_file(wide, file, {"format": "pt"})
    resum(dynamic, file.name)
    assert "and config.json says" in "\n".join(said(verify(dynamic)))


def test_kept_heads_have_to_be_complete(zoo: Zoo) -> None:
    models = zoo.family("bert", 2)
    for name, tensors in models.items():
        zoo.save(name, tensors | {"classifier.weight": torch.ones(3, 16)})
    zoo.merge({"method": "linear", "heads": {"match": "classifier.*"}}, hashes=True)
    assert verify(zoo.folder / "out").problems == ()
    file = zoo.folder / "out" / "heads" / "a.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 4)
    found = said(verify(zoo.folder / "out"))
    assert found[0].startswith("the file is truncated")
    assert found[1] == "heads/a.safetensors is not what SHA256SUMS says"


def test_files_of_others_are_told_apart(merged: Path) -> None:
    (merged / "notes.txt").write_text("mine")
    (merged / "sub").mkdir()
    shutil.copy(merged / "LICENSE", merged / "sub")
    found = verify(merged)
    assert (found.problems, found.unlisted) == ((), ("notes.txt", "sub/LICENSE"))


def test_there_has_to_be_a_folder(zoo: Zoo) -> None:
    with pytest.raises(SourceError, match="there is no folder"):
        verify(zoo.folder / "nothing")


def test_a_corrupt_header_is_a_problem_and_no_traceback(merged: Path) -> None:
    rewrite(next(merged.glob("model-00001*")), lambda header: header.update(x=3))
    assert any("the header is corrupt" in line for line in said(verify(merged)))
