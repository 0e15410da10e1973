"""What can go wrong for a user: a message, where it is, what to do, and an exit code."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One fault: what is wrong, where (file:line, tensor, model), and what to do about it."""

    message: str
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return f"{head}\n  -> {self.hint}" if self.hint else head


class MowmergeError(Exception):
    """The base of every error that a user can cause; carries one or more problems."""

    exit_code = 1

    def __init__(
        self, problem: str | Sequence[Problem], *, where: str = "", hint: str = ""
    ) -> None:
        found = [Problem(problem, where, hint)] if isinstance(problem, str) else problem
        self.problems: tuple[Problem, ...] = tuple(found)
        super().__init__("\n".join(str(p) for p in self.problems))


class RecipeError(MowmergeError):
    """The recipe is wrong: an unknown key, a value out of range, a model that is not there."""

    exit_code = 3


class CheckpointError(MowmergeError):
    """A checkpoint is wrong: missing tensors, other shapes, a truncated shard, a NaN."""

    exit_code = 4


class SourceError(MowmergeError):
    """A model cannot be had: no such folder or repository, no network, no access."""

    exit_code = 5


class ResourceError(MowmergeError):
    """The machine says no: disk, memory, permission, or an output folder that is taken."""

    exit_code = 6


class ThresholdError(MowmergeError):
    """An evaluation is below what `--fail-under` asked for; its report is written all the same."""

    exit_code = 7


def unreadable(error: OSError) -> ResourceError | None:
    """That a file or folder may not be read, where that is what the system refused."""
    named = str(error.filename or "")
    mode = os.R_OK | os.X_OK if os.path.isdir(named) else os.R_OK
    if error.errno not in (errno.EACCES, errno.EPERM) or not os.path.exists(named):
        return None
    if os.access(named, mode):
        return None
    return ResourceError(
        f"cannot be read: {os.strerror(error.errno)}",
        where=named,
        hint=f"let this user read it (`chmod -R a+rX {shlex.quote(named)}`), or be one who may",
    )


def denied(error: OSError, path: Path) -> ResourceError:
    """What the system refused while `path` was written, as an error that says what to do."""
    if found := unreadable(error):
        return found
    hints = {
        errno.ENOSPC: "free some space, or write to another disk",
        errno.EDQUOT: "the quota is used up: free some space, or write to another disk",
        errno.EACCES: "write somewhere you may, or change the folder's permissions",
        errno.EPERM: "write somewhere you may, or change the folder's permissions",
        errno.EROFS: "the file system is read-only: write to another",
    }
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ResourceError(
        f"cannot write: {reason}",
        where=str(path),
        hint=hints.get(error.errno or 0, "see the reason above"),
    )


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """What the system refuses meanwhile, as such an error."""
    try:
        yield
    except OSError as error:
        raise denied(error, path) from error


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The hint that names the nearest known word, or lists what is known."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(sorted(known))}" if known else ""
