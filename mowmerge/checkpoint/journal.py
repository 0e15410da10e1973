"""What a merge has done so far, kept beside the staged checkpoint so that it can be taken up.

A line a tensor, written after the tensor's bytes, each with its checksum: a line that was cut off
and all behind it count for nothing. Two things can be lost differently, and so there are two rules:

- A process that is killed leaves its writes with the kernel. As long as the machine has not been
  started anew since (its boot id tells), every line is believed.
- A machine that loses power loses what was not on disk. Now and then (each SYNC_BYTES or
  SYNC_SECONDS) the shards are forced there, beside the running work, and a `synced` line says how
  many of the lines above it that covers. After another boot, or on another host, only those count.

Ranks that share a merge keep a journal each. Rank 0 reads them all when the merge is taken up, by
however many ranks, and puts what they hold into its own.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from zlib import crc32

from mowmerge.errors import ResourceError, refused
from mowmerge.tensors import torch

T = TypeVar("T")
SYNC_BYTES = 2 << 30
SYNC_SECONDS = 60.0
LISTED = 4  # changes in a message
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The journal of one rank, in a staged folder; its methods may be called from any worker.

    `done` holds an entry for each finished tensor, `facts` what else was kept.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder, self._file = folder, folder / f"journal-{rank}.jsonl"
        self._first = rank == 0
        self.done: dict[str, Mapping[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self.key: Mapping[str, Any] = {}
        self._held: list[
            Any
        ] = []  # lines that are believed, of which the first `_sure` are on disk
        self._sure = 0
        self._lock, self._fd = Lock(), -1
        self._files: Sequence[Path] = ()
        self._lines, self._unsynced, self._synced_at = 0, 0, 0.0
        self._syncer: ThreadPoolExecutor | None = None
        self._syncing: Future[None] | None = None

    @property
    def holds(self) -> bool:
        """Whether there is work to take up."""
        return bool(self.done or self.facts)

    def read(self) -> None:
        """Takes in what the ranks of an earlier run left, as far as it can be believed."""
        sure: list[Any] = []
        rest: list[Any] = []
        for file in sorted(self._folder.glob("journal-*.jsonl"), key=lambda f: (len(f.name), f)):
            key, lines, synced = _believed(file)
            self.key = self.key or key
            if key == self.key:
                sure += lines[:synced]
                rest += lines[synced:]
        self._held, self._sure = [*sure, *rest], len(sure)
        written: dict[str, set[str]] = {}
        for line in self._held:
            if "fact" in line:
                self.facts[line["fact"]] = line["value"]
                continue
            files = written.setdefault(line["tensor"], set())
            files |= set(line.get("files", ()))
            if len(files) >= line.get("of", 0):
                self.done[line["tensor"]] = line["entry"]

    def join(
        self,
        key: Mapping[str, Any],
        done: Mapping[str, Any],
        facts: Mapping[str, Any],
        files: Sequence[Path],
    ) -> None:
        """Opens the journal of a rank beside rank 0, which has read what is done."""
        self.done, self.facts = dict(done), dict(facts)
        self.begin(key, files)

    def check(self, key: Mapping[str, Any]) -> None:
        """ResourceError, with what has changed, where the journal is of another merge."""
        changes = changed(self.key, key)
        if changes:
            more = len(changes) - LISTED
            listed = "; ".join([*changes[:LISTED], *([f"{more} more"] if more > 0 else [])])
            raise ResourceError(
                f"the unfinished work cannot be taken up, for something has changed: {listed}",
                where=str(self._folder),
                hint="change it back, or start afresh with --force instead of --resume",
            )

    def forget(self) -> None:
        """Starts afresh."""
        self.done, self.facts, self.key = {}, {}, {}
        self._held, self._sure = [], 0
        for file in self._folder.glob("state-*.pt"):
            file.unlink()

    def begin(self, key: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Opens the journal of this merge, which writes to these files."""
        self._files = files
        self.key = key
        told = [{"key": key}, {"boot": _boot()}, *self._held, {"synced": self._sure}]
        staged = self._file.with_suffix(".new")
        with refused(self._file):
            staged.write_bytes(b"".join(map(_line, told)))
            sync(staged)
            staged.replace(self._file)
            self._fd = os.open(self._file, os.O_WRONLY | os.O_APPEND)
            for other in self._folder.glob("journal-*.jsonl") if self._first else ():
                if other != self._file:
                    other.unlink()  # what it held is in this one now
        self._syncer = ThreadPoolExecutor(1)
        self._lines, self._synced_at = len(self._held), time.monotonic()
        if self._lines > self._sure:
            self._sync_beside()

    def finished(
        self, tensor: str, entry: Mapping[str, Any], nbytes: int, files: Sequence[str] = (),
        of: int = 0,
    ) -> None:  # fmt: skip
        """Notes a tensor whose bytes, that many, have been written: all of them, or those in
        `files`, where others `of` its files are for other ranks to write."""
        part = {"files": files, "of": of} if len(files) < of else {}
        with self._lock:
            self._append({"tensor": tensor, "entry": entry, **part})
            self.done[tensor] = entry
            self._lines += 1
            self._unsynced += nbytes
            waited = time.monotonic() - self._synced_at
            if self._unsynced >= SYNC_BYTES or waited >= SYNC_SECONDS:
                self._sync_beside()

    def keep(self, fact: str, value: Any) -> None:
        """Notes something else that took time to find; plain data."""
        with self._lock:
            self._append({"fact": fact, "value": value})
            self.facts[fact] = value
            self._lines += 1

    def keep_state(self, group: int, state: Any) -> None:
        """Keeps what a reduction over the whole model returned."""
        staged, stream = self._folder / f"state-{group}.new", io.BytesIO()
        torch.save(state, stream)  # which says of a full disk that it is a bug
        with refused(staged):
            staged.write_bytes(stream.getbuffer())
            sync(staged)
            staged.replace(staged.with_suffix(".pt"))
        self.keep(f"state-{group}", True)

    def state(self, group: int, classes: Sequence[type]) -> Any:
        """What was kept of it, made of plain data, tensors and these classes; None for nothing."""
        file = self._folder / f"state-{group}.pt"
        if f"state-{group}" not in self.facts or not file.exists():
            return None
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(file, weights_only=True)

    def finish(self, meanwhile: Callable[[], T]) -> T:
        """Forces everything to disk while `meanwhile` runs, and returns what that does."""
        assert self._syncer is not None
        forced = self._syncer.submit(self._force, self._files)
        found = meanwhile()
        for one in (self._syncing, forced):
            if one is not None:
                one.result()
        return found

    def close(self) -> None:
        """Stops writing; what the disk refused is raised by `finish`, and not here."""
        if self._syncer is not None:
            self._syncer.shutdown(wait=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, content: Mapping[str, Any]) -> None:
        data = memoryview(_line(content))
        with refused(self._file):
            while data:
                data = data[os.write(self._fd, data) :]

    def _sync_beside(self) -> None:
        """Starts forcing the shards to disk, unless that is going on; raises what it ran into."""
        if self._syncing is not None:
            if not self._syncing.done():
                return
            self._syncing.result()
        assert self._syncer is not None
        self._unsynced, self._synced_at = 0, time.monotonic()
        self._syncing = self._syncer.submit(self._sync, self._lines)

    def _sync(self, lines: int) -> None:
        self._force(self._files)
        with self._lock:
            self._append({"synced": lines})
            with refused(self._file):
                _to_disk(self._fd)

    def _force(self, files: Sequence[Path]) -> None:
        with refused(self._folder):
            for file in files:
                sync(file)
            for folder in {self._folder, *(file.parent for file in files)}:
                sync_folder(folder)


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two merges' keys, in words; their recipes only explain a difference."""

    def without(key: Mapping[str, Any]) -> Mapping[str, Any]:
        return {k: v for k, v in key.items() if k != "recipe"}

    if without(old) == without(new):
        return []
    before, after = _flat(old), _flat(new)
    told = []
    for name in dict.fromkeys([*before, *after]):
        one, two = before.get(name), after.get(name)
        if one == two or name in ("plan", "layout"):
            continue
        if name.startswith("inputs."):
            told.append(f"{name.removeprefix('inputs.')} is no longer the file it was")
        else:
            told.append(f"{name.removeprefix('recipe.')} was {_shown(one)}, is {_shown(two)}")
    return told or ["the plan that is made of the recipe"]


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(value, Mapping):
        return {at: value}
    dot = f"{at}." if at else ""
    return {k: v for name, inner in value.items() for k, v in _flat(inner, dot + name).items()}


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _line(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return b"%08x %s\n" % (crc32(text), text)


def _believed(file: Path) -> tuple[Mapping[str, Any], list[Any], int]:
    """A journal's key, the lines that can be believed, and how many of them are sure to be on
    disk."""
    key: Mapping[str, Any] = {}
    lines, sure, booted = [], 0, ""
    for line in _whole_lines(file):
        if "key" in line:
            key = line["key"]
        elif "boot" in line:
            booted = line["boot"]
        elif "synced" in line:
            sure = line["synced"]
        else:
            lines.append(line)
    if not booted or booted != _boot():
        lines = lines[:sure]
    return key, lines, min(sure, len(lines))


def _whole_lines(file: Path) -> list[Any]:
    """The lines up to the first that is not whole."""
    found: list[Any] = []
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return found
    for line in data.split(b"\n")[:-1]:
        told, _, text = line.partition(b" ")
        if told != b"%08x" % crc32(text):
            break
        found.append(json.loads(text))
    return found


def _boot() -> str:
    """What tells one start of this machine from another; empty where the system does not say."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return ""


def _to_disk(fd: int) -> None:
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def sync(file: Path) -> None:
    """Returns when the file's data is on disk."""
    fd = os.open(file, os.O_RDWR)
    try:
        _to_disk(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Returns when the folder's list of names is on disk, where the system can do that."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
