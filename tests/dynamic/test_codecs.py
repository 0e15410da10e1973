"""What a code holds comes back, alone and mixed, whole and in bands of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from making import CODECS, K, coded

from mowmerge.dynamic import codecs
from mowmerge.methods.ops.spectral import truncated

SHAPES = [(5, 19), (6, 3, 2, 2), (7,), (1, 4, 5)]


def test_bits_are_numpys_little_endian() -> None:
    bits = torch.rand(3, 4, 19) > 0.5
    packed = codecs.pack(bits)
    assert np.array_equal(packed.numpy(), np.packbits(bits.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(codecs.unpack(packed, 19), bits)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", CODECS)
def test_slots_and_mixtures_are_the_deltas(codec: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    anchor = torch.randn(shape)
    code, parts, delta = coded("t.weight", anchor, codec)
    for s in range(K):
        assert torch.allclose(codecs.slot(code, parts, s, anchor), delta[s], atol=2e-7)
    for batch in (1, 5):
        c = torch.randn(batch, K)
        want = anchor + torch.tensordot(c, delta, 1)
        assert torch.allclose(codecs.mixed(code, parts, anchor, c), want, atol=1e-6)
        room = torch.full((batch, anchor.numel()), float("nan"))
        codecs.mixed(code, parts, anchor, c, room)
        assert torch.allclose(room.view(want.shape), want, atol=1e-6)
        g = torch.randn(batch, *shape)
        want = g.flatten(1) @ delta.flatten(1).T
        assert torch.allclose(codecs.inner(code, parts, anchor, g), want, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("codec", CODECS)
def test_bands_and_rows_are_parts_of_the_whole(codec: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    anchor, c = torch.randn(shape), torch.randn(2, K)
    code, parts, _ = coded("t.weight", anchor, codec)
    whole = codecs.mixed(code, parts, anchor, c)
    pieces = [
        codecs.mixed(some, own, anchor[band], c) for band, some, own in codecs.bands(code, parts, 2)
    ]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6)
    index = torch.tensor([3, 0, 3])
    some, own = codecs.rows(code, parts, index)
    found = codecs.mixed(some, own, anchor[index], c)
    assert torch.allclose(found, whole[:, index], atol=1e-6)


@pytest.mark.parametrize("used", [[1], [2, 0], [0, 1, 2]])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", CODECS)
def test_some_slots_alone_are_themselves(
    codec: str, shape: tuple[int, ...], used: list[int]
) -> None:
    torch.manual_seed(0)
    anchor = torch.randn(shape)
    code, parts, _ = coded("t.weight", anchor, codec)
    some, own = codecs.pick(code, parts, used)
    assert some.slots == len(used)
    for i, s in enumerate(used):
        want = codecs.slot(code, parts, s, anchor)
        assert torch.equal(codecs.slot(some, own, i, anchor), want)


@pytest.mark.parametrize("batch", [1, 6])
def test_one_hot_of_full_abs_is_the_expert_bit_for_bit(batch: int) -> None:
    anchor = 1e3 * torch.randn(9, 8)
    experts = torch.randn(K, 9, 8)
    code = coded("t.weight", anchor, "full_abs")[0]
    c = torch.eye(K)[torch.arange(batch) % K]
    found = codecs.mixed(code, {"abs": experts}, anchor, c)
    assert torch.equal(found, experts[torch.arange(batch) % K])


def test_one_hot_of_full_is_one_rounding_away() -> None:
    anchor = torch.randn(9, 8)
    code, parts, delta = coded("t.weight", anchor, "full")
    for c in (torch.eye(K), torch.eye(K)[[0, 1, 2, 0, 1]]):
        found = codecs.mixed(code, parts, anchor, c)
        assert torch.equal(found, (anchor + delta)[c.argmax(1)])


def test_low_rank_is_the_best_of_its_rank() -> None:
    deltas = torch.randn(2, 8, 6)
    code = coded("t.weight", torch.zeros(8, 6), "low_rank", slots=2)[0]
    parts = codecs.low_rank(truncated(deltas, 2)[0])
    for s in range(2):
        left = (deltas[s] - codecs.slot(code, parts, s, torch.zeros(8, 6))).norm()
        tail = torch.linalg.svdvals(deltas[s])[2:].norm()
        assert torch.allclose(left, tail, rtol=1e-5)
