"""Merges under torchrun and accelerate: processes that share one merge, on CPUs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from test_ranks import WAYS as CHECKPOINTS
from test_ranks import files, single
from zoo import Ran, Zoo, environment, left

WAYS = CHECKPOINTS | {
    "adapter": {"method": "ties", "output": {"format": "adapter", "rank": 8}},
}  # fmt: skip
WRITTEN = {way: "processes" if way == "adapter" else "ranks" for way in WAYS}  # in the report
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
BOTH = """
import sys
from mowmerge import merge
from mowmerge.errors import CheckpointError
from mowmerge.planner import Options
for way in ("linear", "ties", "mow", "adapter"):
    merge(f"{way}.yaml", f"{way}-out", options=Options(workers=1))
try:
    merge("bad.yaml", "bad-out", options=Options(workers=1))
except CheckpointError as error:
    sys.stderr.write(str(error).replace(chr(10), " ") + chr(10))  # at once: two ranks write
    sys.exit(error.exit_code)
"""
KILLED = """
import os, pathlib, signal
from mowmerge.checkpoint.journal import Journal
finished = Journal.finished

def killed(self, *args):
    finished(self, *args)
    if os.environ["RANK"] == "1" and len(self.done) == 3:
        while "tensor" not in pathlib.Path(".out.partial/journal-0.jsonl").read_text():
            pass
        os.kill(os.getpid(), signal.SIGKILL)

Journal.finished = killed
from mowmerge.cli import main
main()
"""


def torchrun(zoo: Zoo, *words: str) -> Ran:
    """Two ranks; what torchrun left."""
    done = subprocess.run(
        [*TORCHRUN, *words], cwd=zoo.folder, env=environment(), text=True, capture_output=True,
        timeout=240,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


def test_two_ranks_write_what_one_process_writes(zoo: Zoo) -> None:
    models = zoo.family("llama", 3)
    ways = ("linear", "ties", "mow", "adapter")
    for way in ways:
        zoo.recipe(WAYS[way], way)
    models["c"]["model.norm.weight"][0] = float("nan")
    zoo.save("broken", models["c"])
    zoo.recipe({"method": "linear", "models": {"a": "./a", "c": "./broken"}}, "bad")
    (zoo.folder / "both.py").write_text(BOTH)
    ran = torchrun(zoo, "both.py")
    lines = [line for line in ran.err.splitlines() if "holds NaN" in line]
    assert len(lines) == 2 and sum("rank " in line for line in lines) == 1, ran.err
    assert "exitcode  : 4" in ran.err and "SIGABRT" not in ran.err
    assert left(zoo.folder) == [] and not (zoo.folder / "bad-out").exists()
    for way in ways:
        out = zoo.folder / f"{way}-out"
        told = json.loads((out / "report.json").read_text())[WRITTEN[way]]
        assert len(told) == 2 and all(one["tensors"] and one["bytes"] for one in told), way
        assert files(out) == single(zoo, WAYS[way], f"{way}-one", way), way


@pytest.mark.parametrize("way", ["ties", "adapter"])
def test_a_rank_that_is_killed_leaves_nothing_but_work_to_take_up(zoo: Zoo, way: str) -> None:
    zoo.family("llama", 3)
    zoo.recipe(WAYS[way])
    (zoo.folder / "killed.py").write_text(KILLED)
    words = ("merge", "recipe.yaml", "out", "--workers", "1")
    ran = torchrun(zoo, "killed.py", *words)
    assert ran.rc and not re.search(r"Traceback[^:]*mowmerge", ran.err), ran.err
    stage = zoo.folder / ".out.partial"
    assert not (zoo.folder / "out").exists() and stage.is_dir()
    done = [file.read_text().count('{"tensor":') for file in sorted(stage.glob("journal-*"))]
    assert done[0] >= 1 and done[1] == 3
    again = torchrun(zoo, "-m", "mowmerge", *words, "--resume", "--json")
    assert again.rc == 0, again.err
    told = json.loads(again.out)[WRITTEN[way]]
    assert sum(one["tensors"] for one in told) == 21 - sum(done)
    assert files(zoo.folder / "out") == single(zoo, WAYS[way])
    assert left(zoo.folder) == []


@pytest.mark.slow
def test_a_rank_without_a_launcher_to_kill_it_says_which_is_gone(zoo: Zoo) -> None:
    """As on another host, whose torchrun does not know: the connection tells, or the time-out."""
    zoo.family("llama", 3)
    zoo.recipe(WAYS["ties"])
    (zoo.folder / "killed.py").write_text(KILLED)
    ends = {
        signal.SIGKILL: "the connection to another rank is gone",
        signal.SIGSTOP: "another rank has said nothing for 0.5 minutes",
    }
    for sign, says in ends.items():
        code = KILLED.replace("signal.SIGKILL", f"signal.{sign.name}")
        (zoo.folder / "killed.py").write_text(code)
        ranks = [lone(zoo, rank, "--timeout", "0.5") for rank in range(2)]
        try:
            _, err = ranks[0].communicate(timeout=120)
        finally:
            for each in ranks:
                each.kill()
                each.communicate()
        assert ranks[0].returncode == 6 and says in err and "--resume" in err, err
        assert "Traceback" not in err
        assert not (zoo.folder / "out").exists()
        again = zoo.cli("merge", "recipe.yaml", "out", "--resume", "--quiet", "--workers", "1")
        assert (again.rc, again.err) == (0, "")
        assert files(zoo.folder / "out") == single(zoo, WAYS["ties"], f"wanted-{sign.name}")
        os.rename(zoo.folder / "out", zoo.folder / f"out-{sign.name}")


def lone(zoo: Zoo, rank: int, *words: str) -> subprocess.Popen[str]:
    """One of two ranks that nobody looks after."""
    told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 20000 + os.getpid() % 20000}  # fmt: skip
    command = [sys.executable, "killed.py", "merge", "recipe.yaml", "out", "--workers", "1"]
    return subprocess.Popen(
        [*command, *words], cwd=zoo.folder, stderr=subprocess.PIPE, text=True,
        env=environment(**{name: str(value) for name, value in told.items()}),
    )  # fmt: skip


@pytest.mark.slow
def test_accelerate_launch_merges_or_refuses(zoo: Zoo) -> None:
    """Version 1.15 starts one process on a machine without GPUs, whatever it was asked for."""
    zoo.family("llama", 3)
    zoo.recipe(WAYS["ties"])
    launch = "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"
    command = [sys.executable, "-m", *launch, "-m", "mowmerge", "merge", "recipe.yaml", "out"]
    command += ["--workers", "1"]
    ran = subprocess.run(
        command, cwd=zoo.folder, env=environment(), text=True, capture_output=True, timeout=120
    )
    if ran.returncode == 0:
        assert files(zoo.folder / "out") == single(zoo, WAYS["ties"])
    else:
        assert "error: WORLD_SIZE says 2 processes" in ran.stderr
        assert not (zoo.folder / "out").exists()
    assert left(zoo.folder) == []


def test_processes_that_do_not_meet_are_refused(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe(WAYS["linear"])
    ran = zoo.cli("merge", "recipe.yaml", "out", env={"WORLD_SIZE": "2"})
    assert ran.rc == 6 and ran.err.startswith("error: WORLD_SIZE says 2 processes"), ran.err
    assert "torchrun --nproc_per_node 2 -m mowmerge merge" in ran.err
    assert not (zoo.folder / "out").exists()
