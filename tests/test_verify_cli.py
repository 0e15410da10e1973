"""`mowmerge verify`: exit codes, and what is printed where."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from zoo import Zoo

from mowmerge.checkpoint.writer import sha256


@pytest.fixture
def out(zoo: Zoo) -> Path:
    zoo.family("llama", 2)
    zoo.merge({"method": "linear", "output": {"shard_size": "6kB"}}, hashes=True)
    return zoo.folder / "out"


@pytest.mark.parametrize("method", ["linear", "mow"])
def test_what_was_written_is_as_it_was_written(zoo: Zoo, method: str) -> None:
    zoo.family("llama", 2)
    heads = {"heads": {"match": "lm_head*"}} if method == "linear" else {}
    zoo.merge({"method": method, **heads}, hashes=True)
    ran = zoo.here("verify", "out")
    assert (ran.rc, ran.err) == (0, "")
    assert ran.out.endswith("as written, and all finite\n")
    assert zoo.here("verify", "out", "-q") == type(ran)(0, "", "")
    (zoo.folder / "out/notes.txt").write_text("")
    ran = zoo.here("verify", "out", "--json")
    told = json.loads(ran.out)
    assert (ran.rc, told["ok"], told["problems"]) == (0, True, [])
    assert told["unlisted"] == ["notes.txt"]
    assert {"tokenizer.json", "config.json", "recipe.lock.yaml"} <= set(told["files"])
    ran = zoo.here("verify", "out")
    assert (ran.rc, ran.err) == (0, "warning: notes.txt is in no line of SHA256SUMS\n")


def rehash(out: Path, name: str) -> None:
    """Makes SHA256SUMS true again."""
    lines = [x.split("  ") for x in (out / "SHA256SUMS").read_text().splitlines()]
    held = [f"{sha256(out / n) if n == name else digest}  {n}\n" for digest, n in lines]
    (out / "SHA256SUMS").write_text("".join(held))


def flipped(out: Path, shard: Path) -> str:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return f"{shard.name} is not what SHA256SUMS says"


def nan(out: Path, shard: Path) -> str:
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, shard, {"format": "pt"})
    rehash(out, shard.name)
    return f"tensor '{name}' has 1 values that are NaN or Inf"


def lost(out: Path, shard: Path) -> str:
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    rehash(out, shard.name)
    return f"first '{name}'"


def moved(out: Path, shard: Path) -> str:
    file = out / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    other = sorted(set(index["weight_map"].values()) - {shard.name})[0]
    name = sorted(n for n, where in index["weight_map"].items() if where == shard.name)[0]
    index["weight_map"][name] = other
    file.write_text(json.dumps(index))
    rehash(out, file.name)
    return f"tensor '{name}' is in {shard.name}, and the index says {other}"


@pytest.mark.parametrize("harm", [flipped, nan, lost, moved])
def test_what_is_wrong_is_said_with_exit_code_4(zoo: Zoo, out: Path, harm: Any) -> None:
    says = harm(out, sorted(out.glob("*.safetensors"))[0])
    ran = zoo.here("verify", "out")
    assert (ran.rc, ran.out, says in ran.err) == (4, "", True), ran.err
    ran = zoo.here("verify", "out", "--json")
    told = json.loads(ran.out)
    assert (ran.rc, told["ok"], ran.err) == (4, False, "")
    assert any(says in problem["message"] for problem in told["problems"])


def test_no_folder_is_no_source(zoo: Zoo) -> None:
    ran = zoo.here("verify", "nowhere")
    assert (ran.rc, "there is no folder 'nowhere'" in ran.err) == (5, True)
