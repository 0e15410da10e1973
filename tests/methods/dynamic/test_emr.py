"""emr: elect, mask, rescale; by hand, and what the paper says of the sizes."""

from __future__ import annotations

import pytest
import torch
from made import Made, made
from zoo import Zoo

from mowmerge.methods.dynamic.emr import emr

D = torch.tensor([[4.0, -1.0, 2.0, 0.0], [-2.0, -3.0, -2.0, 0.0]])


def test_by_hand() -> None:
    # sums 2 -4 0 0: signs + - - -; agreeing 4, (1,3), 2 of the second, none
    parts = emr(D, torch.zeros(4))
    assert parts["unified"].tolist() == [4.0, -3.0, -2.0, 0.0]
    assert parts["mask"].tolist() == [[[0b0011]], [[0b0110]]]
    assert parts["scale"].tolist() == pytest.approx([7 / 7, 7 / 5])


def test_an_empty_mask_has_the_factor_0() -> None:
    parts = emr(torch.tensor([[1.0, 1.0], [-2.0, -2.0]]), torch.zeros(2))
    assert parts["scale"].tolist() == [0.0, 1.0]
    assert emr(torch.zeros(2, 3), torch.zeros(3))["scale"].tolist() == [0.0, 0.0]


def merged(zoo: Zoo, **way: str) -> Made:
    zoo.merge({"method": "emr", "parameters": way}, force=True)
    return made(zoo.folder / "out")


def test_the_sizes_of_task_vectors_are_kept_over_the_whole_model(zoo: Zoo) -> None:
    models = zoo.family("llama", 3)
    found = merged(zoo)
    for k, expert in enumerate("abc"):
        ours = sum(float(found.slots(n)[k].abs().sum()) for n in found.codes)
        true = sum(
            float((models[expert][n].double() - models["base"][n].double()).abs().sum())
            for n in found.codes
        )
        assert ours == pytest.approx(true, rel=1e-5)
        for name, code in found.codes.items():
            delta = models[expert][name].double() - models["base"][name].double()
            parts = found.parts(code)
            rebuilt = found.slots(name)[k]
            inside = rebuilt != 0
            assert torch.equal(rebuilt[inside].sign(), delta[inside].sign())
            largest = parts["unified"].double().abs() + 1e-7
            assert (largest[inside] >= delta[inside].abs()).all()


@pytest.mark.parametrize("way", [{}, {"rescale": "tensor_mean"}])
def test_one_expert_and_identical_ones_are_exact(zoo: Zoo, way: dict[str, str]) -> None:
    models = zoo.family("llama", 1)
    for experts in ("a", "abc"):
        for expert in experts:
            zoo.save(expert, models["a"])
        found = merged(zoo, **way)
        for name, code in found.codes.items():
            assert found.parts(code)["scale"].tolist() == pytest.approx([1.0] * len(experts))
            torch.testing.assert_close(found.expert(name, 0).float(), models["a"][name])


def test_a_small_tensor_weighs_by_its_size_unless_means_are_asked_for(zoo: Zoo) -> None:
    zoo.save("base", {"large": torch.zeros(100, 10), "small": torch.zeros(2)})
    zoo.save("a", {"large": torch.full((100, 10), 1.0), "small": torch.tensor([1.0, 1.0])})
    zoo.save("b", {"large": torch.full((100, 10), 3.0), "small": torch.tensor([-5.0, 1.0])})
    scales = {}
    for way in ("global", "tensor_mean"):
        found = merged(zoo, rescale=way)
        scales[way] = found.tensors["large.dyn_scale"].tolist()
    # a: 1002 of 3001, means (1 + 1) / (3 + 0.5); b: 3006 of 3006, (3 + 3) / (3 + 3)
    assert scales["global"] == pytest.approx([1002 / 3001, 1.0])
    assert scales["tensor_mean"] == pytest.approx([2 / 3.5, 1.0])
