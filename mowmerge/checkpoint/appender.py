"""A safetensors file written before it is known how large its tensors are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mowmerge.checkpoint.layout import ALIGN
from mowmerge.checkpoint.writer import write_at
from mowmerge.errors import denied
from mowmerge.tensors import TensorSpec


def room(names: Sequence[str]) -> int:
    """Bytes of header that are kept for tensors of these names, whatever their shapes."""
    most = {name: [10**15] * 6 for name in names}  # longer than any entry's numbers
    return (len(json.dumps(most)) + 80 * len(most) + 4096) // ALIGN * ALIGN


class Appender:
    """A safetensors file whose tensors' shapes are known as they come: data first, then a header
    in the room that was kept for it."""

    def __init__(
        self, file: Path, names: Sequence[str], metadata: Mapping[str, str],
        done: Sequence[TensorSpec] = (),
    ) -> None:  # fmt: skip
        """`names`: all that may come; others may not, and some may not come. `done`: what is there
        already, in order; what lies behind it is cut off."""
        self._file, self._metadata = file, dict(metadata)
        self._room = room(names)
        self.specs = {spec.name: spec for spec in done}
        self._end = sum(spec.nbytes for spec in done)

    def __enter__(self) -> Appender:
        try:
            self._fd = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._fd, 8 + self._room + self._end if self.specs else 0)
        except OSError as error:
            raise denied(error, self._file) from error
        return self

    def append(self, spec: TensorSpec, pieces: Iterable[memoryview]) -> None:
        """Writes one tensor after the last; wider dtypes have to come first."""
        self.specs[spec.name] = spec
        try:
            for piece in pieces:
                write_at(self._fd, piece, 8 + self._room + self._end)
                self._end += piece.nbytes
        except OSError as error:
            raise denied(error, self._file) from error

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._head()
        except OSError as error:
            raise denied(error, self._file) from error
        finally:
            os.close(self._fd)

    def _head(self) -> None:
        entries: dict[str, object] = {"__metadata__": self._metadata}
        end = 0
        for spec in self.specs.values():
            start, end = end, end + spec.nbytes
            place = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
            entries[spec.name] = place
        text = json.dumps(entries, separators=(",", ":")).encode().ljust(self._room)
        write_at(self._fd, memoryview(self._room.to_bytes(8, "little") + text), 0)
