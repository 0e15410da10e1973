"""What a weight file holds: the names, dtypes, shapes and places of its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mowmerge.errors import CheckpointError
from mowmerge.plan import Location
from mowmerge.tensors import DTYPES, TensorSpec

_MAX_HEADER = 100_000_000


def read_header(file: Path) -> list[Location]:
    """Every tensor of a safetensors file, in file order; CheckpointError where it is not whole."""
    again = "download it again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, max(2, size - 8)):
                raise CheckpointError(
                    f"not a safetensors file, or a truncated one ({size} bytes)",
                    where=str(file),
                    hint=again,
                )
            header: dict[str, Any] = json.loads(stream.read(length))
        found, end = locations(file, header, 8 + length)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"the shard {file.name} that the index names is not there",
            where=str(file.parent),
            hint=again,
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"the header is corrupt: {error}", where=str(file), hint=again
        ) from error
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "longer than its header says"
        raise CheckpointError(
            f"the file is {what}: {8 + length + end} bytes expected, {size} there",
            where=str(file),
            hint=again,
        )
    return found


def metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors; `read_header` looked it over."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    held: dict[str, str] = header.get("__metadata__", {})
    return held


def locations(file: Path, header: dict[str, Any], data: int) -> tuple[list[Location], int]:
    """A header's tensors in file order, and the length of the data that starts at byte `data`."""
    found, end = [], 0
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        spec = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
        if spec.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor '{name}' has the unknown dtype '{spec.dtype}'", where=str(file),
                hint="is mowmerge older than this file?",
            )  # fmt: skip
        whole = all(type(n) is int and n >= 0 for n in spec.shape)
        if not whole or start != end or stop - start != spec.nbytes:
            raise CheckpointError(
                f"the header is corrupt at tensor '{name}'", where=str(file),
                hint="download it again",
            )  # fmt: skip
        found.append(Location(spec, str(file), data + start))
        end = stop
    return found, end


def pickle_header(file: Path) -> list[Location]:
    """The tensors of a pickled file, which is loaded for that; no place in it is known."""
    from mowmerge.checkpoint.reader import load_pickle

    codes = {d.torch_name: d.code for d in DTYPES.values() if d.kind != "packed"}
    return [
        Location(
            TensorSpec(name, codes[str(t.dtype).removeprefix("torch.")], tuple(t.shape)),
            str(file),
            0,
        )
        for name, t in load_pickle(str(file)).items()
    ]
