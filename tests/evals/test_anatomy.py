"""What a merge did, by layer and role, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mowmerge.evals.anatomy import anatomy


def tensor(name: str, shape: list[int], action: str = "merged", **more: Any) -> dict[str, Any]:
    figures = {
        "delta_norms": [3.0, 0.0],
        "mean_cosine": 0.0,
        "sign_conflict": 0.0,
        "kept_share": 1.0,
    }
    return {"name": name, "shape": shape, "action": action, "method": "mow", "models": ["a", "b"],
            **figures, **more}  # fmt: skip


def test_tensors_of_a_layer_and_role_are_added_up() -> None:
    tensors = [
        tensor("model.layers.1.mlp.up_proj.weight", [3, 2], "dynamic", mean_cosine=0.4,
               codec="full"),
        tensor("model.layers.1.mlp.up_proj.bias", [2], delta_norms=[4.0, 1.0], mean_cosine=None,
               sign_conflict=0.8),
        tensor("model.embed_tokens.weight", [8], "copied"),
    ]  # fmt: skip
    report = {"models": ["base", "a", "b"], "base": "base", "tensors": tensors, "seconds": 1.0,
              "planned_peak_bytes": 1, "read_bytes": 2, "written_bytes": 3, "warnings": ["w"],
              "survey": {"dissimilarity": {"mlp": {"model.layers.1": 0.25}}}}  # fmt: skip
    found = anatomy(report)
    layer, outside = found.layers
    assert (layer.stack, layer.layer, layer.role) == ("model.layers", 1, "mlp")
    assert (layer.tensors, layer.elements, layer.dynamic, layer.copied) == (2, 8, 0.75, 0.0)
    assert layer.norms == {"a": 5.0, "b": 1.0}
    assert layer.cosine == pytest.approx(0.4)  # of the tensor that has one
    assert layer.sign_conflict == pytest.approx(0.8 * 2 / 8)
    assert (outside.layer, outside.role, outside.copied) == (None, "embedding", 1.0)
    assert found.experts == ["a", "b"]
    assert found.codecs == {"full": 1}
    assert found.similarity == {"mlp": {"model.layers.1": 0.75}}
    assert found.warnings == ["w"]
