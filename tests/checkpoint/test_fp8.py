"""fp8 checkpoints with scales, as they are published, de-quantised as they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import adapt, held, quiet, save
from safetensors.torch import load_file
from torch import Tensor
from zoo import Zoo

from mowmerge import planner
from mowmerge.checkpoint import fp8, source
from mowmerge.errors import MowmergeError

E4M3 = torch.float8_e4m3fn
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128]}  # fmt: skip
EIGHT_BITS = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": EIGHT_BITS}}


def config(settings: Any, dtype: str = "bfloat16") -> dict[str, Any]:
    return {"model_type": "llama", "torch_dtype": dtype, "quantization_config": settings}


def fp8_of(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(E4M3)


def scales(*shape: int, seed: int = 9) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def read(zoo: Zoo, folder: str, **options: Any) -> dict[str, Tensor]:
    return zoo.merge({"models": {"m": f"./{folder}"}, "method": "passthrough"}, "out", **options)[0]


def test_blocks_by_hand(zoo: Zoo) -> None:
    """130 by 129: a grid of 2 by 2, whose last blocks are two rows and one column."""
    weight = torch.full((130, 129), 2.0).to(E4M3)
    scale = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    tensors = {"x.q_proj.weight": weight, "x.q_proj.weight_scale_inv": scale,
               "x.norm.weight": torch.ones(4, dtype=torch.bfloat16)}  # fmt: skip
    zoo.save("m", tensors, config=config(DEEPSEEK))
    got = read(zoo, "m")
    assert got.keys() == {"x.q_proj.weight", "x.norm.weight"}
    value = got["x.q_proj.weight"]
    assert value.dtype == torch.bfloat16
    assert [value[0, 0], value[127, 127], value[0, 128], value[128, 0], value[129, 128]] == [
        2, 2, 6, 10, 14,
    ]  # fmt: skip
    settings = json.loads((zoo.folder / "out" / "config.json").read_text())
    assert settings == {"model_type": "llama", "torch_dtype": "bfloat16"}


def expanded(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """W = fp8 * scale in fp64, one element at a time in effect."""
    rows = torch.arange(weight.shape[-2]) // block[0]
    columns = torch.arange(weight.shape[-1]) // block[1]
    return weight.double() * scale.double()[..., rows, :][..., columns]


@pytest.mark.parametrize(
    ("shape", "scale", "block", "suffix", "settings"),
    [
        ((300, 517), (3, 5), (128, 128), "_scale_inv", DEEPSEEK),
        ((300, 517), (10, 9), (32, 64), "_scale_inv", {**DEEPSEEK, "weight_block_size": [32, 64]}),
        ((3, 200, 140), (3, 2, 2), (128, 128), "_scale_inv", DEEPSEEK),
        ((300, 517), (1,), (300, 517), "_scale", COMPRESSED),
        ((300, 517), (), (300, 517), "_scale", COMPRESSED),
        ((300, 517), (300, 1), (1, 517), "_scale", COMPRESSED),
        ((300, 517), (300,), (1, 517), "_scale", COMPRESSED),
        ((3, 200, 140), (3, 200, 1), (1, 140), "_scale", COMPRESSED),
        ((300, 517), (3, 5), (128, 128), "_scale_inv", None),
    ],
    ids=lambda value: str(value)[:12],
)
def test_every_layout_of_scales(
    zoo: Zoo, shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int], suffix: str,
    settings: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(planner, "BLOCK", 65_536)
    weight, numbers = fp8_of(*shape), scales(*scale)
    grid = numbers
    if block[0] == 1:
        grid = numbers.view(*shape[:-1], 1)
    elif suffix == "_scale":
        grid = numbers.view(1, 1)
    want = expanded(weight, grid, block)
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        tensors = {"x.q_proj.weight": weight, f"x.q_proj.weight{suffix}": numbers,
                   "x.q_proj.input_scale": torch.ones(1)}  # fmt: skip
        zoo.save("m", tensors, config=config(settings, name))
        got = read(zoo, "m", force=True)
        assert list(got) == ["x.q_proj.weight"]
        torch.testing.assert_close(got["x.q_proj.weight"], want.to(dtype), rtol=1e-6, atol=0)


def test_fp8_models_merge_with_plain_ones_and_take_adapters(zoo: Zoo) -> None:
    """A de-quantised base under an expert in bf16, and under a LoRA."""
    base = save(zoo.folder / "base", "llama", torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        packed[name] = value
        if "_proj" in name:
            scale = value.float().abs().amax() / 448
            packed[name] = (value.float() / scale).to(E4M3)
            packed[f"{name}_scale_inv"] = scale.view(1, 1)
    settings = json.loads((base / "config.json").read_text())
    zoo.save("fp8", packed, config={**settings, "quantization_config": DEEPSEEK})
    zoo.merge({"models": {"m": "./fp8"}, "method": "passthrough"}, "plain")
    adapter = adapt(base, zoo.folder / "a")
    one, two = (
        zoo.merge(
            {"base": f"./{name}", "method": "task_arithmetic",
             "models": {"x": "./base", "y": {"source": "base", "adapter": str(adapter)}}},
            f"from-{name}",
        )[0]
        for name in ("fp8", "plain")
    )  # fmt: skip
    for name, value in two.items():
        assert torch.equal(one[name], value), name
    with quiet():
        held(zoo.folder / "from-fp8")


@pytest.mark.parametrize("scale", [(2, 2), (299,), (4, 5, 1)], ids=str)
def test_a_scale_of_another_shape_is_refused(zoo: Zoo, scale: tuple[int, ...]) -> None:
    tensors = {"x.weight": fp8_of(300, 517), "x.weight_scale_inv": scales(*scale)}
    folder = zoo.save("m", tensors, config=config(DEEPSEEK))
    with pytest.raises(MowmergeError, match="'x.weight' is F8_E4M3 without a scale"):
        source.find(str(folder))


@pytest.mark.parametrize("block", [128, [0, 128], [128], "128", [128, 128.0]], ids=str)
def test_a_block_that_is_none_is_taken_for_the_usual_one(zoo: Zoo, block: Any) -> None:
    tensors = {"x.weight": fp8_of(300, 517), "x.weight_scale_inv": scales(3, 5)}
    settings = {**DEEPSEEK, "weight_block_size": block}
    found = source.find(str(zoo.save("m", tensors, config=config(settings))))
    assert found.scales["x.weight"].block == (128, 128)


def test_a_nan_is_told(zoo: Zoo) -> None:
    weight = fp8_of(4, 4)
    weight.view(torch.uint8)[1, 1] = 0x7F
    zoo.save("m", {"x.weight": weight, "x.weight_scale": torch.ones(1)}, config=config(COMPRESSED))
    with pytest.raises(MowmergeError, match="'x.weight' holds NaN or Inf"):
        read(zoo, "m")


def test_what_counts_as_fp8() -> None:
    assert fp8.understood(DEEPSEEK)
    assert fp8.understood(COMPRESSED)
    assert fp8.understood({"quant_method": "fbgemm_fp8"})
    assert not fp8.understood({"quant_method": "compressed-tensors", "config_groups": {}})
    assert not fp8.understood({"quant_method": "gptq"})


def ulp(value: Tensor) -> Tensor:
    """Half the distance between e4m3 numbers at this size, at least that of subnormal ones."""
    return torch.exp2(value.abs().clamp_min(2.0**-6).log2().floor() - 4)


def test_fp8_is_written_in_blocks(zoo: Zoo) -> None:
    """DeepSeek's layout; each element within half a step of its block's scale."""
    names = {"x.q_proj.weight": (300, 517), "x.up_proj.weight": (64, 40), "lm_head.weight": (8, 8)}
    draws = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=draws).bfloat16() for n, s in names.items()}
    tensors["x.norm.weight"] = torch.ones(8).bfloat16()
    tensors["x.up_proj.weight"].zero_()
    zoo.save("m", tensors, config={"model_type": "llama", "torch_dtype": "bfloat16"})
    recipe = {"models": {"m": "./m"}, "method": "passthrough", "output": {"dtype": "fp8"}}
    got, report = zoo.merge(recipe, "out")
    assert set(got) == {*tensors, "x.q_proj.weight_scale_inv", "x.up_proj.weight_scale_inv"}
    weight, scale = got["x.q_proj.weight"], got["x.q_proj.weight_scale_inv"]
    assert (weight.dtype, scale.dtype, scale.shape) == (E4M3, torch.float32, (3, 5))
    want = tensors["x.q_proj.weight"].double()
    for i in range(3):
        for j in range(5):
            part = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            assert scale[i, j] == pytest.approx(float(want[part].abs().max()) / 448, rel=1e-6)
            exact = want[part] / scale[i, j].double()
            off = (weight[part].double() - exact).abs()
            assert (off <= ulp(exact) * (1 + 1e-5)).all()
    assert got["x.up_proj.weight_scale_inv"].tolist() == [[1.0]]
    settings = json.loads((zoo.folder / "out" / "config.json").read_text())
    assert settings["quantization_config"] == {**DEEPSEEK, "modules_to_not_convert": ["lm_head"]}
    assert settings["torch_dtype"] == "bfloat16"
    assert report["written_bytes"] == (zoo.folder / "out" / "model.safetensors").stat().st_size
    again = zoo.merge({"models": {"m": "./out"}, "method": "passthrough"}, "again")[0]
    assert torch.equal(
        again["x.q_proj.weight"], expanded(weight, scale, (128, 128)).float().bfloat16()
    )


@pytest.mark.parametrize("scale", [(1,), (300, 1), (3, 5), (3, 2, 2), (3, 200, 1)], ids=str)
def test_fp8_goes_back_into_the_layout_it_came_in(zoo: Zoo, scale: tuple[int, ...]) -> None:
    """And whatever blocks it was merged in, its bytes are the same."""
    weight = fp8_of(3, 200, 140) if len(scale) == 3 else fp8_of(300, 517)
    settings = DEEPSEEK if scale in ((3, 5), (3, 2, 2)) else COMPRESSED
    suffix = "_scale_inv" if settings is DEEPSEEK else "_scale"
    tensors = {"x.q_proj.weight": weight, f"x.q_proj.weight{suffix}": scales(*scale).bfloat16()}
    zoo.save("m", tensors, config=config(settings))
    recipe = {"models": {"m": "./m"}, "method": "passthrough", "output": {"dtype": "fp8"}}
    found = []
    for block in (65_536, 4 * 65_536):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planner, "BLOCK", block)
            found.append(zoo.merge(recipe, "out", force=True)[0])
    one, two = found
    assert {n: (v.dtype, v.shape) for n, v in one.items()} == {
        n: (v.dtype, v.shape) for n, v in tensors.items()
    }
    assert all(torch.equal(v.view(torch.uint8), two[n].view(torch.uint8)) for n, v in one.items())
    written = json.loads((zoo.folder / "out" / "config.json").read_text())
    assert written["quantization_config"] == settings
    before, after = read(zoo, "m", force=True), None
    zoo.merge({"models": {"m": "./m"}, "method": "passthrough"}, "dense", force=True)
    zoo.merge(recipe, "packed", force=True)
    after = zoo.merge({"models": {"m": "./packed"}, "method": "passthrough"}, "back")[0]
    value, back = before["x.q_proj.weight"].float(), after["x.q_proj.weight"].float()
    assert float((back - value).norm() / value.norm()) < 0.03


def test_fixed_activation_scales_are_not_written_again(zoo: Zoo) -> None:
    settings = {**DEEPSEEK, "activation_scheme": "static"}
    tensors = {"x.q_proj.weight": fp8_of(4, 4), "x.q_proj.weight_scale_inv": scales(1, 1)}
    zoo.save("m", tensors, config=config(settings))
    recipe = {"models": {"m": "./m"}, "method": "passthrough", "output": {"dtype": "fp8"}}
    with pytest.raises(MowmergeError, match="activations have fixed scales"):
        zoo.merge(recipe, "out")


def test_the_plan_says_what_is_written(zoo: Zoo) -> None:
    from mowmerge import api

    tensors = {"x.q_proj.weight": fp8_of(256, 256), "x.q_proj.weight_scale_inv": scales(2, 2)}
    zoo.save("m", tensors, config=config(DEEPSEEK))
    plan = api.plan(zoo.recipe({"models": {"m": "./m"}, "method": "passthrough"}))
    (job,) = plan.jobs
    assert (job.output.dtype, plan.data_bytes) == ("BF16", 2 * 256 * 256)
    assert Path(plan.sources["m"].folder).name == "m"  # type: ignore[union-attr]
