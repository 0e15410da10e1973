"""smile: low-rank experts with the gate in the same factors."""

from __future__ import annotations

import pytest
import torch
from made import made
from zoo import Zoo

from mowmerge.dynamic import codecs
from mowmerge.dynamic.format import Code
from mowmerge.errors import RecipeError
from mowmerge.methods.dynamic.smile import smile


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def code(rank: int, gate_rank: int, slots: int = 3) -> Code:
    return Code("w", (6, 5), "low_rank", slots, "0", rank=rank, gate_rank=gate_rank)


@pytest.mark.parametrize(("rank", "gate"), [(5, 1), (2, 4), (3, 3), (1, 1)])
def test_experts_are_truncated_and_gates_are_their_right_singular_vectors(
    rank: int, gate: int
) -> None:
    base, deltas = normal(6, 5), normal(3, 6, 5)
    parts = smile(deltas, base, code(rank, gate))
    assert torch.equal(parts["anchor"], base)
    u, s, vh = torch.linalg.svd(deltas, full_matrices=False)
    for k in range(3):
        kept = u[k, :, :rank] * s[k, :rank] @ vh[k, :rank]
        torch.testing.assert_close(codecs.slot(code(rank, gate), parts, k, base), kept)
    gates = parts["gate"].view(3, gate, 5)
    torch.testing.assert_close((gates * vh[:, :gate]).sum(2).abs(), torch.ones(3, gate))
    torch.testing.assert_close(gates @ gates.mT, torch.eye(gate).expand(3, -1, -1))
    assert parts["u"].shape == (6, 3 * rank)
    assert parts["v"].shape == (3 * rank, 5)
    assert parts["slot"].tolist() == [k for k in range(3) for _ in range(rank)]


def test_a_weight_stored_in_out_is_gated_by_its_left_singular_vectors() -> None:
    deltas = normal(3, 6, 5)
    across = Code("w", (5, 6), "low_rank", 3, "0", rank=2, gate_rank=2, gate_width=5)
    parts = smile(deltas.mT, normal(5, 6), across)
    ours = smile(deltas, normal(6, 5), code(2, 2))
    assert parts["gate"].shape == across.parts["gate"].shape == (6, 5)
    torch.testing.assert_close((parts["gate"] * ours["gate"]).sum(1).abs(), torch.ones(6))


def test_an_expert_that_did_not_move_is_never_preferred() -> None:
    deltas = normal(2, 6, 5)
    deltas[0] = 0
    parts = smile(deltas, normal(6, 5), code(3, 2, slots=2))
    assert not parts["gate"][:2].any()
    assert not parts["u"][:, :3].any()
    assert all(torch.isfinite(value).all() for value in parts.values())


def test_biases_are_whole() -> None:
    base, deltas = normal(6), normal(3, 6)
    parts = smile(deltas, base, Code("b", (6,), "full", 3, "0"))
    assert torch.equal(parts["delta"], deltas)


def test_a_bias_goes_with_its_matrix(zoo: Zoo) -> None:
    zoo.family("bert", 2)
    out = "*0.intermediate.dense.weight"
    rule = {"match": {"tensors": out}, "method": "linear"}
    with pytest.raises(RecipeError, match="intermediate.dense.bias' is chosen by the gate of its"):
        zoo.merge({"method": "smile", "rules": [rule]})
    rule = {"match": {"tensors": "*0.intermediate.dense.*"}, "method": "linear"}
    zoo.merge({"method": "smile", "rules": [rule]})
    coded = made(zoo.folder / "out").codes
    assert "encoder.layer.0.intermediate.dense.bias" not in coded
    assert "encoder.layer.1.intermediate.dense.bias" in coded
