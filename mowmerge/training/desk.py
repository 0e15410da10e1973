"""What a training keeps on disk: its own state beside the checkpoint, and the result put into it.

Until the end nothing in the checkpoint is touched. Then a few files are replaced, each by one
rename and in such an order that at any moment everything that a file says of another is true.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mowmerge.checkpoint import layout, writer
from mowmerge.errors import CheckpointError, ResourceError
from mowmerge.tensors import Tensor, TensorSpec, dtype_named, torch

ROUTER, LOG, REPORT, SUMS = (
    "router.safetensors", "router_log.csv", "report.json", "SHA256SUMS",
)  # fmt: skip


class Desk:
    """The folder .OUT.training beside OUT, held by one training at a time.

    Only the process that `writes` touches it; the others read. It goes when training ends well,
    and stays when it is cut off.
    """

    def __init__(self, out: Path, *, resume: bool, writes: bool = True) -> None:
        self.out = out.resolve()
        self.path = self.out.with_name(f".{self.out.name}.training")
        self._resume, self._writes = resume, writes
        self._lock: int | None = None

    def __enter__(self) -> Desk:
        if self._writes:
            try:
                self.path.mkdir(exist_ok=True)
                self._take_lock()
                for file in self.path.iterdir():
                    if not (self._resume and file.name == "state.pt"):
                        file.unlink()
            except OSError as error:
                raise writer.denied(error, self.path) from error
        return self

    def _take_lock(self) -> None:
        if os.name != "posix":
            return
        import fcntl

        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise ResourceError(
                f"another training of {self.out} is running", hint="wait for it, or copy the folder"
            ) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._writes and self._lock is not None:
            held = self.path / "state.pt"
            if not held.exists() or kind is None:
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def save(self, state: Mapping[str, Any]) -> None:
        """Keeps the state of a training, for --resume."""
        if self._writes:
            stream = io.BytesIO()
            torch.save(dict(state), stream)
            self._replace(self.path / "state.pt", stream.getvalue())

    def load(self, fingerprint: str) -> dict[str, Any] | None:
        """The state that was kept, None where there is none or it was not asked for.

        Raises:
            CheckpointError: it is of a training with other settings, data or checkpoint.
        """
        file = self.path / "state.pt"
        if not self._resume or not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                "the interrupted training cannot be read", where=str(file),
                hint="start again without --resume",
            ) from error  # fmt: skip
        if state.get("fingerprint") != fingerprint:
            raise CheckpointError(
                "the interrupted training had other settings, data or another checkpoint",
                where=str(file), hint="use the same options, or start again without --resume",
            )  # fmt: skip
        return state

    def drop(self) -> None:
        """Forgets the state of a training that went wrong."""
        if self._writes:
            (self.path / "state.pt").unlink(missing_ok=True)

    def publish(
        self, tensors: Mapping[str, Tensor], about: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, str],
    ) -> dict[str, Any]:  # fmt: skip
        """Puts routers, log and report into the checkpoint; returns the report's section.

        Order: the log; sums and report that say nothing of the router; the router; report and sums
        that do. `sha256sum -c` and the report hold after each step.
        """
        data = serialise(tensors, metadata)
        section = {"sha256": _sha256(data), **about}
        report, sums = self._report(), self._sums()
        self._replace(self.out / LOG, table(rows).encode())
        if sums is not None:
            rest = [line for line in sums if not line.endswith(f"  {ROUTER}")]
            self._replace(self.out / SUMS, _lines(rest))
        if "router" in report:
            self._replace(
                self.out / REPORT, _json({k: v for k, v in report.items() if k != "router"})
            )
        self._replace(self.out / ROUTER, data)
        self._replace(self.out / REPORT, _json({**report, "router": section}))
        if sums is not None:
            line = f"{section['sha256']}  {ROUTER}"
            names = [n.split("  ", 1)[-1] for n in rest]
            place = next((i for i, n in enumerate(names) if n > ROUTER), len(rest))
            self._replace(self.out / SUMS, _lines([*rest[:place], line, *rest[place:]]))
        return section

    def _report(self) -> dict[str, Any]:
        file = self.out / REPORT
        held: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        return held

    def _sums(self) -> list[str] | None:
        file = self.out / SUMS
        return file.read_text("utf-8").splitlines() if file.exists() else None

    def _replace(self, file: Path, data: bytes) -> None:
        """One rename, of bytes that are on the disk."""
        staged = self.path / f"{file.name}.new"
        try:
            with staged.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(staged, file)
            folder = os.open(file.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise writer.denied(error, file) from error


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file: the same for the same tensors and metadata."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    specs = [
        TensorSpec(name, dtype_named(str(t.dtype).removeprefix("torch.")).code, tuple(t.shape))
        for name, t in ordered.items()
    ]
    shard = layout.shard_of(ROUTER, specs, dict(sorted(metadata.items())))
    data = bytearray(shard.nbytes)
    data[: len(shard.header)] = shard.header
    for spec in specs:
        at = shard.offsets[spec.name]
        data[at : at + spec.nbytes] = ordered[spec.name].reshape(-1).view(torch.uint8).numpy().data
    return bytes(data)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV of all rows; a figure that a row has not is empty."""
    found = (name for row in rows for name in row)
    names = list(dict.fromkeys([*("step", "loss", "lr"), *found]))
    stream = io.StringIO()
    made = csv.DictWriter(stream, names, lineterminator="\n")
    made.writeheader()
    made.writerows(rows)
    return stream.getvalue()


def _sha256(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()


def _json(held: Mapping[str, Any]) -> bytes:
    return (json.dumps(held, indent=1) + "\n").encode()


def _lines(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
