"""Whose a router file is: it carries the experts' names, and a digest of the weights beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SAMPLE = 4096  # bytes at the beginning of each tensor that are looked at


def told(folder: Path, experts: Sequence[str]) -> dict[str, str]:
    """What a router file that was trained in a folder says, as metadata."""
    return {"experts": json.dumps(list(experts)), "weights": digest(folder)}


def foreign(file: Path, experts: Sequence[str], metadata: Mapping[str, str]) -> str:
    """Why a router file with this metadata is not that of its folder; empty if it may be."""
    theirs = json.loads(metadata.get("experts", "[]"))
    if theirs and theirs != list(experts):
        return (
            f"the router file is from other experts: {', '.join(theirs)}, and this checkpoint has"
            f" {', '.join(experts)}"
        )
    try:
        other = "weights" in metadata and metadata["weights"] != digest(file.parent)
    except (OSError, ValueError):  # damaged weights: whoever reads them says so
        return ""
    return "the router file was trained beside other weights than this folder's" if other else ""


def digest(folder: Path) -> str:
    """Of all tensors beside a folder's router file: name, dtype, shape and first bytes of each,
    wherever it lies."""
    files = sorted(f for f in folder.glob("*.safetensors") if f.name != "router.safetensors")
    lines = sorted(line for file in files for line in _lines(file))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _lines(file: Path) -> Iterator[str]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, about in header.items():
            first, last = about["data_offsets"]
            stream.seek(8 + size + first)
            seen = hashlib.sha256(stream.read(min(SAMPLE, last - first))).hexdigest()
            yield f"{name} {about['dtype']} {about['shape']} {seen}"
