"""Kills at each moment that matters: a process that dies before its n-th step on the disk.

A step is a call that changes what is on the disk: a file opened for writing, a write, an fsync, a
rename, a removal. They are the same whatever the machine's load, where a kill after so many
milliseconds falls before the first of them or after the last.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}


def killed(run: Callable[[], object], before: int) -> bool:
    """Whether `run`, in a child of this process, dies by SIGKILL before its step `before` (from 0).

    Otherwise it has ended by itself, in fewer steps.
    """
    child = os.fork()
    if child == 0:
        try:
            _count(lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == before else None)
            run()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def steps(run: Callable[[], object]) -> int:
    """The number of steps that `run`, in a child of this process, makes on the disk."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        seen = [0]
        try:
            _count(lambda step: seen.append(step + 1))
            run()
        finally:
            os.dup2(theirs, 1)
            sys.stdout.write(str(max(seen)))
            sys.stdout.flush()
            os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with open(ours) as counted:
        return int(counted.read())


def _count(at: Callable[[int], object]) -> None:
    """Calls `at` before each step that this process makes from now on, with the step's number."""
    numbers = itertools.count()

    def step() -> None:
        at(next(numbers))

    def audited(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and args[2] & os.O_ACCMODE != os.O_RDONLY):
            step()

    for name in ("write", "pwrite", "fsync"):
        setattr(os, name, _after(step, getattr(os, name)))
    sys.addaudithook(audited)


def _after(step: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def stepped(*args: Any) -> Any:
        step()
        return call(*args)

    return stepped
