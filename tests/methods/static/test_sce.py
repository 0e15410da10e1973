"""sce: select, calculate, erase; by hand, its variants, and where nothing varies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import Zoo

from mowmerge.methods.static.sce import sce

# variances 1, 0, 9, 4 about the means 1, 2, 1, -1
TWO = torch.tensor([[2.0, 2.0, 4.0, 1.0], [0.0, 2.0, -2.0, -3.0]])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_by_hand() -> None:
    # all selected: masses 4 + 4 + 16 + 1 = 25 and 0 + 4 + 4 + 9 = 17; signs +, +, +, -
    # every entry has one sign left, or two equal values
    assert sce(TWO).tolist() == pytest.approx([2.0, 2.0, 4.0, -3.0])
    # three vary, floor(0.7 * 3) = 2 are selected: the last two
    assert sce(TWO, density=0.7).tolist() == pytest.approx([0.0, 0.0, 4.0, -3.0])
    assert sce(TWO, density=0.7, scale=0.5).tolist() == pytest.approx([0.0, 0.0, 2.0, -1.5])
    # where both agree, by their masses over S = the last entry alone: 1 and 9 of 10
    pair = torch.tensor([[4.0, 1.0], [8.0, 3.0]])  # variances 4, 1
    assert sce(pair, density=0.5).tolist() == pytest.approx([(16 * 4 + 64 * 8) / 80, 0.0])


def test_variants_by_hand() -> None:
    pair = torch.tensor([[4.0, 1.0], [8.0, 3.0]])
    # coefficients 16/80 and 64/80 from the first entry, all entries merged
    assert sce(pair, density=0.5, mode="fusechat").tolist() == pytest.approx([7.2, 2.6])
    # 17 and 73 of 90 from all entries
    assert sce(pair, mode="varm").tolist() == pytest.approx([
        (17 * 4 + 73 * 8) / 90, (17 + 73 * 3) / 90,
    ])  # fmt: skip
    assert sce(TWO, mode="varm")[3].item() == pytest.approx((25 - 3 * 17) / 42)  # no signs


def test_coefficients_do_not_depend_on_the_scale_unless_a_floor_says_so() -> None:
    deltas = normal(2, 200) * torch.tensor([[1e-4], [3e-4]])
    varm = sce(deltas, mode="varm")
    masses = deltas.double().square().sum(1)
    want = (deltas.double() * (masses / masses.sum())[:, None]).sum(0)
    assert torch.allclose(varm.double(), want, rtol=1e-5)
    even = sce(deltas, mode="varm", floor=1e-6)  # what mergekit does below 1e-6
    assert torch.allclose(even, deltas.mean(0), rtol=1e-5)
    assert torch.equal(sce(deltas, mode="varm", floor=1e-8), varm)


def test_where_nothing_varies() -> None:
    one = normal(1, 3, 4)
    equal = one.expand(3, -1, -1).contiguous() * 0.1
    for deltas in (one, equal):
        assert torch.allclose(sce(deltas), deltas[0])
        assert not sce(deltas, density=0.5).any()
        assert torch.allclose(sce(deltas, density=0.5, mode="fusechat"), deltas[0])


def test_the_share_selected() -> None:
    deltas = normal(3, 40, 50)
    for density in (0.1, 0.5, 0.9):
        assert int((sce(deltas, density=density) != 0).sum()) == int(density * 2000)
    assert not sce(deltas, density=0.0).any()


def test_the_sign_is_the_elected_one_and_the_value_lies_between() -> None:
    deltas = normal(4, 500)
    out, sign = sce(deltas), deltas.sum(0).sign()
    assert torch.equal(out.sign(), sign)
    agreeing = deltas.where(deltas.sign() == sign, torch.nan)
    assert (out.abs() <= agreeing.abs().nan_to_num(0).amax(0) + 1e-6).all()
    assert (out.abs() >= agreeing.abs().nan_to_num(1e9).amin(0) - 1e-6).all()


def test_of_equal_variances_the_first_are_selected() -> None:
    deltas = torch.tensor([[1.0, 1.0, 1.0, 5.0], [3.0, 3.0, 3.0, 5.0]])
    # three vary, all alike: floor(0.7 * 3) = 2 are selected
    assert sce(deltas, density=0.7).tolist() == pytest.approx([2.8, 2.8, 0.0, 0.0])


def test_a_single_model_of_which_nothing_is_selected_is_told(zoo: Zoo) -> None:
    family = zoo.family("llama", 1)
    found, report = zoo.merge({"method": "sce", "parameters": {"density": 0.5}})
    assert all(torch.equal(found[name], value) for name, value in family["base"].items())
    assert any("selects nothing of a single model" in line for line in report["warnings"])
    _, report = zoo.merge({"method": "sce"}, "all")
    assert not report["warnings"]
