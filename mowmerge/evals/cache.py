"""What is finished, kept: every item's answer by model, data and settings, a line each.

A model is known by the sha256 of its files and a task by that of its items, so that what was scored
once is never scored again, and an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from mowmerge.checkpoint import writer
from mowmerge.errors import ResourceError
from mowmerge.evals.job import Answer, Taken

SHA256 = 64  # letters of a digest
WEIGHTS = ("*.safetensors", "heads/*.safetensors", "encoder/*.safetensors")
REST = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "heads/*.json",
    "encoder/**/*.json",
    "encoder/**/*.txt",
)
MADE = ("report.json",)  # says nothing of what a model answers


@dataclass
class Journal:
    """The answers of one model on one task, by item, and what they took; new ones go to this
    process's own file."""

    file: Path | None
    found: dict[int, Answer] = field(default_factory=dict)
    taken: list[Taken] = field(default_factory=list)

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Keeps these, on disk before it returns."""
        self.found.update(answers)
        self._write({"item": i, **a} for i, a in answers.items())

    def took(self, taken: Taken) -> None:
        """Keeps what some of the answers took."""
        self.taken.append(taken)
        self._write([{"taken": taken.told()}])

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if self.file is None:
            return
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(lines)


class Cache:
    """A folder of journals; without one nothing is kept."""

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self._folder, self._rank = folder, rank
        self._hashes: dict[str, str] = {}
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self._hashes = _read(folder / "hashes.json")
        except OSError as error:
            raise ResourceError(
                f"cannot be written: {error.strerror}", where=str(folder), hint="--no-cache"
            ) from error

    def journal(self, *key: Any) -> Journal:
        """What is known under a key; a line that an interruption cut short is not."""
        if self._folder is None:
            return Journal(None)
        name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        found: dict[int, Answer] = {}
        taken: list[Taken] = []
        for file in sorted(self._folder.glob(f"{name}.*.jsonl")):
            for line in file.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    told = json.loads(line)
                    if "taken" in told:
                        taken.append(Taken(**told["taken"]))
                    else:
                        found[told.pop("item")] = told
        own = self._folder / f"{name}.{self._rank}.jsonl"
        if own.exists():
            _mend(own)
        return Journal(own, found, taken)

    def weights(self, *folders: Path) -> str:
        """The sha256 of the folders' weights: of their names and digests, in order."""
        return self._digest(folders, WEIGHTS)

    def everything(self, folder: Path) -> str:
        """The sha256 of all that decides what a model answers: weights, config, tokenizer."""
        return self._digest((folder,), (*WEIGHTS, *REST))

    def _digest(self, folders: Sequence[Path], patterns: tuple[str, ...]) -> str:
        lines = []
        for folder in folders:
            files = sorted({f for p in patterns for f in folder.glob(p) if f.name not in MADE})
            lines += [f"{self._file(f)}  {f.relative_to(folder).as_posix()}\n" for f in files]
        return sha256("".join(lines).encode()).hexdigest()

    def _file(self, file: Path) -> str:
        """A file's sha256: the name of its blob in the Hub cache, or worked out once."""
        if file.is_symlink() and len(os.path.basename(os.readlink(file))) == SHA256:
            return os.path.basename(os.readlink(file))
        state = file.stat()
        key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
        if key not in self._hashes:
            self._hashes[key] = writer.sha256(file)
            if self._folder is not None and self._rank == 0:
                staged = self._folder / f".hashes.{os.getpid()}"
                staged.write_text(json.dumps(self._hashes), "utf-8")
                staged.replace(self._folder / "hashes.json")
        return self._hashes[key]


def _mend(file: Path) -> None:
    """Takes off what an interruption left behind the last whole line."""
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)


def _read(file: Path) -> dict[str, str]:
    """The digests of an earlier run; none where they cannot be read."""
    try:
        found: dict[str, str] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found
