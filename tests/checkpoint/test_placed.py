"""Rows placed as they are read: any cut, any index, from files and from views."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mowmerge.checkpoint import placed, source
from mowmerge.checkpoint.placed import PlacedReader, held_bytes
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.errors import CheckpointError
from mowmerge.placement import MEAN, NONE, Placed, Rows
from mowmerge.plan import Stored
from mowmerge.tensors import DTYPES, TensorHandle, TensorSpec


@dataclass(frozen=True)
class View:
    """A reader whose handles can only read: what an adapter or a nested recipe is."""

    inner: StoredReader

    @property
    def specs(self) -> Any:
        return self.inner.specs

    def open(self, name: str) -> TensorHandle:
        handle = self.inner.open(name)

        class Handle:
            read, advise, close = handle.read, handle.advise, handle.close

        return Handle()


def stored(folder: Path, name: str, value: Tensor) -> Stored:
    save_file({"w": value}, folder / f"{name}.safetensors")
    return source.find(str(folder / f"{name}.safetensors"))


def whole(reader: PlacedReader, cuts: list[int]) -> Tensor:
    """The placed tensor, read in pieces that end at these elements."""
    spec = reader.specs["w"]
    value = torch.empty(spec.shape, dtype=DTYPES[spec.dtype].torch)
    data = value.view(-1).view(torch.uint8).numpy().data
    with closing(reader.open("w")) as handle:
        ends = [*sorted(cuts), spec.numel]
        for start, stop in zip([0, *ends], ends, strict=False):
            handle.advise(start, stop)
            handle.read(start, stop, data[start * spec.itemsize : stop * spec.itemsize])
    return value


def expected(values: list[Tensor], index: Any, dtype: torch.dtype) -> Tensor:
    """Row by row."""
    rows = []
    for column in index.T:
        taken = [value[i] for value, i in zip(values, column, strict=True) if i >= 0]
        if len(taken) == 1:
            rows.append(taken[0].to(dtype))
        elif taken:
            rows.append((sum(row.float() for row in taken) / len(taken)).to(dtype))
        elif column[0] == MEAN:
            rows.append(values[0].double().mean(0).float().to(dtype))
        else:
            rows.append(torch.zeros(values[0].shape[1], dtype=dtype))
    return torch.stack(rows)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), views=st.booleans(), step=st.sampled_from([1, 6, 1 << 17]))
def test_any_index_in_any_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, views: bool, step: int
) -> None:
    monkeypatch.setattr(placed, "WIDE", step)
    dtypes = [data.draw(st.sampled_from([torch.float32, torch.bfloat16])) for _ in range(2)]
    heights = [data.draw(st.integers(1, 6)) for _ in range(2)]
    values = [
        torch.randn(height, 3, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, (height, dtype) in enumerate(zip(heights, dtypes, strict=True))
    ]
    values[0][0, 0] = -0.0
    count = data.draw(st.integers(1, 8))
    entries = [
        data.draw(st.lists(st.integers(low, height - 1), min_size=count, max_size=count))
        for low, height in zip((MEAN, NONE), heights, strict=True)
    ]
    index = numpy.array(entries, dtype=numpy.int32)
    index[1, index[0] == MEAN] = NONE  # which nobody else has
    sources = [stored(tmp_path, f"m{i}", value) for i, value in enumerate(values)]
    dtype = torch.float32 if torch.float32 in dtypes else torch.bfloat16
    code = "F32" if dtype is torch.float32 else "BF16"
    rows = Rows(TensorSpec("w", code, (count, 3)), ((0, "w"), (1, "w")), index)
    view = Placed(sources[0], tuple(sources), {"w": rows})
    lenders = [StoredReader(each) for each in sources]
    reader = PlacedReader([View(each) for each in lenders] if views else lenders, view)
    cuts = data.draw(st.lists(st.integers(0, 3 * count), max_size=3))
    got, want = whole(reader, cuts), expected(values, index, dtype)
    kind = torch.int32 if dtype is torch.float32 else torch.int16
    alone = (index >= 0).sum(0) <= 1
    alone &= index[0] != MEAN
    assert torch.equal(got[alone].view(kind), want[alone].view(kind))  # bytes, -0.0 among them
    assert torch.allclose(got.float(), want.float(), atol=1e-6)


def test_rows_in_one_piece_are_read_as_they_are(tmp_path: Path) -> None:
    """A prefix that did not move costs one read and no arithmetic: a NaN's bits stay."""
    value = torch.zeros(4, 2)
    value.view(torch.int32)[1, 1] = 0x7FC12345
    held = stored(tmp_path, "m", value)
    index = numpy.array([[1, 2, 3, NONE]], dtype=numpy.int32)
    rows = Rows(TensorSpec("w", "F32", (4, 2)), ((0, "w"),), index)
    got = whole(PlacedReader([StoredReader(held)], Placed(held, (held,), {"w": rows})), [6])
    assert got.view(torch.int32)[0, 1] == 0x7FC12345
    assert torch.equal(got[1:], torch.zeros(3, 2))


def test_what_is_held_and_what_a_view_is(tmp_path: Path) -> None:
    held = stored(tmp_path, "m", torch.zeros(4, 2))
    index = numpy.array([[3, 2, 1, 0]], dtype=numpy.int32)
    rows = Rows(TensorSpec("w", "F32", (4, 2)), ((0, "w"),), index)
    view = Placed(held, (held,), {"w": rows})
    assert held_bytes(view, "w") == 4 * 4 + 8 * (4 * 8 + 4) + 2 * 8 * 2
    assert held_bytes(held, "w") == held_bytes(view, "other") == 0
    other = replace(view, rows={"w": replace(rows, index=index[:, ::-1].copy())})
    assert view.fingerprint == replace(view).fingerprint != other.fingerprint


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    """A map of it would end the process."""
    held = stored(tmp_path, "m", torch.zeros(4000, 2))
    with closing(StoredReader(held).open("w")) as handle:
        file = tmp_path / "m.safetensors"
        with file.open("r+b") as stream:
            stream.truncate(8000)
        with pytest.raises(CheckpointError, match="the file ended inside tensor 'w'"):
            handle.gather(numpy.array([3999]), 2)  # type: ignore[attr-defined]
        assert handle.gather(numpy.array([3]), 2).shape == (1, 8)  # type: ignore[attr-defined]
