"""What one pass over the model works out for a matrix and the next needs again: on disk meanwhile.

A cache and no more: what is not there, or not whole, is worked out anew, to the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile

from mowmerge.methods.contracts import Kept, Once
from mowmerge.tensors import torch

FULL = (
    "the disk had no room for decompositions between the passes over the model: matrices were"
    " decomposed anew in each"
)


class Scratch:
    """Files in a folder of their own, each removed when its tensor is written, and all at the end.

    `spare` bytes of the disk stay free, for what is to be written there; `full` says that something
    found no room.
    """

    def __init__(self, folder: Path, spare: int) -> None:
        self.folder, self.spare, self.full = folder, spare, False

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def once(self, group: int, tensor: str, device: str) -> Once:
        """What keeps a tensor's in a group of tensors with one statistic, and gives it back."""
        file = self._file(group, tensor)

        def kept(make: Callable[[], Kept]) -> Kept:
            found = _read(file, device)
            if found is None:
                found = make()
                self._write(file, found)
            return found

        return kept

    def drop(self, group: int, tensor: str) -> None:
        """Gives back the room of what nobody needs any more."""
        self._file(group, tensor).unlink(missing_ok=True)

    def _file(self, group: int, tensor: str) -> Path:
        name = hashlib.blake2b(f"{group}\0{tensor}".encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}.npy"

    def _write(self, file: Path, parts: Kept) -> None:
        import numpy as np

        staged: Path | None = None
        try:
            self.folder.mkdir(exist_ok=True)
            needed = sum(part.nbytes for part in parts)
            if needed + self.spare > shutil.disk_usage(self.folder).free:
                self.full = True
                return
            arrays = [np.array(len(parts)), *(part.cpu().numpy() for part in parts)]
            with NamedTemporaryFile(dir=self.folder, delete=False) as stream:  # this rank's alone
                staged = Path(stream.name)
                for array in arrays:
                    np.save(stream.file, array, allow_pickle=False)
            staged.replace(file)
        except OSError:
            self.full = True
            if staged:
                staged.unlink(missing_ok=True)


def _read(file: Path, device: str) -> Kept | None:
    """The tensors of a file, None where they are not whole. They lie in memory as they did: torch's
    own, and in the same order, for the last bits of a matrix product may depend on that."""
    import numpy as np

    try:
        with file.open("rb") as stream:
            count = int(np.load(stream, allow_pickle=False))
            arrays = [np.load(stream, allow_pickle=False) for _ in range(count)]
    except (OSError, EOFError, ValueError):
        return None
    return tuple(torch.from_numpy(array).to(device, copy=True) for array in arrays)
