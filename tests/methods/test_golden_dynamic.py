"""The golden cases of dynamic methods, through the engine: what their checkpoints hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made import Made, made
from safetensors.torch import load_file
from torch import Tensor

from mowmerge import api
from mowmerge.dynamic import codecs

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {c["id"]: c for c in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}
Content = dict[str, Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe(folder: Path, case: str, content: Content) -> Path:
    """A recipe over the case's inputs: the base, where there is one, and the experts."""
    experts = {Path(i).name: str(GOLDEN / i) for i in CASES[case]["inputs"]}
    base = experts.pop("base", None)
    whole = {"models": experts, **({"base": base} if base else {}), **content}
    (folder / "recipe.yaml").write_text(json.dumps(whole))
    return folder / "recipe.yaml"


def merged(folder: Path, case: str, content: Content) -> Made:
    return made(api.merge(recipe(folder, case, content), folder / "out", hashes=False).path)


def want(case: str, file: str = "expected") -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases" / case / f"{file}.safetensors")


def told(case: str) -> Any:
    return json.loads((GOLDEN / "cases" / case / "extra.json").read_text())


def assert_close(case: str, got: Tensor, wanted: Tensor) -> None:
    tolerance = CASES[case]["tolerance"]
    off = (got.double() - wanted.double()).abs()
    wrong = off > tolerance["atol"] + tolerance["rtol"] * wanted.double().abs()
    assert got.shape == wanted.shape
    assert int(wrong.sum()) <= tolerance["max_mismatch_fraction"] * wrong.numel()


def assert_masks(found: Made, case: str, part: str) -> None:
    """Bits, packed by rows here and flat there: the same where rows fill their bytes."""
    for key, packed in want(case, "masks").items():
        expert, name = key.split("/")
        code = found.codes[name]
        assert code.matrix[1] % 8 == 0
        ours = found.parts(code)[part][found.manifest.experts.index(expert)]
        assert torch.equal(ours.flatten(), packed), key


@pytest.mark.parametrize(
    ("case", "rescale"), [("emr_global", "global"), ("emr_per_tensor", "tensor_mean")]
)
def test_emr(tmp_path: Path, case: str, rescale: str) -> None:
    found = merged(tmp_path, case, {"method": "emr", "parameters": {"rescale": rescale}})
    for key, value in want(case).items():
        kind, *rest = key.split("/")
        if kind == "unified":
            code = found.codes[rest[0]]
            assert_close(case, found.parts(code)["unified"], value)
        else:
            k = found.manifest.experts.index(rest[0])
            assert_close(case, found.expert(rest[1], k), value)
    assert_masks(found, case, "mask")
    factors = told(case)["rescalers"]
    for code in found.codes.values():
        scales = dict(zip(found.manifest.experts, found.parts(code)["scale"].tolist(), strict=True))
        assert scales == pytest.approx(factors, rel=1e-6)


def test_tall_mask(tmp_path: Path) -> None:
    case = "tall_l04"
    found = merged(tmp_path, case, {"method": "tall_mask"})
    for key, value in want(case).items():
        expert, name = key.split("/")
        assert_close(case, found.expert(name, found.manifest.experts.index(expert)), value)
    assert_masks(found, case, "mask")
    density = dict.fromkeys(found.manifest.experts, 0.0)
    for code in found.codes.values():
        masks = codecs.unpack(found.parts(code)["mask"], code.matrix[1])
        for expert, mask in zip(density, masks, strict=True):
            density[expert] += int(mask.sum())
    total = sum(found.tensors[name].numel() for name in found.codes)
    share = {expert: count / total for expert, count in density.items()}
    assert share == pytest.approx(told(case)["mask_density"], rel=1e-9)


@pytest.mark.parametrize(
    ("case", "scale", "parameters"),
    [("twin_svd90", 0.3, {}), ("twin_mag80", 0.4, {"keep": "magnitude", "density": 1 - 0.8})],
)
def test_twin_merging(tmp_path: Path, case: str, scale: float, parameters: Content) -> None:
    rest = {"method": "task_arithmetic", "parameters": {"scale": scale}}
    content = {"method": "twin_merging", "parameters": parameters, "rest": rest}
    found = merged(tmp_path, case, content)
    for key, value in want(case).items():
        kind, *place = key.split("/")
        if kind == "shared":
            assert_close(case, found.tensors[place[0]], value)
        else:
            k = found.manifest.experts.index(place[0])
            assert_close(case, found.slots(place[1])[k], value)


def test_task_singular_vectors_are_twin_merging_on_the_base(tmp_path: Path) -> None:
    case = "tsvc_quarter"
    rest = {"method": "task_arithmetic", "parameters": {"scale": 0.0}}
    content = {"method": "twin_merging", "parameters": {"density": 0.25}, "rest": rest}
    found = merged(tmp_path, case, content)
    for key, value in want(case).items():
        expert, name = key.split("/")
        assert_close(case, found.expert(name, found.manifest.experts.index(expert)), value)


@pytest.mark.parametrize("method", ["one_bit", "bitdelta"])
def test_one_bit(tmp_path: Path, method: str) -> None:
    case = "one_bit"
    found = merged(tmp_path, case, {"method": method})
    assert_masks(found, case, "sign")
    for key, value in want(case).items():
        kind, *place = key.split("/")
        if kind == "full":
            k = found.manifest.experts.index(place[0])
            assert_close(case, found.expert(place[1], k), value)
        elif kind == "merged":
            total = found.tensors[place[0]].double() + 0.4 * sum(found.slots(place[0]))
            assert_close(case, total, value)
    for key, scale in told(case)["coeff"].items():
        if key.startswith("full/"):
            _, expert, name = key.split("/")
            ours = found.parts(found.codes[name])["scale"][found.manifest.experts.index(expert)]
            assert float(ours) == pytest.approx(scale, rel=1e-5)


def test_one_bit_on_the_released_codes_slices() -> None:
    from mowmerge.dynamic.format import Code
    from mowmerge.methods.dynamic.bitdelta import bitdelta

    case, n = "one_bit", 0
    for key, value in want(case).items():
        kind, *place = key.split("/")
        if kind != "official32":
            continue
        base, expert = (
            load_file(GOLDEN / "models" / m / "model.safetensors")[place[1]][:, :32]
            for m in ("base", place[0])
        )
        code = Code("w", tuple(base.shape), "one_bit", 1, "0")
        parts = bitdelta((expert - base)[None], base, code)
        assert_close(case, base + codecs.slot(code, parts, 0, base), value)
        n += 1
    assert n == 12


@pytest.mark.parametrize(
    ("case", "blocks"),
    [("mow_select_m3", 3), ("mow_select_m5", 5), ("mow_select_m11_fp32_flip", 11)],
)
def test_mow_selects(tmp_path: Path, case: str, blocks: int) -> None:
    content = {"method": "mow", "parameters": {"blocks": blocks}, "rest": {"method": "linear"}}
    plan = api.survey(recipe(tmp_path, case, content))
    assert plan.surveyed is not None
    for role, key in (("attention", "attn"), ("mlp", "mlp")):
        wanted = told(case)[key]
        table = plan.surveyed["dissimilarity"][role]
        ours = [table[f"model.layers.{i}"] for i in range(12)]
        tolerance = CASES[case]["tolerance"]["one_minus_similarity_rtol"]
        assert ours == pytest.approx(wanted["one_minus_similarity_fp64"], rel=tolerance)
        chosen = [int(block.rpartition(".")[2]) for block in plan.surveyed["dynamic"][role]]
        assert chosen == wanted["order_fp64"][:blocks]
        assert sorted(chosen) == wanted["selected_fp64"]
        part = "self_attn" if role == "attention" else "mlp"
        coded = {
            job.output.name for job in plan.jobs if job.code and f".{part}." in job.output.name
        }
        assert {int(name.split(".")[2]) for name in coded} == set(chosen)


def test_mow_mixes(tmp_path: Path) -> None:
    case = "mow_merge_gate"
    content = {
        "method": "mow",
        "parameters": {"blocks": 2, "norms": "none", "embeddings": "all"},
        "rest": {"method": "linear"},
    }
    found, gates = merged(tmp_path, case, content), CASES[case]["parameters"]["gate"]
    assert sorted(found.codes) == told(case)["dynamic"]
    for key, value in want(case).items():
        row, _, name = key.partition("/")
        if row == "static":
            if name not in found.codes:
                assert_close(case, found.tensors[name], value)
            continue
        code = found.codes[name]
        given = torch.tensor(gates).mean(0) if row == "batchmean" else torch.tensor(gates[int(row)])
        mixed = codecs.mixed(code, found.parts(code), found.tensors[name], given[None])
        assert_close(case, mixed[0], value)


def test_what_these_cases_are() -> None:
    mine = [c for c in CASES.values() if c["method"] in {
        "emr", "tall_masks", "twin_compress", "tsv_c", "one_bit", "mow_selection", "mow_merge"
    }]  # fmt: skip
    assert len(mine) == 11
