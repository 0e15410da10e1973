"""Adapters as output: extract-lora and `output: {format: adapter}`, as peft loads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import adapt, held, merged, quiet, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo import Zoo

from mowmerge import api
from mowmerge.checkpoint import lowrank
from mowmerge.errors import MowmergeError

library = pytest.importorskip("peft")


def relative(got: Tensor, want: Tensor, base: Tensor) -> float:
    """|got - want| / |want - base|."""
    moved = (want.double() - base.double()).norm()
    return float((got.double() - want.double()).norm() / moved.clamp_min(1e-12))


def applied(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    """The base with the adapter that peft loads: every key is there, and none too many."""
    with quiet():
        config = library.PeftConfig.from_pretrained(adapter)
        model = library.PeftModel(held(base), config)
        found = model.load_adapter(adapter, adapter_name="default")
        assert not found.missing_keys
        assert not found.unexpected_keys
    return merged(base, [adapter], out)


def tuned(base: Path, out: Path, changed: dict[str, int | None], seed: int = 5) -> Path:
    """The model with some tensors moved: by a rank where one is given."""
    draws = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        for pattern, rank in changed.items():
            if not re.search(pattern, name):
                continue
            flat = value.flatten(1) if value.dim() in (2, 4) else value
            step = torch.randn(flat.shape, generator=draws)
            if rank is not None and value.dim() > 1:
                *stack, rows, columns = flat.shape
                left = torch.randn(*stack, rows, rank, generator=draws)
                step = left @ torch.randn(*stack, rank, columns, generator=draws)
            tensors[name] = value + 0.1 * step.view(value.shape).to(value.dtype)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((base / "config.json").read_text())
    return out


CASES: dict[str, tuple[str, dict[str, int | None]]] = {
    "matrices": ("llama", {"q_proj": 3, "down_proj": 2}),
    "norms": ("llama", {"q_proj": 1, "layers.1.input_layernorm": None, "model.norm": None}),
    "embeddings": ("llama", {"embed_tokens": 4, "lm_head": 3}),
    "conv1d and biases": ("gpt2", {"c_attn": 3, "c_fc.bias": None, "ln_1": None}),
    "names in memory": ("vit", {"query": 2, "patch_embeddings.projection": 2, "classifier": None}),
    "experts": ("gpt_oss", {"experts.gate_up_proj$": 3, "experts.down_proj$": 2, "q_proj.w": 2}),
    "some experts": ("gpt_oss", {"layers.0.mlp.experts.down_proj$": 2}),
    "experts with biases": ("gpt_oss", {"experts.gate_up_proj_bias": None, "q_proj.w": 1}),
    "only a norm": ("llama", {"model.norm": None}),
    "a module that holds an update": ("vit", {"cls_token": None, "projection": None, "query.w": 2}),
    "parameters": ("vit", {"query": 2, "cls_token": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_extracted(zoo: Zoo, case: str) -> None:
    """Of rank 4 it is exact: no update here is of a higher one."""
    kind, changed = CASES[case]
    base = save(zoo.folder / "base", kind)
    model = tuned(base, zoo.folder / "model", changed)
    result = api.extract_lora(model, base, zoo.folder / "out", rank=4)
    assert result.report["lost"] == []
    got = applied(base, result.path, zoo.folder / "theirs")
    want = load_file(model / "model.safetensors")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=name)
    ours, _ = zoo.merge(
        {"models": {"m": {"source": str(base), "adapter": str(result.path)}},
         "method": "passthrough"}, "ours"
    )  # fmt: skip
    for name, value in got.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)


def test_tied_embeddings_come_back_tied(zoo: Zoo) -> None:
    base = save(zoo.folder / "base", "llama", tie_word_embeddings=True)
    model = tuned(base, zoo.folder / "model", {"embed_tokens": 4, "q_proj": 2})
    result = api.extract_lora(model, base, zoo.folder / "out", rank=4)
    ours, _ = zoo.merge(
        {"models": {"m": {"source": str(base), "adapter": str(result.path)}},
         "method": "passthrough"}, "ours"
    )  # fmt: skip
    for name, value in load_file(model / "model.safetensors").items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
    got = applied(base, result.path, zoo.folder / "theirs")
    torch.testing.assert_close(
        got["model.embed_tokens.weight"], ours["model.embed_tokens.weight"], rtol=1e-5, atol=1e-5
    )


def test_energy_chooses_the_least_rank_that_keeps_it(zoo: Zoo) -> None:
    """Singular values 3, 2, 1: squares 9, 4, 1 of 14; half is kept by one, 0.9 by two."""
    base = zoo.save("base", {"x.q_proj.weight": torch.zeros(4, 6)})
    matrix = torch.zeros(4, 6)
    matrix[0, 1], matrix[1, 3], matrix[2, 0] = 3, 2, 1
    model = zoo.save("model", {"x.q_proj.weight": matrix})
    for energy, rank, kept in ((0.5, 1, 9 / 14), (0.9, 2, 13 / 14), (1.0, 3, 1.0)):
        out = zoo.folder / f"out{energy}"
        report = api.extract_lora(model, base, out, energy=energy).report
        (line,) = report["tensors"]
        assert line["rank"] == rank
        assert line["kept"] == pytest.approx(kept)
        assert line["error"] == pytest.approx((1 - kept) ** 0.5, abs=1e-3)
        assert report["kept_energy"] == pytest.approx(kept)
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, rank)


def test_a_randomised_decomposition_is_measured_not_guessed() -> None:
    draws = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(400, 400, generator=draws))[0] for _ in range(2))
    values = 0.9 ** torch.arange(400)
    delta = left @ torch.diag(values) @ right.T
    found = lowrank.factor(delta, 8, None)
    assert found.how == "randomised"
    error = float((delta - found.b @ found.a).norm() / delta.norm())
    best = float(values[8:].norm() / values.norm())
    assert found.error == pytest.approx(error, rel=1e-3)
    assert best <= error * (1 + 1e-6) <= best * 1.001
    again = lowrank.factor(delta, 8, None)
    assert torch.equal(found.b, again.b)
    exact = lowrank.factor(delta, 60, None)
    assert exact.how == "svd"


def test_what_cannot_go_in_is_told_by_its_rule(zoo: Zoo) -> None:
    base = {"x.q_proj.weight": torch.zeros(4, 4), "scale": torch.ones(2),
            "x.count": torch.tensor([1])}  # fmt: skip
    changed = {"x.q_proj.weight": torch.ones(4, 4), "scale": torch.zeros(2),
               "x.count": torch.tensor([2])}  # fmt: skip
    zoo.save("base", base)
    zoo.save("model", changed)
    ran = zoo.here("extract-lora", "model", "out", "--base", "base", "--rank", "2")
    assert ran.rc == 0, ran.err
    assert "1 low-rank updates of rank 1" in ran.out
    assert "lost: x.count, scale" in ran.out
    report = json.loads((zoo.folder / "out" / "report.json").read_text())
    rules = {line["name"]: line["rule"] for line in report["tensors"] if line["action"] == "lost"}
    assert rules["x.count"] == "not a float tensor"
    assert "modules_to_save cannot name" in rules["scale"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"x.q_proj.weight": torch.zeros(4, 4)}, "nothing differs from the base"),
        ({"x.q_proj.weight": torch.zeros(5, 4)}, r"is \[4, 4\] in the base, and in the model \[5"),
        ({"x.o_proj.weight": torch.zeros(4, 4)}, "in the model not there"),
        ({"x.q_proj.weight": torch.full((4, 4), torch.nan)}, "of the model holds NaN or Inf"),
    ],
)
def test_models_that_do_not_fit_leave_nothing(
    zoo: Zoo, model: dict[str, Tensor], words: str
) -> None:
    base = zoo.save("base", {"x.q_proj.weight": torch.zeros(4, 4)})
    other = zoo.save("model", model)
    with pytest.raises(MowmergeError, match=words):
        api.extract_lora(other, base, zoo.folder / "out")
    assert not (zoo.folder / "out").exists()


def test_a_base_that_is_not_finite_is_told_as_such(zoo: Zoo) -> None:
    base = zoo.save("base", {"x.q_proj.weight": torch.full((4, 4), torch.inf)})
    model = zoo.save("model", {"x.q_proj.weight": torch.zeros(4, 4)})
    with pytest.raises(MowmergeError, match="of the base .*base holds NaN or Inf"):
        api.extract_lora(model, base, zoo.folder / "out")


def test_bytes_do_not_depend_on_workers(zoo: Zoo) -> None:
    base = save(zoo.folder / "base", "llama")
    model = tuned(base, zoo.folder / "model", {"proj": None, "norm": None})
    files = []
    for workers in (1, 3):
        result = api.extract_lora(model, base, zoo.folder / f"out{workers}", workers=workers)
        files.append((result.path / "adapter_model.safetensors").read_bytes())
        assert "adapter_model.safetensors" in (result.path / "SHA256SUMS").read_text()
    assert files[0] == files[1]


@pytest.fixture
def family(zoo: Zoo) -> Zoo:
    """A bf16 base, and adapters a and b on it of ranks 3 and 2."""
    base = save(zoo.folder / "base", "llama", torch.bfloat16)
    for i, name in enumerate("ab"):
        adapt(base, zoo.folder / name, seed=i, r=3 - i, target_modules=["q_proj", "down_proj"])
    return zoo


def recipe(method: str, output: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    models = {n: {"source": "base", "adapter": f"./{n}"} for n in "ab"}
    return {"base": "./base", "models": models, "method": method,
            "output": output or {"format": "adapter"}, **more}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"scale": 0.7, "weight": {"a": 1.5, "b": -0.5}}),
        ("linear", {"weight": {"a": 3, "b": 1}}),
    ],
)
def test_sums_of_adapters_stay_exact(family: Zoo, method: str, parameters: dict[str, Any]) -> None:
    result = api.merge(family.recipe(recipe(method, parameters=parameters)), family.folder / "out")
    lines = result.report["tensors"]
    assert {line["how"] for line in lines} == {"concatenated"}
    assert {line["rank"] for line in lines} == {5}
    assert result.report["kept_energy"] == 1
    got = applied(family.folder / "base", result.path, family.folder / "theirs")
    dense, _ = family.merge(recipe(method, {"path": "dense"}, parameters=parameters), "dense")
    exact, _ = family.merge(recipe(method, {"dtype": "float32"}, parameters=parameters), "exact")
    for name, value in dense.items():
        assert (got[name].double() - exact[name].double()).abs().max() <= 2**-7 * exact[
            name
        ].abs().max()
        torch.testing.assert_close(got[name], value, rtol=2**-6, atol=2e-2)


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}


@pytest.mark.parametrize("output", [{}, {"rank": 3}])
def test_experts_in_a_stack_are_joined_one_by_one(zoo: Zoo, output: dict[str, Any]) -> None:
    """Of rank 5 where they are joined; cut, each expert's is the best of rank 3."""
    base = save(zoo.folder / "base", "gpt_oss")
    for i, name in enumerate("ab"):
        adapt(base, zoo.folder / name, seed=i, r=3 - i, **EXPERTS)
    asked = recipe("task_arithmetic", {"format": "adapter", **output}, parameters={"scale": 0.5})
    planned = api.outline(api.check(zoo.recipe(asked))).outline
    result = api.merge(zoo.recipe(asked), zoo.folder / "out")
    assert planned.exact == (not output)
    assert planned.nbytes >= (result.path / "adapter_model.safetensors").stat().st_size
    if planned.exact:
        assert planned.nbytes == (result.path / "adapter_model.safetensors").stat().st_size
    lines = {line["name"]: line for line in result.report["tensors"]}
    stack = lines["model.layers.0.mlp.experts.gate_up_proj"]
    assert stack["rank"] == (3 if output else 5)
    assert lines["model.layers.0.mlp.experts.down_proj"]["how"] == "zero"
    got = applied(base, result.path, zoo.folder / "theirs")
    dense, _ = zoo.merge(
        recipe("task_arithmetic", {"path": "dense"}, parameters={"scale": 0.5}), "dense"
    )
    before = load_file(base / "model.safetensors")
    for name, value in dense.items():
        stated = lines[name]["error"] if name in lines else 0.0
        assert relative(got[name], value, before[name]) == pytest.approx(stated, abs=1e-4), name
    moved = (dense[stack["name"]] - before[stack["name"]]).double()
    left = torch.linalg.svdvals(moved)[:, stack["rank"] :].norm() / moved.norm()
    assert stack["error"] == pytest.approx(float(left), abs=1e-4)


def test_experts_that_are_joined_in_memory_are_refused(zoo: Zoo) -> None:
    base = save(zoo.folder / "base", "qwen2_moe")
    model = tuned(base, zoo.folder / "model", {"layers.0.mlp.experts.1.up_proj": 2})
    with pytest.raises(MowmergeError, match="experts.1.up_proj.* transformers joins it"):
        api.extract_lora(model, base, zoo.folder / "out")
    fine = tuned(base, zoo.folder / "fine", {"q_proj.w": 2})
    assert api.extract_lora(fine, base, zoo.folder / "out").report["lost"] == []


def test_a_joined_update_is_cut_with_a_stated_error(family: Zoo) -> None:
    exact = api.merge(family.recipe(recipe("task_arithmetic")), family.folder / "exact")
    cut = api.merge(
        family.recipe(recipe("task_arithmetic", {"format": "adapter", "rank": 2})),
        family.folder / "cut",
    )
    whole, less = (load_file(r.path / "adapter_model.safetensors") for r in (exact, cut))
    for line in cut.report["tensors"]:
        at = f"base_model.model.{line['module']}."
        full = whole[at + "lora_B.weight"] @ whole[at + "lora_A.weight"]
        part = less[at + "lora_B.weight"] @ less[at + "lora_A.weight"]
        assert line["rank"] == 2
        assert line["how"] == "concatenated, then cut"
        assert line["error"] == pytest.approx(float((full - part).norm() / full.norm()), rel=1e-3)
        best = torch.linalg.svdvals(full)[2:].norm() / full.norm()
        assert line["error"] == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_other_methods_are_decomposed(zoo: Zoo, method: str) -> None:
    """Of full rank the dense merge comes back; of less it is as far as the report says."""
    base = save(zoo.folder / "base", "llama")
    for i, name in enumerate("ab"):
        adapt(base, zoo.folder / name, seed=i, r=3 - i, target_modules=["q_proj", "down_proj"])
    more = {"parameters": {"density": 0.5}}
    dense, _ = zoo.merge(recipe(method, {"path": "dense"}, **more), "dense")
    before = load_file(base / "model.safetensors")
    for energy in (1.0, 0.8):
        asked = recipe(method, {"format": "adapter", "energy": energy}, **more)
        result = api.merge(zoo.recipe(asked), zoo.folder / "out", force=True)
        assert {line["how"] for line in result.report["tensors"]} == {"svd"}
        got = applied(base, result.path, zoo.folder / f"theirs{energy}")
        stated = {line["name"]: line["error"] for line in result.report["tensors"]}
        for name, value in dense.items():
            found = relative(got[name], value, before[name])
            assert found == pytest.approx(stated.get(name, 0), abs=1e-3), name
        assert result.report["kept_energy"] >= energy - 1e-6


def test_the_deltas_of_a_bf16_base_are_not_rounded(family: Zoo) -> None:
    """The merge that is decomposed is that of fp32 deltas: of rank 5 at most, but for rounding."""
    merged_adapter = api.merge(
        family.recipe(recipe("dare", {"format": "adapter", "energy": 0.9999},
                             parameters={"density": 1.0})),
        family.folder / "out",
    )  # fmt: skip
    assert {line["rank"] for line in merged_adapter.report["tensors"]} <= {3, 4, 5}


def test_saved_modules_and_magnitudes_go_along(zoo: Zoo) -> None:
    base = save(zoo.folder / "base", "llama")
    adapt(base, zoo.folder / "a", use_dora=True, modules_to_save=["model.norm"])
    adapt(base, zoo.folder / "b", seed=2)
    result = api.merge(
        zoo.recipe(recipe("task_arithmetic", {"format": "adapter", "energy": 1.0})),
        zoo.folder / "out",
    )
    did = {line["name"]: line for line in result.report["tensors"]}
    assert did["model.norm.weight"]["action"] == "modules_to_save"
    assert did["model.layers.0.self_attn.q_proj.weight"]["how"] == "svd"
    got = applied(base, result.path, zoo.folder / "theirs")
    dense, _ = zoo.merge(recipe("task_arithmetic", {"path": "dense"}), "dense")
    for name, value in dense.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": {"rank": 4}}, "output.rank is for output.format: adapter"),
        ({"base": None}, "an adapter needs a base"),
        ({"base": {"models": {"x": "./base"}, "method": "linear"}}, "this one is itself a recipe"),
        ({"slices": [{"layers": 0}]}, "slices are other layers than the base's"),
        ({"output": {"format": "adapter", "rank": 4, "energy": 0.5}}, "two ways to say one"),
        ({"heads": {"match": "lm_head*"}}, "heads cannot go into an adapter"),
        ({"output": {"format": "adapter", "dtype": "bfloat16"}}, "factors are float32"),
        ({"method": "emr"}, "'emr' is dynamic"),
    ],
)
def test_what_does_not_go_with_an_adapter(zoo: Zoo, change: dict[str, Any], words: str) -> None:
    with pytest.raises(MowmergeError, match=words):
        api.check(zoo.recipe({**recipe("linear"), **change}))
