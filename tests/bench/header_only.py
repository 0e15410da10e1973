"""Llama-shaped checkpoints of any size that cost no disk: true headers, sparse data.

header_only(tmp_path / "a")                                                        # 70 B
header_only(tmp_path / "b", hidden=16384, layers=126, heads=128, intermediate=53248)  # 405 B
"""

from __future__ import annotations

from pathlib import Path

from .family import Llama, describe, header


def header_only(
    folder: Path,
    hidden: int = 8192,
    layers: int = 80,
    heads: int = 64,
    kv_heads: int = 8,
    intermediate: int = 28672,
    vocab: int = 128256,
    tied: bool = False,
    shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes shards of full length whose values read as zero, index and config; the folder."""
    shape = Llama(hidden, layers, heads, kv_heads, intermediate, vocab, tied, shard_bytes)
    folder.mkdir(parents=True)
    for name, specs in shape.shards.items():
        start = header(specs)
        with open(folder / name, "wb") as file:
            file.write(start)
            file.truncate(len(start) + sum(spec.nbytes for spec in specs))
    describe(folder, shape)
    return folder
