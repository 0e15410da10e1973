"""Runs that are cut off: nothing is left, or a whole checkpoint; no file and no thread leaks."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from zoo import Zoo, environment, left

from mowmerge.errors import CheckpointError

KILLED = """
import hashlib, random, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from killing import killed, steps
from mowmerge import merge
from mowmerge.tensors import torch
torch.set_num_threads(1)
merge("recipe.yaml", "first")

def whole(out):
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        if hashlib.sha256((out / name).read_bytes()).hexdigest() != digest:
            return False
    return (out / "config.json").exists() and (out / "report.json").exists()

def run():
    merge("recipe.yaml", "out", force=True)

out, early = Path("out"), 0
last, draws = steps(run), random.Random(5)
for i in range(int(sys.argv[1])):
    killed(run, draws.randrange(last))
    early += Path(".out.partial").exists()
    if out.exists() and not whole(out):
        sys.exit(f"killed run {i} left a broken checkpoint")
    if i % 2:
        shutil.rmtree(out, ignore_errors=True)
merge("recipe.yaml", "out", force=True)
if not whole(out):
    sys.exit("the run after the kills is broken")
print(early, *(p.name for p in Path().glob(".*")))
"""


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_nothing_or_a_whole_checkpoint(zoo: Zoo, kills: int) -> None:
    zoo.family({f"model.layers.{i}.mlp.up_proj.weight": (600, 1000) for i in range(4)}, 2)
    zoo.recipe({"method": "linear", "output": {"shard_size": "4MB"}})
    ran = zoo.python(KILLED, kills, Path(__file__).parent)
    assert ran.rc == 0, ran.err
    in_the_middle, *leftovers = ran.out.split()
    assert leftovers == []
    assert int(in_the_middle) > kills / 4


def test_ctrl_c_says_so_and_leaves_nothing(zoo: Zoo) -> None:
    zoo.family({f"model.layers.{i}.mlp.up_proj.weight": (3000, 1000) for i in range(8)}, 2)
    recipe = zoo.recipe({"method": "ties"})
    child = subprocess.Popen(
        [sys.executable, "-m", "mowmerge", "merge", str(recipe), "out"], cwd=zoo.folder,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else as the runner's
    )  # fmt: skip
    stage = zoo.folder / ".out.partial"
    waited = time.monotonic() + 60
    while not list(stage.rglob("*.safetensors")) and time.monotonic() < waited:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err
    assert out == ""
    assert not (zoo.folder / "out").exists()
    assert left(zoo.folder) == []


def test_an_error_leaks_no_file_and_no_thread(zoo: Zoo) -> None:
    models = zoo.family({f"w{i}": (300, 300) for i in range(6)}, 3, shards=2)
    models["b"]["w5"][0, 0] = math.nan
    zoo.save("b", models["b"], shards=2)
    inner = {"method": "ties", "models": {"a": "./a", "b": "./b"}, "base": "./base"}
    nested = {"method": "linear", "models": {"n": {"source": inner}}}
    for i in range(3):
        if i == 1:
            threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for content in ({"method": "ties"}, nested):
            with pytest.raises(CheckpointError, match="model 'b'"):
                zoo.merge(content, workers=3)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files
