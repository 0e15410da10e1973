"""The place of every byte of a checkpoint, from its tensors' names, dtypes and shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from mowmerge.plan import Shard
from mowmerge.tensors import TensorSpec

ALIGN = 64  # the data section of a shard starts at a multiple of this


def layout(
    specs: Sequence[TensorSpec], shard_size: int, metadata: Mapping[str, str], stem: str = ""
) -> list[Shard]:
    """The output files: tensors in the given order, cut into shards of at most shard_size bytes.

    One file alone is model.safetensors, unless a stem is given: then there are others beside it.

    Inside a shard wider dtypes come first, so that every tensor is aligned to its element.
    """
    groups: list[list[TensorSpec]] = [[]]
    room = shard_size
    for spec in specs:
        if groups[-1] and spec.nbytes > room:
            groups.append([])
            room = shard_size
        groups[-1].append(spec)
        room -= spec.nbytes
    n = len(groups)
    names = [f"{stem or 'model'}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    names = names if n > 1 or stem else ["model.safetensors"]
    return [shard_of(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def shard_of(file: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    """One output file of these tensors: wider dtypes first, the data aligned."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for spec in sorted(specs, key=lambda s: -s.itemsize):
        offsets[spec.name] = end
        end += spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offsets[spec.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    header = len(text).to_bytes(8, "little") + text
    placed = {name: len(header) + offset for name, offset in offsets.items()}
    return Shard(file, header, placed, len(header) + end)


def index(shards: Sequence[Shard], specs: Mapping[str, TensorSpec]) -> str | None:
    """The text of model.safetensors.index.json; None for a single file."""
    if len(shards) == 1:
        return None
    totals = {
        "total_parameters": sum(s.numel for s in specs.values()),
        "total_size": sum(shard.nbytes - len(shard.header) for shard in shards),
    }
    where = {name: shard.file for shard in shards for name in shard.offsets}
    return (
        json.dumps({"metadata": totals, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"
    )
