"""The floor: reads every shard of the folders and writes the first folder's, in plain loops.

python -m tests.bench.loops OUT FOLDER... [--reuse]
"""

from __future__ import annotations

import sys
from pathlib import Path

CHUNK = 1 << 24


def plain(source: Path, target: Path | None) -> None:
    """`read` and `write`; each chunk is a new object."""
    with open(source, "rb", buffering=0) as file, open(target or "/dev/null", "wb") as out:
        while chunk := file.read(CHUNK):
            if target:
                out.write(chunk)


def reused(source: Path, target: Path | None) -> None:
    """`readinto` and `write`; all chunks in one buffer."""
    chunk = memoryview(bytearray(CHUNK))
    with open(source, "rb", buffering=0) as file, open(target or "/dev/null", "wb") as out:
        while n := file.readinto(chunk):
            if target:
                out.write(chunk[:n])


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--reuse"]
    loop = plain if words == sys.argv[1:] else reused
    Path(words[0]).mkdir()
    for i, folder in enumerate(words[1:]):
        for shard in sorted(Path(folder).glob("*.safetensors")):
            loop(shard, Path(words[0]) / shard.name if i == 0 else None)
