"""Writes a checkpoint header first: every byte has its place before a tensor is computed.

The output is staged beside its final place and renamed there when it is whole, so that at any
moment there is either nothing under the final name or a finished checkpoint. Beside the staged
checkpoint lies the journal by which a merge that was cut off is taken up.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from mowmerge.checkpoint import fp8
from mowmerge.checkpoint.journal import Journal, sync, sync_folder
from mowmerge.errors import ResourceError, refused
from mowmerge.errors import denied as denied
from mowmerge.plan import Packing, Shard
from mowmerge.ranks import Lost, Ranks, Stopped

_SEEKING = Lock()  # held between seek and write where there is no pwrite
NOT_HASHED = ("report.json", "README.md")
KEPT = ("journal-", "state-", "part-")  # what starts so in a stage is what is done
SPARE = 16 << 20  # bytes left free beside the weights, for config, tokenizer and report


class Staging:
    """A folder that becomes `out` on commit and vanishes otherwise.

    `key` is what decides the output, for merges that keep a journal. With `resume` what a merge
    with that key left is taken up, and what is done is left for the next one where this one fails.
    Of several ranks the first makes it and takes it away; the others write to it.
    """

    def __init__(
        self,
        out: Path,
        *,
        force: bool = False,
        keep: Sequence[Path] = (),
        key: Mapping[str, Any] | None = None,
        resume: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        if os.path.islink(self.out):
            self.out = self.out.resolve()
        for path in (p.resolve() for p in keep):
            if self.out.resolve() == path or self.out.resolve() in path.parents:
                raise ResourceError(
                    f"the output folder {self.out} holds one of the inputs",
                    where=str(path), hint="write somewhere else",
                )  # fmt: skip
        self.stage = self.out.with_name(f".{self.out.name}.partial")
        self.path = self.stage / "checkpoint"
        self.ranks = ranks or Ranks()
        self.journal = Journal(self.stage, self.ranks.rank)
        self._old = self.out.with_name(f".{self.out.name}.replaced")
        self._force, self._key, self._resume = force, key or {}, resume
        self._vanishes = False
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        try:
            sign = self.ranks.from_first(self._enter)
            if sign:
                self.ranks = self.ranks.watching(self.stage / sign)
                self.ranks.together(self._look)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _enter(self) -> str:
        """Makes the folder; the name of a file in it that ranks watch, if there are several."""
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.stage.mkdir(exist_ok=True)
            self._take_lock()
            self.journal.read()
            self._vanishes = not self.journal.holds
            self._restore()
            self._check()
            self._take_up()
            if self.ranks.count == 1:
                return ""
            sign = f"ranks-{uuid.uuid4().hex}"  # another one than of any run before
            (self.stage / sign).touch()
            return sign
        except OSError as error:
            raise denied(error, self.stage) from error

    def _look(self) -> None:
        """ResourceError where this rank does not see what the first has made."""
        with suppress(OSError):
            os.listdir(self.out.parent)  # has a network file system ask for what is new there
        try:
            self.ranks.check()
        except Stopped:
            raise ResourceError(
                "this host does not see what rank 0 has made there", where=str(self.stage),
                hint="the output folder has to lie on a file system that all hosts share, under"
                " one path",
            ) from None  # fmt: skip

    def _check(self) -> None:
        if self.out.is_dir() and any(self.out.iterdir()):
            if not self._force:
                raise ResourceError(
                    f"the output folder {self.out} is not empty",
                    hint="name another, or replace it as a whole with --force",
                )
            known = ("config.json", "recipe.yaml", "adapter_config.json")
            if not any((self.out / name).exists() for name in known):
                raise ResourceError(
                    f"--force replaces a checkpoint, and {self.out} does not look like one",
                    hint="it has neither config.json nor recipe.yaml: remove it yourself",
                )
        elif self.out.exists() and not self.out.is_dir():
            raise ResourceError(f"{self.out} is a file", hint="name a folder")

    def _take_up(self) -> None:
        """Keeps what the journal vouches for, if that is wanted and it can be used."""
        held, done = self.journal.holds, len(self.journal.done)
        if held and not self._resume and not self._force:
            raise ResourceError(
                f"what is written to {self.out} was cut off when {done} tensor(s) were done",
                where=str(self.stage), hint="--resume takes it up, --force starts afresh",
            )  # fmt: skip
        if held and self._resume:
            self.journal.check(self._key)
        else:
            self.journal.forget()
        self._vanishes = True
        self.path.mkdir(exist_ok=True)
        for entry in (*self.stage.iterdir(), *self.path.iterdir(), *self.path.glob("heads/*")):
            kept = entry.name.startswith(KEPT) or entry.suffix == ".safetensors"
            if entry in (self.path, self.path / "heads") or (self.journal.holds and kept):
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _restore(self) -> None:
        """Ends a replacement that was cut off: before its second rename the old folder returns."""
        if self.out.exists():
            shutil.rmtree(self._old, ignore_errors=True)
        elif self._old.exists():
            self._old.rename(self.out)

    def _take_lock(self) -> None:
        if os.name != "posix":
            return
        import fcntl

        self._lock = os.open(self.stage, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(self._lock), self.stage.stat())  # not removed since
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise ResourceError(
                f"another merge is writing to {self.out}",
                hint="wait for it, or name another folder",
            )

    def allocate(self, shards: Sequence[Shard]) -> None:
        """Creates every shard at full size, with its header; ResourceError if there is no room.

        What is there already from a merge that is taken up stays; without all of it none counts.
        """

        def prepare() -> None:
            stands = self.journal.holds and all(self._stands(shard) for shard in shards)
            if not stands:
                self.journal.forget()
            self.create(() if stands else shards)

        self._begin(prepare, lambda: [self.path / shard.file for shard in shards])

    @property
    def part(self) -> Path:
        """The file in which this rank's tensors wait whose places are not known yet."""
        return self.stage / f"part-{self.ranks.rank}"

    def wait(self, lengths: Mapping[str, int]) -> None:
        """Begins the journal of tensors in parts. What is done counts for nothing where the parts
        that hold it, by name, are not there at those lengths."""
        held = {self.stage / name: length for name, length in lengths.items()}

        def prepare() -> None:
            if not all(f.is_file() and f.stat().st_size >= n for f, n in held.items()):
                self.journal.forget()
            with refused(self.part):
                self.part.touch()

        self._begin(prepare, lambda: [*{self.part, *filter(Path.is_file, held)}])

    def _begin(self, prepare: Callable[[], None], files: Callable[[], Sequence[Path]]) -> None:
        """Begins the journals of all ranks, when the first has prepared their files."""

        def first() -> tuple[Any, ...]:
            prepare()
            if self._key:
                self.journal.begin(self._key, files())
            return self.journal.key, self.journal.done, self.journal.facts

        key, done, facts = self.ranks.from_first(first)

        def join() -> None:
            if self._key and not self.ranks.first:
                self.journal.join(key, done, facts, files())

        self.ranks.together(join)

    def create(self, shards: Sequence[Shard]) -> None:
        """Creates files at full size, with their headers; ResourceError if there is no room."""
        needed = sum(s.nbytes for s in shards) + SPARE
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise ResourceError(
                f"the disk is too small: {needed:,} bytes are needed, {free:,} are free",
                where=str(self.out.parent), hint="free some space, or write to another disk",
            )  # fmt: skip
        for shard in shards:
            file = self.path / shard.file
            with refused(file):
                file.parent.mkdir(exist_ok=True)
                fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                try:
                    _reserve(fd, shard.nbytes)
                    write_at(fd, memoryview(shard.header), 0)
                finally:
                    os.close(fd)

    def _stands(self, shard: Shard) -> bool:
        """Whether the shard is there, whole but for its data."""
        file = self.path / shard.file
        if not file.is_file() or file.stat().st_size != shard.nbytes:
            return False
        with file.open("rb") as stream:
            return stream.read(len(shard.header)) == shard.header

    def commit(self) -> None:
        """Puts the folder under its final name, when all that is in it is on disk."""
        try:
            for file in sorted(self.path.rglob("*")):
                sync(file) if file.is_file() else sync_folder(file)
            sync_folder(self.path)
            replacing = self.out.is_dir() and any(self.out.iterdir())
            if replacing:
                self.out.rename(self._old)
            self.path.rename(self.out)
            self._resume = False
            sync_folder(self.out.parent)
        except OSError as error:
            raise denied(error, self.out) from error
        finally:
            self._restore()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.journal.close()
        cut_off = isinstance(error, Lost) or (self._resume and self.journal.holds)
        if self._vanishes and not cut_off:
            shutil.rmtree(self.stage, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class ShardSink:
    """Puts bytes at their planned offsets in the staged shards, those to be packed as fp8.

    With `files` those for other files are left to the ranks that write them.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        advance: Callable[[int], None],
        packings: Mapping[str, Packing] | None = None,
        files: Collection[str] | None = None,
    ) -> None:
        self._files = files
        self._packers = {name: fp8.Packer(how) for name, how in (packings or {}).items()}
        self._places = {name: (s.file, at) for s in shards for name, at in s.offsets.items()}
        self._folder, self._advance, self._closing = folder, advance, ExitStack()
        self._fds: dict[str, int] = {}

    def __enter__(self) -> ShardSink:
        for file in {file for file, _ in self._places.values() if self._ours(file)}:
            self._fds[file] = os.open(self._folder / file, os.O_WRONLY)
            self._closing.callback(os.close, self._fds[file])
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.close()

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Takes a tensor's bytes from byte `start` on; called from any worker. Those of a tensor
        that is packed come in order."""
        packer = self._packers.get(name)
        pieces = packer.packed(start, data) if packer else [(name, start, data)]
        for piece in pieces:
            self._put(*piece)

    def _ours(self, file: str) -> bool:
        return self._files is None or file in self._files

    def _put(self, name: str, start: int, data: memoryview) -> None:
        file, offset = self._places[name]
        if not self._ours(file):
            return
        with refused(self._folder / file):
            write_at(self._fds[file], data, offset + start)
        self._advance(len(data))


def _reserve(fd: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, nbytes)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`, in as many calls as it takes."""
    while data:
        if hasattr(os, "pwrite"):
            done = os.pwrite(fd, data, offset)
        else:
            with _SEEKING:
                os.lseek(fd, offset, os.SEEK_SET)
                done = os.write(fd, data)
        data, offset = data[done:], offset + done


def sha256(file: Path) -> str:
    """The file's digest, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sums(folder: Path) -> list[str]:
    """A line of SHA256SUMS for each file that is there, by name."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    names = sorted(p.relative_to(folder).as_posix() for p in files if p.name not in NOT_HASHED)
    return [f"{sha256(folder / name)}  {name}" for name in names]
