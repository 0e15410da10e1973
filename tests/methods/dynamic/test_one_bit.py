"""one_bit: signs and the mean magnitude, and what that loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made import made
from zoo import Zoo

from mowmerge.dynamic import codecs
from mowmerge.dynamic.format import Code
from mowmerge.methods.dynamic.one_bit import one_bit
from mowmerge.streaming import OpenJob


def coded(deltas: torch.Tensor, zeros: str = "plus") -> tuple[Code, dict[str, torch.Tensor]]:
    code = Code("w", tuple(deltas.shape[1:]), "one_bit", len(deltas), "0", zeros=zeros == "marked")
    return code, one_bit(deltas, torch.zeros(deltas.shape[1:]), code, zeros=zeros)  # type: ignore[arg-type]


def test_by_hand() -> None:
    deltas = torch.tensor([[[1.0, -3.0, 0.0, 0.0]]])
    code, parts = coded(deltas)
    assert parts["sign"].tolist() == [[[0b1101]]]  # of zero: plus
    assert parts["scale"].tolist() == [1.0]
    anchor = torch.zeros(1, 4)
    assert codecs.slot(code, parts, 0, anchor).tolist() == [[1.0, -1.0, 1.0, 1.0]]
    code, parts = coded(deltas, "marked")
    assert parts["occ"].tolist() == [[[0b0011]]]
    assert parts["scale"].tolist() == [2.0]
    assert codecs.slot(code, parts, 0, anchor).tolist() == [[2.0, -2.0, 0.0, 0.0]]


def test_size_is_kept_energy_is_not_and_again_is_the_same() -> None:
    deltas = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0))
    code, parts = coded(deltas)
    anchor = torch.zeros(30, 40)
    for k, delta in enumerate(deltas.double()):
        got = codecs.slot(code, parts, k, anchor.double())
        assert float(got.abs().sum()) == pytest.approx(float(delta.abs().sum()))
        a, n = float(parts["scale"][k]), delta.numel()
        assert float((got - delta).square().sum()) == pytest.approx(
            float(delta.square().sum()) - n * a * a
        )
        assert 0.6 < n * a * a / float(delta.square().sum()) < 0.68  # of a Gaussian, 2 / pi
    again = torch.stack([codecs.slot(code, parts, k, anchor) for k in range(2)])
    assert torch.equal(coded(again)[1]["sign"], parts["sign"])
    torch.testing.assert_close(coded(again)[1]["scale"], parts["scale"])


@pytest.mark.parametrize("whole", ["none", "attention", "mlp"])
def test_what_is_quantised(zoo: Zoo, whole: str) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": "one_bit", "parameters": {"whole": whole, "rest": 0.3}})
    found = made(zoo.folder / "out")
    for name, code in found.codes.items():
        role = "attention" if "self_attn" in name else "mlp" if ".mlp." in name else "other"
        assert (code.codec == "one_bit") == (role not in ("other", whole)), name
    (router,) = found.manifest.routers.values()
    assert (router.kind, router.top_k, router.rest, router.layer) == ("twin", 1, 0.3, 1)


@pytest.mark.parametrize("method", ["one_bit", "bitdelta"])
def test_only_what_is_quantised_is_measured(
    zoo: Zoo, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.family("llama", 2)
    measured: set[str] = set()
    observe = OpenJob.observe

    def watched(self: OpenJob, *args: Any) -> Any:
        measured.add(self.job.output.name)
        return observe(self, *args)

    monkeypatch.setattr(OpenJob, "observe", watched)
    zoo.merge({"method": method})
    codes = made(zoo.folder / "out").codes
    tables = {"model.embed_tokens.weight", "lm_head.weight"}  # whose rows are counted
    quantised = {name for name, code in codes.items() if code.codec == "one_bit"}
    assert measured == quantised | tables != set(codes)
