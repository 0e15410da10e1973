"""bitdelta: one bit a weight of attention and MLPs, everything else the tenant's own."""

from __future__ import annotations

import torch
from made import made
from zoo import Zoo

from mowmerge.dynamic.format import Code
from mowmerge.methods.dynamic.bitdelta import bitdelta


def test_by_hand() -> None:
    code = Code("w", (1, 3), "one_bit", 2, "0")
    parts = bitdelta(torch.tensor([[[3.0, -3.0, 0.0]], [[0.0, 0.0, 0.0]]]), torch.zeros(1, 3), code)
    assert parts["sign"].tolist() == [[[0b101]], [[0b111]]]
    assert parts["scale"].tolist() == [2.0, 0.0]


def test_tenants(zoo: Zoo) -> None:
    models = zoo.family("bert", 3)
    zoo.merge({"method": "bitdelta"})
    found = made(zoo.folder / "out")
    assert set(found.codes) == set(models["base"])
    assert not found.manifest.routers
    assert {gate.scope for gate in found.manifest.gates.values()} == {"task"}
    for name, code in found.codes.items():
        matrix = name.startswith("encoder.layer.") and len(code.shape) == 2
        assert code.codec == ("one_bit" if matrix else "full"), name
        for k, expert in enumerate("abc"):
            want = models[expert][name]
            if matrix:
                delta = want.double() - models["base"][name].double()
                scale = found.parts(code)["scale"][k].double()
                torch.testing.assert_close(scale, delta.abs().mean(), rtol=1e-6, atol=0)
            else:
                torch.testing.assert_close(found.expert(name, k).float(), want)
