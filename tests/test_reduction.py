"""Statistics over a whole model: how much is read and held for them, however many layers it has."""

from __future__ import annotations

from typing import Any

import pytest
from zoo import Shapes, Zoo, raw

from mowmerge import buffers, planner, reduction
from mowmerge.methods.contracts import Block
from mowmerge.methods.ops import selection
from mowmerge.plan import RUN

TIES = {"method": "ties", "parameters": {"density": 0.3}}
SAMPLE = 16_384


def layers(count: int) -> Shapes:
    """So many layers of a matrix of two runs and a vector."""
    shapes: Shapes = {}
    for i in range(count):
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (2, RUN)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (64,)
    return shapes


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each block of a sample had, of each model; a sample is to have SAMPLE."""
    lengths: list[int] = []
    true = selection._Sample.observe

    def observe(self: Any, block: Block) -> None:
        lengths.append(block.values.shape[1])
        true(self, block)

    monkeypatch.setattr(selection._Sample, "observe", observe)
    monkeypatch.setattr(selection, "SAMPLE_LEAST", SAMPLE)
    return lengths


@pytest.mark.parametrize("count", [2, 8, 16])
def test_a_sample_is_as_large_however_many_layers(
    zoo: Zoo, sampled: list[int], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(reduction, "SPAN", RUN)  # many tasks, most of them without a piece
    zoo.family(layers(count), 2)
    zoo.merge(TIES, workers=1)
    assert SAMPLE - 1024 <= sum(sampled) <= SAMPLE + 1024
    assert max(sampled) <= 1024


def test_a_sample_has_its_pieces_from_all_over_the_model(
    zoo: Zoo, sampled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    true = selection._Sample.observe

    def observe(self: Any, block: Block) -> None:
        seen.append((block.rng.tensor, block.rng.start))
        true(self, block)

    monkeypatch.setattr(selection._Sample, "observe", observe)
    zoo.family(layers(8), 2)
    zoo.merge(TIES, workers=1)
    each = [
        [start for name, start in seen if name == f"model.layers.{i}.mlp.up_proj.weight"]
        for i in range(8)
    ]
    assert min(map(len, each)) >= 2 and max(map(len, each)) - min(map(len, each)) <= 1
    for starts in each:  # evenly over the tensor
        assert starts == [2 * RUN * k // len(starts) for k in range(len(starts))]


@pytest.mark.parametrize("workers", [1, 3])
def test_counts_are_begun_a_few_times_however_many_layers(
    zoo: Zoo, sampled: list[int], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    begun: list[Any] = []
    true = selection._Tally._begin
    monkeypatch.setattr(
        selection._Tally, "_begin", lambda self: (begun.append(self), true(self))[1]
    )
    zoo.family(layers(20), 2)
    wanted = raw(zoo.merge(TIES, "at once", workers=workers)[0])
    begun.clear()
    monkeypatch.setattr(reduction, "SPAN", RUN)
    assert raw(zoo.merge(TIES, workers=workers)[0]) == wanted
    passes = 2  # one for thresholds, seldom another
    assert 0 < len(begun) <= passes * 2 * (1 + 5 * workers)  # of two models; a rest is a part


def test_matrices_are_given_back_and_blocks_are_not(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(buffers, "_keep", asked.append)
    zoo.family("llama", 2)
    zoo.merge({"method": "linear"}, "linear")
    assert asked == [buffers.MOST] * 2
    asked.clear()
    zoo.merge({"method": "iso_c"}, "iso_c")
    assert asked == [8 * planner.BLOCK, buffers.MOST]
    asked.clear()
    inner = {"method": "iso_c", "base": "./base", "models": {"a": "./a", "b": "./b"}}
    nested = {"base": None, "models": {"x": {"source": inner}}, "method": "passthrough"}
    zoo.merge(nested, "nested")
    assert asked == [8 * planner.BLOCK, buffers.MOST]
