"""train-router as a command: what it prints, how it ends, several processes, a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training.checkpoints import Made, routers, verified

ROOT = Path(__file__).parents[2]
Make = Callable[..., Made]


def environment(made: Made, **more: object) -> dict[str, str]:
    cache = str(made.out.parent / "cache")
    return {
        **os.environ, "HF_DATASETS_CACHE": cache, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        **{name: str(value) for name, value in more.items()},
    }  # fmt: skip


def run(
    made: Made, *options: str, before: tuple[str, ...] = (), **more: object
) -> subprocess.CompletedProcess[str]:
    command = [*(before or (sys.executable, "-m")), "mowmerge", "train-router", str(made.out)]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment(made, **more),
        check=False, timeout=300,
    )  # fmt: skip


def one_of_two(rank: int) -> dict[str, object]:
    """What a launcher would tell a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip


def test_a_dry_run_tells_and_touches_nothing(make: Make) -> None:
    made = make("linear")
    before = made.bytes()
    done = run(made, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["routers"]["r0"] == {
        "kind": "linear", "layer": 1, "outputs": 3, "parameters": 51,
    }  # fmt: skip
    assert told["tasks"]["tb"]["select"] == {"split": "validation", "samples": 16}
    assert (told["objective"], told["steps"], told["batch"]) == ("task", 1000, 64)
    assert made.bytes() == before


@pytest.mark.slow
def test_the_command_trains_on_the_recipe_in_the_folder(make: Make) -> None:
    made = make("linear")
    done = run(made, "--steps", "20")
    assert done.returncode == 0, done.stderr
    assert "1 router(s) trained (task), step 20 of 20 kept: accuracy" in done.stdout
    assert "step 20 of 20: loss" in done.stderr


@pytest.mark.slow
def test_a_users_mistake_is_a_message_and_a_code(make: Make) -> None:
    done = run(make("emr"))
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert "has no router to train: the caller says which expert is meant" in done.stderr
    assert run(make("linear"), "--lr", "-1").returncode == 2


@pytest.mark.slow
def test_a_killed_training_leaves_everything_and_goes_on(make: Make) -> None:
    made = make("wemoe")
    before = made.bytes()
    command = [sys.executable, "-m", "mowmerge", "train-router", str(made.out)]
    options = ["--batch", "8", "--steps", "200", "--recipe", str(made.recipe)]
    state = made.out.with_name(".out.training") / "state.pt"
    child = subprocess.Popen([*command, *options], env=environment(made), stderr=subprocess.DEVNULL)
    while not state.exists() and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert made.bytes() == before and state.exists()
    done = run(made, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert "router.safetensors" in verified(made.out) and not state.parent.exists()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["linear", "shared"])
def test_two_processes_do_what_one_does(make: Make, which: str) -> None:
    one, two = make(which), make(which, "-two")
    options = ("--steps", "20", "--batch", "9", "--device", "cpu")
    assert run(one, *options).returncode == 0
    several = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
    )
    done = run(two, *options, "--json", before=several)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    for name, value in routers(one.out).items():
        torch.testing.assert_close(routers(two.out)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_others_do_not_come_waits_for_so_long_and_says_so(
    make: Make, rank: int
) -> None:
    made = make("linear")
    before = made.bytes()
    done = run(made, "--timeout", "0.03", "--device", "cpu", **one_of_two(rank))
    assert done.returncode == 6, done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith("error: WORLD_SIZE says 2 processes, and they do not meet: ")
    assert "torchrun --nproc_per_node 2 -m mowmerge train-router" in error
    assert "Traceback" not in done.stderr
    assert made.bytes() == before


@pytest.mark.slow
def test_a_process_that_is_gone_ends_the_other_with_a_word(make: Make) -> None:
    """As on another host, whose launcher does not know: the connection tells."""
    made = make("wemoe")
    before, told = made.bytes(), one_of_two(0)
    each = [environment(made, **told | {"RANK": r, "LOCAL_RANK": r}) for r in range(2)]
    command = [sys.executable, "-m", "mowmerge", "train-router", str(made.out), "--timeout", "2"]
    options = ["--lr", "1e-6", "--steps", "2000", "--device", "cpu", "--recipe", str(made.recipe)]
    two = [
        subprocess.Popen([*command, *options], env=env, stderr=subprocess.PIPE, text=True)
        for env in each
    ]
    try:
        state = made.out.with_name(".out.training") / "state.pt"
        while not state.exists() and two[0].poll() is None:
            time.sleep(0.05)
        two[1].kill()
        _, err = two[0].communicate(timeout=200)
    finally:
        for one in two:
            one.kill()
            one.communicate()
    assert two[0].returncode == 6, err
    assert "error: the connection to another rank is gone" in err and "--resume" in err
    assert "Traceback" not in err
    assert made.bytes() == before and state.exists()
