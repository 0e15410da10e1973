"""Methods on matrices, from recipe to bytes: which tensors they get, adapters, what it costs."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor
from zoo import Shapes, Zoo, raw

from mowmerge import algebra, api, planner, reduction
from mowmerge.matrices import Read
from mowmerge.methods import registry
from mowmerge.methods.ops import spectral
from mowmerge.methods.static.tsv_m import tsv_m
from mowmerge.plan import RUN, Plan
from mowmerge.planner import Options
from mowmerge.recipe import parse

TABLES = {"model.embed_tokens.weight", "lm_head.weight"}


LARGE: Shapes = {
    "model.embed_tokens.weight": (700, 257),
    "model.layers.0.mlp.up_proj.weight": (90, 800),
    "model.layers.0.self_attn.q_proj.bias": (2 * RUN + 3,),
    "model.layers.0.conv.weight": (4, 5, 2, 2),
    "model.layers.1.mlp.up_proj.weight": (3 * RUN, 2),
    "model.layers.1.scalar": (),
    "model.layers.1.empty": (0, 4),
}
METHODS = [
    name
    for name in registry.names()
    if (spec := registry.get(name)).decompositions and not spec.needs_factors(spec.complete({}))
]


def planned(zoo: Zoo, **content: Any) -> Plan:
    return planner.build(parse.load(zoo.recipe(content)), Options(workers=1))


def test_every_method_on_matrices_says_which_and_at_what_cost(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    assert {"tsv_m", "iso_c", "iso_cts", "star"} <= set(METHODS)
    for name in METHODS:
        jobs = planned(zoo, method=name).jobs
        whole = {job.output.name for job in jobs if job.matrix}
        square = {job.output.name for job in jobs if len(job.output.shape) == 2}
        assert whole == square - TABLES, name
        spec = registry.get(name)
        scope = spec.scope(spec.complete({})) if spec.reduce else "element"
        assert {job.scope for job in jobs if not job.matrix} == {scope}, name
        jobs = planned(zoo, method=name, parameters={"vocabulary": True}).jobs
        assert {job.output.name for job in jobs if job.matrix} == square


def test_what_decomposes_says_so_and_spares_the_vocabulary() -> None:
    """A static method that takes singular vectors declares it, and leaves tables out by default."""
    for name in registry.names():
        spec = registry.get(name)
        if spec.family != "static" or spec.origin != "mowmerge":
            continue
        source = inspect.getsource(sys.modules[spec.function.__module__])
        if re.search(r"svd|linalg\.(?:eigh|qr)|ops\.spectral", source):
            assert spec.decompositions is not None, name
            spared = not spec.parameters["vocabulary"].default
            assert spared or spec.needs_factors(spec.complete({})), name


def test_vocabulary_tables_have_the_mean_and_matrices_the_method(zoo: Zoo) -> None:
    family = zoo.family("llama", 2)
    got, _ = zoo.merge({"method": "tsv_m", "parameters": {"scale": 0.5}})
    base = family["base"]
    for name, value in base.items():
        moved = torch.stack([family[m][name] - value for m in "ab"])
        whole = value.dim() == 2 and name not in TABLES
        want = tsv_m(moved, scale=0.5) if whole else moved.mean(0) / 2
        assert torch.allclose(got[name], value + want, atol=1e-6), name
    rules = [{"match": {"role": "head"}, "parameters": {"vocabulary": True}}]
    with_head, _ = zoo.merge({"method": "tsv_m", "parameters": {"scale": 0.5}, "rules": rules}, "h")
    assert not torch.allclose(with_head["lm_head.weight"], got["lm_head.weight"], atol=1e-4)
    assert torch.equal(with_head["model.embed_tokens.weight"], got["model.embed_tokens.weight"])


def test_the_plan_says_what_is_decomposed(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.family("llama", 2)
    found = planned(zoo, method="iso_c").algebra
    assert found is not None
    # of two layers: q, o 16x16, k, v 8x16, gate, up 32x16, down 16x32
    costs = 2 * 26 * 16**3 + 2 * (6 * 16 * 64 + 20 * 512) + 3 * (6 * 32 * 256 + 20 * 4096)
    assert (found.matrices, found.decompositions, found.flops) == (14, 14, 2 * costs)
    assert sorted(found.largest) == [16, 32]
    shown = zoo.here("merge", zoo.recipe({"method": "iso_c"}), "--dry-run")
    assert "14 singular value decompositions of 14 matrices, the largest 16x32" in shown.out
    told = json.loads(zoo.here("merge", "recipe.yaml", "--dry-run", "--json").out)["algebra"]
    assert told["flops"] == 2 * costs
    assert planned(zoo, method="ties").algebra is planned(zoo, method="wudi").algebra is None
    second = planned(zoo, method="wudi", parameters={"interference": "leading"}).algebra
    assert second is not None and second.decompositions == 14 * 4
    kept = planned(zoo, method="tsv_m", parameters={"density": 0.25}).algebra
    assert kept is not None and sorted(kept.largest) == [16, 32]
    even = planned(zoo, method="tsv_m").algebra  # a half of each beside each other, not a quarter
    assert even is not None and even.flops > kept.flops
    monkeypatch.setattr(algebra, "HOURS", 10)
    assert "hours on a processor" in planned(zoo, method="iso_c").warnings[-1]


def test_peak_memory_is_of_the_largest_matrix_and_tables_stream(zoo: Zoo) -> None:
    shapes = {"model.embed_tokens.weight": (4000, 500), "model.layers.0.mlp.up_proj.weight": (9, 7)}
    zoo.family(shapes, 2)
    plain = planned(zoo, method="task_arithmetic").peak_bytes
    assert planned(zoo, method="iso_cts").peak_bytes < plain + 2 * 2**20
    whole = planned(zoo, method="iso_cts", parameters={"vocabulary": True})
    assert whole.peak_bytes > plain + 4 * 3 * 4000 * 500


@pytest.mark.parametrize("method", METHODS)
def test_bytes_depend_on_nothing_but_plan_and_inputs(
    zoo: Zoo, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "SPAN", 2 * RUN)
    zoo.family(LARGE, 3)
    wanted = raw(zoo.merge({"method": method}, "one", workers=1, stats=False)[0])
    for workers, block, shard_size in ((2, RUN, "600kB"), (3, 4 * RUN, "5GB")):
        monkeypatch.setattr(planner, "BLOCK", block)
        content = {"method": method, "output": {"shard_size": shard_size}}
        found, _ = zoo.merge(content, f"w{workers}", workers=workers, stats=workers > 2)
        assert raw(found) == wanted


class Counted:
    """Reads matrices, and counts those that somebody holds."""

    def __init__(self, n: int, shape: tuple[int, int]) -> None:
        self.held = self.most = self.reads = 0
        draws = torch.Generator().manual_seed(0)
        self._values = torch.randn(n, *shape, generator=draws)
        self.matrices = Read((n, *shape), torch.float32, self.read)

    def read(self, i: int) -> Tensor:
        self.held, self.reads = self.held + 1, self.reads + 1
        self.most = max(self.most, self.held)
        found = self._values[i].clone()
        finalize(found, self.left)
        return found

    def left(self) -> None:
        self.held -= 1


HOLDS = {"iso_c": 2, "doge": 6}  # the first two for their sum, all for every step; else one more
ALSO: dict[str, dict[str, Any]] = {
    "knots vertical": {"direction": "vertical", "density": 0.4, "trim": "tensor"},
    "drm vertical": {"direction": "vertical"},
    "wudi closed": {"solver": "closed"},
    "wudi leading": {"interference": "leading", "steps": 2},
    "doge": {"steps": 2},
    "wudi": {"steps": 2},
}


@pytest.mark.parametrize("case", sorted({*METHODS, *ALSO} - {"rmm"}))  # a code is made otherwise
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (80, 5)])
def test_a_method_holds_few_matrices_and_makes_of_them_what_it_makes_of_a_stack(
    case: str, shape: tuple[int, int]
) -> None:
    spec, given = registry.get(case.partition(" ")[0]), ALSO.get(case, {})
    counted = Counted(6, shape)
    found = spec.function(counted.matrices, **given)
    assert counted.most <= HOLDS.get(spec.name, 2)
    assert counted.reads <= 3 * 6 + 1
    wanted = spec.function(torch.stack(list(counted.matrices)), **given)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_matrices_are_read_when_they_are_asked_for() -> None:
    counted = Counted(3, (4, 5))
    each = counted.matrices
    assert (len(each), each.shape, each.dim(), each.numel()) == (3, (3, 4, 5), 3, 60)
    assert each.mT.shape == (3, 5, 4) and each.double().dtype == torch.float64
    assert counted.reads == 0
    first = each[0]
    assert torch.equal(each.mT[0], first.T) and torch.equal(each.double()[0], first.double())
    assert torch.equal(each[-1], each[2]) and not torch.equal(each[-1], first)
    assert [torch.equal(one, first) for one in each] == [True, False, False]
    with pytest.raises(IndexError):
        each[3]


def test_bytes_of_a_nested_recipe(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    plain, _ = zoo.merge({"method": "iso_c"})
    inner = {"base": "./base", "models": {"a": "./a", "b": "./b"}, "method": "iso_c"}
    nested, _ = zoo.merge({"models": {"x": {"source": inner}}, "method": "passthrough"}, "nested")
    assert all(torch.equal(nested[name], value) for name, value in plain.items())


def test_adapters_are_decomposed_as_products(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    from peft_models import adapt, save

    base = save(tmp_path / "base", "llama")
    for i, name in enumerate("ab"):
        adapt(base, tmp_path / f"lora-{name}", seed=i, target_modules=["q_proj", "up_proj"])
    models: dict[str, Any] = {n: {"source": "base", "adapter": f"./lora-{n}"} for n in "ab"}
    content = {"base": "./base", "models": models, "method": "tsv_m"}
    dense, svd = [], spectral.svd
    monkeypatch.setattr(
        spectral, "svd", lambda matrix: (dense.append(matrix.shape), svd(matrix))[1]
    )
    got, _ = zoo.merge(content, workers=1)
    assert not dense
    for name in "ab":
        zoo.merge({"models": {name: {"source": "./base", "adapter": f"./lora-{name}"}},
                   "method": "passthrough"}, f"dense-{name}")  # fmt: skip
    models = {name: f"./dense-{name}" for name in "ab"}
    want, _ = zoo.merge({**content, "models": models}, "dense", workers=1)
    assert len(dense) == 2 * 4  # what no adapter is on is the base's, without a decomposition
    for name, value in want.items():
        assert torch.allclose(got[name], value, atol=1e-4), name


@pytest.mark.parametrize("method", ["tsv_m", "star", "knots"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merge_of_adapters_stays_one(zoo: Zoo, tmp_path: Path, kind: str, method: str) -> None:
    pytest.importorskip("peft")
    from peft_models import adapt, merged, save

    base = save(tmp_path / "base", kind)
    wanted = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}[kind]
    for i, name in enumerate("ab"):  # of which one is on fewer modules than the other
        settings = {"target_modules": wanted[: 2 - i], "fan_in_fan_out": kind == "gpt2"}
        adapt(base, tmp_path / f"lora-{name}", seed=i, r=2 + i, **settings)
    models = {n: {"source": "base", "adapter": f"./lora-{n}"} for n in "ab"}
    content: dict[str, Any] = {"base": "./base", "models": models, "method": method}
    if method == "knots":  # one threshold over all matrices: statistics from the products too
        content["parameters"] = {"density": 0.6}
    dense, _ = zoo.merge({**content, "output": {"dtype": "float32"}}, "dense")
    content["output"] = {"format": "adapter"}
    out = api.merge(zoo.recipe(content), tmp_path / "adapter", options=Options(workers=2))
    lines = out.report["tensors"]
    assert {line["how"] for line in lines if line.get("rank")} == {"concatenated"}
    assert all(line["rank"] <= 5 for line in lines if line.get("rank"))
    loaded = merged(base, [out.path], tmp_path / "loaded")
    for name, value in loaded.items():
        assert torch.allclose(value, dense[name], atol=2e-5), name


def test_adapters_of_other_layers_than_the_bases_are_dense(zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft_models import adapt, save

    base = save(tmp_path / "base", "llama")
    for i, name in enumerate("ab"):
        adapt(base, tmp_path / f"lora-{name}", seed=i)
        zoo.merge({"models": {name: {"source": "./base", "adapter": f"./lora-{name}"}},
                   "method": "passthrough"}, f"dense-{name}")  # fmt: skip
    content = {"base": "./base", "method": "tsv_m", "slices": [{"layers": {"a": 0, "b": 1}}]}
    thin = {n: {"source": "base", "adapter": f"./lora-{n}"} for n in "ab"}
    got, _ = zoo.merge({**content, "models": thin}, "thin")
    want, _ = zoo.merge({**content, "models": {n: f"./dense-{n}" for n in "ab"}}, "dense")
    assert all(torch.allclose(got[name], value, atol=1e-5) for name, value in want.items())
