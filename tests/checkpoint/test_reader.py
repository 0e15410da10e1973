"""Reading: byte ranges of stored tensors into the caller's buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import Zoo, raw

from mowmerge.checkpoint import source
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.errors import CheckpointError
from mowmerge.tensors import TensorReader

VALUES = {"a": torch.arange(1000.0), "b": torch.arange(77, dtype=torch.bfloat16).reshape(7, 11)}


def reader(zoo: Zoo, *, pickled: bool) -> StoredReader:
    if pickled:
        torch.save(VALUES, zoo.folder / "model.pt")
        return StoredReader(source.find(str(zoo.folder / "model.pt"), allow_pickle=True))
    return StoredReader(source.find(str(zoo.save("m", VALUES))))


@pytest.mark.parametrize("pickled", [False, True])
def test_any_range_of_any_tensor(tmp_path_factory: pytest.TempPathFactory, pickled: bool) -> None:
    opened: TensorReader = reader(Zoo(tmp_path_factory.mktemp("m")), pickled=pickled)

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.sampled_from("ab"), st.integers(0, 999), st.integers(0, 999))
    def check(name: str, one: int, two: int) -> None:
        spec = opened.specs[name]
        start, stop = sorted((min(one, spec.numel), min(two, spec.numel)))
        size = spec.itemsize
        out = bytearray((stop - start) * size + 3)
        handle = opened.open(name)
        handle.advise(start, stop)
        handle.read(start, stop, memoryview(out))
        handle.close()
        assert out[:-3] == raw(VALUES)[name][start * size : stop * size]
        assert out[-3:] == b"\0\0\0"

    check()


def test_a_file_that_shrinks_while_it_is_read(zoo: Zoo) -> None:
    opened = reader(zoo, pickled=False)
    file = zoo.folder / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    last = max(VALUES, key=lambda name: opened._stored.tensors[name].offset)
    handle, spec = opened.open(last), opened.specs[last]
    with pytest.raises(CheckpointError, match=f"the file ended inside tensor '{last}'") as caught:
        handle.read(0, spec.numel, memoryview(bytearray(spec.nbytes)))
    assert caught.value.problems[0].where == str(file)
    handle.close()


def test_a_file_that_goes_away_while_it_is_read(zoo: Zoo) -> None:
    opened = reader(zoo, pickled=False)
    Path(zoo.folder / "m" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more") as caught:
        opened.open("a")
    assert caught.value.problems[0].hint
