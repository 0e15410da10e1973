"""twin_merging: exclusive parts are what is left of the experts beside the shared one."""

from __future__ import annotations

import torch
from made import made
from zoo import Zoo

from mowmerge.methods.dynamic.twin_merging import twin_merging


def test_uniform_gates_at_full_rank_give_the_average_whatever_is_shared(zoo: Zoo) -> None:
    models = zoo.family("llama", 3)
    for rest in ({"method": "linear"}, {"method": "ties"}):
        out = str(rest["method"])
        way = {"method": "twin_merging", "parameters": {"density": 1.0}, "rest": rest}
        zoo.merge(way, out)
        found = made(zoo.folder / out)
        assert set(found.codes) == set(models["base"])
        for name in found.codes:
            mean = torch.stack([models[e][name] for e in "abc"]).mean(0)
            uniform = found.tensors[name] + sum(found.slots(name)) / 3
            torch.testing.assert_close(uniform.float(), mean, rtol=1e-4, atol=1e-4)


def test_vectors_are_whole_and_matrices_keep_at_least_one_pair(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": "twin_merging", "parameters": {"density": 0.0}})
    found = made(zoo.folder / "out")
    for name, code in found.codes.items():
        norm = "norm" in name
        assert (code.codec, code.rank) == (("full", 0) if norm else ("low_rank", 1))
    (router,) = found.manifest.routers.values()
    assert (router.kind, router.width, router.hidden, router.layer) == ("twin", 16, 32, 1)
    assert found.tensors["mow_router.0.norm1.running_var"].tolist() == [1.0] * 32


def test_the_papers_router_can_be_asked_for(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": "twin_merging", "parameters": {"prefix": 1, "features": "mean"}})
    found = made(zoo.folder / "out")
    (router,) = found.manifest.routers.values()
    assert (router.kind, router.pool, router.hidden, router.layer) == ("twin", "mean", 32, 0)
    assert found.tensors["mow_router.0.first.weight"].shape == (32, 16)


def test_without_a_base_the_rest_is_named(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    experts = {"a": "./a", "b": "./b"}
    way = {"method": "twin_merging", "models": experts, "rest": {"method": "linear"}}
    found, _ = zoo.merge(way)
    name = "model.norm.weight"
    assert torch.equal(found[name], (models["a"][name] * 0.5).add_(models["b"][name], alpha=0.5))


def test_by_hand() -> None:
    from mowmerge.dynamic.format import Code

    models, anchor = torch.tensor([[3.0, 1.0], [1.0, 5.0]]), torch.tensor([2.0, 2.0])
    parts = twin_merging(models, anchor, Code("v", (2,), "full", 2, "0"))
    assert parts["delta"].tolist() == [[1.0, -1.0], [-1.0, 3.0]]


def test_the_largest_entries_by_hand() -> None:
    from mowmerge.dynamic.format import Code

    models = torch.tensor([[[3.0, 1.0], [2.0, 5.0]], [[2.0, 2.0], [2.0, 4.0]]])
    code = Code("w", (2, 2), "sparse", 2, "0", kept=2)
    parts = twin_merging(models, torch.full((2, 2), 2.0), code, keep="magnitude")
    assert parts["val"].tolist() == [1.0, 3.0, 0.0, 2.0]  # of equals the first, zeros too
    assert parts["ptr"].tolist() == [0, 2, 4]
    assert parts["occ"].tolist() == [[[1], [2]], [[1], [2]]]


def test_every_matrix_keeps_as_many_entries_as_it_says(zoo: Zoo) -> None:
    models = zoo.family("llama", 3, dtype=torch.bfloat16)
    zoo.merge({"method": "twin_merging", "parameters": {"keep": "magnitude", "density": 0.15}})
    found = made(zoo.folder / "out")
    for name, code in found.codes.items():
        if code.codec == "full":
            continue
        anchor, kept = found.tensors[name].float(), int(0.15 * found.tensors[name].numel())
        assert (code.codec, code.kept) == ("sparse", kept)
        for k, slot in enumerate(found.slots(name)):
            delta = models["abc"[k]][name].float() - anchor
            order = delta.flatten().abs().argsort(descending=True, stable=True)[:kept]
            want = torch.zeros(delta.numel()).index_copy(0, order, delta.flatten()[order])
            assert torch.equal(slot, want.bfloat16().to(slot).view_as(slot)), name
