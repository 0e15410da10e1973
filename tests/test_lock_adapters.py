"""The lock beside an adapter: run again to the same bytes, compared by products elsewhere."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import adapt, save
from safetensors.torch import load_file, save_file
from zoo import Zoo

from mowmerge import api
from mowmerge.checkpoint import lowrank
from mowmerge.checkpoint.peft import WEIGHTS
from mowmerge.errors import CheckpointError
from mowmerge.recipe.text import read


@pytest.fixture
def family(zoo: Zoo) -> Zoo:
    base = save(zoo.folder / "base", "llama", torch.bfloat16)
    for i, name in enumerate("ab"):
        adapt(base, zoo.folder / name, seed=i, r=3 - i, target_modules=["q_proj", "down_proj"])
    return zoo


def recipe(zoo: Zoo, method: str = "linear", **output: Any) -> Path:
    models = {n: {"source": "base", "adapter": f"./{n}"} for n in "ab"}
    return zoo.recipe(
        {"base": "./base", "models": models, "method": method,
         "output": {"format": "adapter", **output}}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "output"),
    [("linear", {}), ("linear", {"rank": 2}), ("ties", {}), ("ties", {"energy": 0.5})],
)
def test_a_lock_is_run_again_from_anywhere_to_the_same_bytes(
    family: Zoo, method: str, output: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = api.merge(recipe(family, method, **output), family.folder / "out").path
    with chdir(tmp_path_factory.mktemp("elsewhere")):
        again = api.merge(out / "recipe.lock.yaml", family.folder / "again", locked=True)
    assert again.report["replay"]["outcome"] == "same bytes"
    assert again.report["replay"]["drift"] == []
    for name in (WEIGHTS, "adapter_config.json", "recipe.lock.yaml"):
        assert (out / name).read_bytes() == (again.path / name).read_bytes()
    assert api.verify(again.path).problems == ()


def test_what_stands_in_it(family: Zoo) -> None:
    out = api.merge(recipe(family, rank=2), family.folder / "out").path
    text = (out / "recipe.lock.yaml").read_text()
    assert str(family.folder) not in text
    data = read(text, "lock").data
    assert data["output"]["format"] == "adapter"
    assert data["output"]["rank"] == 2
    assert data["models"]["a"] == {
        "source": "base", "adapter": [{"source": "./a", "weight": 1.0}],
    }  # fmt: skip
    assert set(data["lock"]["inputs"]["a-adapter"]) == {WEIGHTS, "adapter_config.json"}
    (name, digest), *others = data["lock"]["outputs"].items()
    assert (name, others) == (WEIGHTS, [])
    sums = (out / "SHA256SUMS").read_text()
    assert f"{digest['sha256']}  {WEIGHTS}\n" in sums
    assert "recipe.lock.yaml\n" in sums
    ran = family.here("verify", "out", "--json")
    assert ran.rc == 0, ran.out
    assert json.loads(ran.out)["ok"]


def test_locked_fails_where_an_adapter_is_another(family: Zoo) -> None:
    out = api.merge(recipe(family), family.folder / "out").path
    file = family.folder / "a" / WEIGHTS
    held = {name: value * 2 for name, value in load_file(file).items()}
    save_file(held, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="'a-adapter': adapter_model.safetensors is not the"):
        api.merge(out / "recipe.lock.yaml", family.folder / "again", locked=True)
    assert not (family.folder / "again").exists()
    told = api.merge(out / "recipe.lock.yaml", family.folder / "again").report
    assert told["replay"]["outcome"] == "beyond tolerance"
    assert told["replay"]["drift"] == told["warnings"]


def test_an_adapter_that_changes_meanwhile_is_an_error(
    family: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mowmerge import lora

    whole = lora.write

    def changing(*args: Any) -> Any:
        file = family.folder / "b" / "adapter_config.json"
        file.write_text(file.read_text() + "\n")
        return whole(*args)

    monkeypatch.setattr(lora, "write", changing)
    with pytest.raises(CheckpointError, match="was changed while the merge was running"):
        api.merge(recipe(family), family.folder / "out")
    assert not (family.folder / "out").exists()


@pytest.mark.parametrize(("factor", "says"), [(1.0, "within"), (1.01, "beyond")])
def test_elsewhere_it_is_products_that_are_compared(family: Zoo, factor: float, says: str) -> None:
    """Another build may turn B and A by signs: their product is what it was."""
    out = api.merge(recipe(family, rank=2), family.folder / "out", hashes=False).path
    held = load_file(out / WEIGHTS)
    for name, value in held.items():
        held[name] = -value * (factor if "lora_A" in name and "layers.1" in name else 1)
    save_file(held, out / WEIGHTS, {"format": "pt"})
    lock = out / "recipe.lock.yaml"
    lock.write_text(lock.read_text().replace(f"torch: {torch.__version__}", "torch: 2.0.0"))
    told = api.merge(lock, family.folder / "again", hashes=False).report["replay"]
    assert not told["same_build"]
    assert told["outcome"] == f"{says} tolerance"
    if factor > 1:
        assert told["distance"] == pytest.approx(1 - 1 / factor, rel=1e-4)
        assert "layers.1" in told["tensor"]


def test_the_distance_of_products_is_that_of_the_matrices() -> None:
    draws = torch.Generator().manual_seed(3)
    (b, c), (a, d) = (
        [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes]
        for shapes in (((7, 3), (7, 2)), ((3, 5), (2, 5)))
    )
    want = (b @ a - c @ d).norm() / (c @ d).norm()
    assert lowrank.distance([b, a], [c, d]) == pytest.approx(float(want), rel=1e-12)
    assert lowrank.distance([b, a], [-b, -a]) <= 1e-7
    assert lowrank.distance([b, a], [0 * c, d]) == float("inf")
