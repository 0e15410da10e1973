"""Which file a file is: by size, time and inode at once, by sha256 for good.

Digests are kept in the user's cache for as long as size, time and inode stay what they were; a file
of the Hub's cache bears its digest as its name. A cache that is of no use is done without.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mowmerge.errors import CheckpointError

PIECES, PIECE = 16, 4096  # of a file that is sampled: how many, and their bytes
SETTLED = 2.0  # seconds after which a change is seen by a file's time
_SHA256 = re.compile(r"[0-9a-f]{64}")


def of(file: str | Path) -> list[int]:
    """Size, time of change in ns, inode; CheckpointError where the file is gone."""
    try:
        facts = os.stat(file)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read any more: {error.strerror}", where=str(file),
            hint="leave the inputs where they are while a merge runs",
        ) from error  # fmt: skip
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]


def sha256(file: str | Path) -> str:
    """The file's digest, in hex: the cached one, or computed and cached."""
    real = Path(file).resolve()
    in_hub_cache = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if in_hub_cache and _SHA256.fullmatch(real.name):
        return real.name
    name = hashlib.sha256(str(real).encode()).hexdigest()[:32]
    kept, seen = cache("hashes") / f"{name}.json", of(real)
    found = known(kept)
    if found and found.get("identity") == seen:
        return str(found["sha256"])
    with real.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if seen == of(real) and time.time_ns() - seen[1] > SETTLED * 1e9:
        keep(kept, {"path": str(real), "identity": seen, "sha256": digest})
    return digest


def sampled(file: str) -> str:
    """A digest of the file's size and of pieces all over it."""
    size = of(file)[0]
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        for i in range(PIECES):
            stream.seek(i * max(0, size - PIECE) // (PIECES - 1))
            digest.update(stream.read(PIECE))
    return digest.hexdigest()[:16]


def sha256_of(files: Sequence[str], workers: int) -> dict[str, str]:
    """The digests of several files, that many at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(files, pool.map(sha256, files), strict=True))


def cache(kind: str) -> Path:
    """The folder in the user's cache for one kind of thing."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mowmerge" / kind


def known(file: Path) -> Mapping[str, Any] | None:
    """What was kept in a file of the cache."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def keep(file: Path, content: Mapping[str, Any]) -> None:
    """Keeps plain data in a file of the cache, where that can be written."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        staged = file.with_suffix(f".{os.getpid()}")
        staged.write_text(json.dumps(content), "utf-8")
        staged.replace(file)
