"""Who chooses, by the parameters that dynamic methods share."""

from __future__ import annotations

from typing import Any

import pytest
from made import made
from zoo import Zoo

from mowmerge.dynamic.format import Router
from mowmerge.methods.contracts import Site
from mowmerge.methods.gating import by_choice

CLASSIFIED = ("mow", "twin_merging", "one_bit", "emr", "tall_mask", "bitdelta")
CALLED = ("emr", "tall_mask", "bitdelta")


def routed(layers: int, **given: Any) -> Router:
    site = Site("layers.0.w", (4, 4), "F32", "mlp", "layers.", 0, layers, 4, 3)
    way = {"router": "linear", "prefix": 0.33, "features": "statistics", "seed": 7} | given
    (router,) = by_choice([site], way)[1].values()
    return router


@pytest.mark.parametrize(
    ("layers", "prefix", "layer"),
    [(12, 0.33, 4), (32, 0.33, 11), (2, 0.33, 1), (1, 0.33, 1), (12, 0.5, 6), (12, 0, 1),
     (12, 0.99, 12), (12, 1, 0)],
)  # fmt: skip
def test_the_prefix_is_a_share_of_the_layers(layers: int, prefix: float, layer: int) -> None:
    assert routed(layers, prefix=prefix).layer == layer


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, Router("linear", 4, 3, layer=4, pool="statistics", seed=7)),
        ({"features": "mean"}, Router("linear", 4, 3, layer=4, seed=7)),
        ({"router": "deep"}, Router("twin", 4, 3, 8, layer=4, pool="statistics", seed=7)),
        ({"router": "deep", "features": "mean"}, Router("twin", 4, 3, 8, layer=4, seed=7)),
        ({"router": "centroid"}, Router("centroid", 4, 3, layer=4, pool="statistics", seed=7)),
    ],
)
def test_kind_and_features(given: dict[str, Any], made: Router) -> None:
    assert routed(12, **given) == made


@pytest.mark.parametrize("name", CLASSIFIED)
def test_a_classifier_can_be_asked_for(zoo: Zoo, name: str) -> None:
    zoo.family("bert", 3)
    way = {"router": "linear", "prefix": 1, "features": "mean", "seed": 3}
    zoo.merge({"method": name, "parameters": way})
    found = made(zoo.folder / "out")
    assert found.manifest.gates["0"].scope == "sample"
    router = found.manifest.routers["0"]
    assert (router.kind, router.layer, router.pool, router.seed) == ("linear", 0, "mean", 3)
    assert found.tensors["mow_router.0.last.weight"].shape == (3, 16)


@pytest.mark.parametrize("name", CALLED)
def test_the_papers_leave_it_to_the_caller(zoo: Zoo, name: str) -> None:
    zoo.family("bert", 3)
    zoo.merge({"method": name})
    found = made(zoo.folder / "out").manifest
    assert found.gates["0"].scope == "task"
    assert not found.routers
    scales = bool(found.fitted)  # that may be trained lie where routers do
    assert (zoo.folder / "out" / "router.safetensors").exists() == scales == (name == "bitdelta")
