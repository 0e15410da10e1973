"""recipe.lock.yaml: the run written down, run again from anywhere, compared with what it was."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import ROOT, Zoo

from mowmerge import api, lock
from mowmerge.checkpoint.writer import sha256
from mowmerge.errors import CheckpointError, RecipeError
from mowmerge.methods import registry
from mowmerge.recipe import parse
from mowmerge.recipe.complete import completed
from mowmerge.recipe.task_types import TYPES
from mowmerge.recipe.text import read
from tests import peft_models

INNER = {"method": "ties", "base": "./base", "models": {"a": "./a", "b": "./b"}}
RULES = [
    {"match": {"role": "mlp", "layers": "0..1"}, "parameters": {"weight": [0.5, 1]}},
    {"match": {"tensors": "*norm*"}, "method": "linear"},
    {"match": {"tensors": "lm_head*"}, "drop": True},
]
WAYS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "rules": {"method": "ties", "rules": RULES, "output": {"dtype": "bfloat16"}},
    "values": {"method": "dare", "parameters": {"density": {"a": 0.5, "b": 0.25}, "seed": 7}},
    "nested": {"method": "linear", "models": {"n": {"source": INNER}, "c": "./c"}},
    "heads": {"method": "linear", "heads": {"match": "lm_head*"}},
    "mow": {"method": "mow"},
    "scaled": {
        "method": "wemoe",
        "rules": [{"match": {"layers": 1}, "parameters": {"scale": 0.6}}],
    },
    "rest": {"method": "wemoe", "rest": {"method": "ties"}},
}
TIES = {"method": "ties"}


@pytest.fixture
def family(zoo: Zoo) -> Zoo:
    zoo.family("llama", 3)
    return zoo


def merged(zoo: Zoo, content: dict[str, Any], out: str = "out", **kwargs: Any) -> Path:
    return api.merge(zoo.recipe(content), zoo.folder / out, **kwargs).path


def same(one: Path, two: Path) -> bool:
    """Whether all but card, report and recipe is the same bytes, the lock too."""
    others = ("README.md", "report.json", "recipe.yaml", "SHA256SUMS")

    def files(out: Path) -> dict[str, bytes]:
        found = (p for p in out.rglob("*") if p.is_file() and p.name not in others)
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in found}

    return files(one) == files(two)


def test_nested_recipes_in_folders_of_their_own(family: Zoo) -> None:
    far = family.folder / "far/off"
    far.mkdir(parents=True)
    (far / "inner.yaml").write_text(json.dumps(
        {"method": "linear", "models": {"a": "../../a", "b": "../../b"}}
    ))  # fmt: skip
    out = merged(family, {"method": "linear", "models": {"n": "./far/off/inner.yaml", "c": "./c"}})
    inner = read((out / "recipe.lock.yaml").read_text(), "x").data["models"]["n"]["source"]
    assert inner["models"] == {"a": {"source": "./a"}, "b": {"source": "./b"}}
    again = api.merge(out / "recipe.lock.yaml", family.folder / "again", locked=True)
    assert again.report["replay"]["outcome"] == "same bytes"


@pytest.mark.parametrize("way", WAYS)
def test_a_lock_is_run_again_from_anywhere_to_the_same_bytes(
    family: Zoo, way: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = merged(family, WAYS[way])
    with chdir(tmp_path_factory.mktemp("elsewhere")):
        again = api.merge(out / "recipe.lock.yaml", family.folder / "again", locked=True)
    assert again.report["replay"]["outcome"] == "same bytes"
    assert again.report["replay"]["same_build"]
    assert again.report["replay"]["drift"] == []
    assert again.report["recipe"] == "recipe"
    assert same(out, again.path)
    third = api.merge(again.path / "recipe.lock.yaml", family.folder / "third", locked=True)
    assert same(out, third.path)


def test_what_stands_in_it(family: Zoo) -> None:
    out = merged(family, TIES, "deep/out")
    text = (out / "recipe.lock.yaml").read_text()
    data = read(text, "lock").data
    assert str(family.folder) not in text
    assert data["parameters"] == registry.get("ties").complete({})
    assert data["models"] == {name: {"source": f"./{name}"} for name in "abc"}
    assert data["output"] == {"format": "checkpoint", "shard_size": 5_000_000_000}
    held = data["lock"]
    assert held["folder"] == "../.."
    assert held["torch"] == torch.__version__
    assert (held["name"], held["device"]) == ("recipe", "cpu")
    for model in ("base", "a", "b", "c"):
        file = family.folder / model / "model.safetensors"
        wanted = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        read_of = held["inputs"][model]
        assert read_of["model.safetensors"] == wanted
        beside = {file.name for file in (family.folder / model).iterdir()} - {"README.md"}
        assert set(read_of) == (beside if model == "base" else {"model.safetensors"})
    weights = out / "model.safetensors"
    wanted = {"bytes": weights.stat().st_size, "sha256": sha256(weights)}
    assert held["outputs"] == {"model.safetensors": wanted}
    sums = (out / "SHA256SUMS").read_text()
    assert f"{sha256(out / 'recipe.lock.yaml')}  recipe.lock.yaml\n" in sums


def test_absolute_paths_are_made_relative_and_hold_where_the_tree_is_moved(
    family: Zoo, tmp_path_factory: pytest.TempPathFactory
) -> None:
    where = family.folder / "recipes"
    where.mkdir()
    models = {"a": str(family.folder / "a"), "b": str(family.folder / "b/model.safetensors")}
    (where / "r.yaml").write_text(json.dumps({"method": "linear", "models": models}))
    out = api.merge(where / "r.yaml", family.folder / "out").path
    data = read((out / "recipe.lock.yaml").read_text(), "lock").data
    assert data["models"]["a"]["source"] == "../a"
    assert data["models"]["b"]["source"] == "../b/model.safetensors"
    moved = tmp_path_factory.mktemp("new") / "tree"
    shutil.move(family.folder, moved)
    again = api.merge(moved / "out/recipe.lock.yaml", moved / "again", locked=True)
    assert again.report["replay"]["outcome"] == "same bytes"


def test_a_fitted_path_and_tasks_are_found_from_the_output(family: Zoo) -> None:
    where = family.folder / "recipes"
    (where / "data").mkdir(parents=True)
    task = {"expert": "a", "type": "text-classification",
            "data": {"path": "json", "data_files": str(where / "data")}}  # fmt: skip
    content = {"method": "linear", "models": {"a": "../a", "b": "../b"}, "tasks": {"t": task}}
    (where / "r.yaml").write_text(json.dumps(content))
    out = api.merge(where / "r.yaml", family.folder / "out").path
    recipe = api.tasks_of(out, None)
    found = recipe.tasks["t"].data["data_files"]
    assert found == "./data"
    assert Path(recipe.locate(found)).samefile(where / "data")
    assert Path(recipe.locate("../a")).samefile(family.folder / "a")


@pytest.mark.parametrize("kind", TYPES)
def test_a_task_of_every_type_may_stand_in_it(family: Zoo, kind: str) -> None:
    task: dict[str, Any] = {"expert": "a", "type": kind}
    if TYPES[kind].columns:
        task["data"] = {"path": "json", "data_files": "./data"}
    out = merged(family, {**WAYS["linear"], "tasks": {"t": task}})
    assert api.tasks_of(out, None).tasks == api.check(out / "recipe.yaml").tasks


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_recipe_completed_is_a_recipe_and_stays_what_it_is(file: Path) -> None:
    recipe = parse.load(file)
    data = settled(completed(recipe))
    if recipe.rest is None:
        del data["rest"]
    again = parse.loads(json.dumps(lock._given(json.loads(json.dumps(data)))), folder=file.parent)
    assert settled(completed(again)) == settled(completed(recipe))


def settled(recipe: dict[str, Any]) -> dict[str, Any]:
    """Plain data without what nested recipes leave to their method."""
    sources = [recipe.get("base"), *(model["source"] for model in recipe["models"].values())]
    for inner in sources:
        if isinstance(inner, dict):
            del settled(inner)["rest"]
    return recipe


def test_another_input_is_said_and_with_locked_refused(family: Zoo) -> None:
    out = merged(family, TIES)
    file = family.folder / "b/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    recipe = out / "recipe.lock.yaml"
    says = "model 'b': model.safetensors is not the file that the lock names"
    ran = family.cli("merge", recipe, "no", "--locked")
    assert (ran.rc, says in ran.err) == (4, True)
    assert not (family.folder / "no").exists()
    ran = family.cli("merge", recipe, "again", "--json")
    assert ran.rc == 0
    told = json.loads(ran.out)
    assert told["replay"]["drift"] == [says]
    assert told["replay"]["outcome"] == "beyond tolerance"
    assert says in told["warnings"]
    ran = family.cli("merge", recipe, "shown")
    assert "warning: replayed as on torch" in ran.err
    assert "beyond tolerance, 'model.norm.weight' is" in ran.err


def test_what_the_config_and_the_tokenizer_are_made_from_is_an_input(family: Zoo) -> None:
    out = merged(family, TIES)
    recipe = str(out / "recipe.lock.yaml")
    (family.folder / "a/config.json").write_text("{}")  # of no model that lends the output's
    assert family.cli("merge", recipe, "again", "--locked").rc == 0
    config = family.folder / "base/config.json"
    config.write_text(config.read_text().replace("{", '{"rope_theta": 7.0, ', 1))
    (family.folder / "base/added_tokens.json").write_text("{}")
    ran = family.cli("merge", recipe, "no", "--locked")
    assert ran.rc == 4
    assert "model 'base': config.json is not the file that the lock names" in ran.err
    assert "model 'base': added_tokens.json is new" in ran.err
    assert not (family.folder / "no").exists()


def test_locked_wants_a_lock_with_digests(family: Zoo) -> None:
    out = merged(family, TIES, hashes=False)
    assert "sha256" not in (out / "recipe.lock.yaml").read_text()
    with pytest.raises(RecipeError, match="runs a recipe.lock.yaml again, as it is"):
        merged(family, TIES, "no", locked=True)
    with pytest.raises(RecipeError, match="the lock holds no digests"):
        api.merge(out / "recipe.lock.yaml", family.folder / "no", locked=True)
    overrides = ["parameters.density=0.3"]
    with pytest.raises(RecipeError, match="as it is"):
        api.merge(out / "recipe.lock.yaml", family.folder / "n", overrides=overrides, locked=True)
    again = api.merge(out / "recipe.lock.yaml", family.folder / "again", hashes=False)
    assert again.report["replay"]["outcome"] == "same bytes"  # the weights are beside the lock
    changed = api.merge(out / "recipe.lock.yaml", family.folder / "other", overrides=overrides)
    assert "replay" not in changed.report


@pytest.mark.parametrize(
    ("factor", "says"),
    [(1 + 2**-21, "within tolerance"), (1.001, "beyond tolerance")],
)
def test_elsewhere_weights_are_compared_tensor_by_tensor(
    family: Zoo, factor: float, says: str
) -> None:
    """Weights times 1 + d are d / (1 + d) of their norm away, but for rounding."""
    out = merged(family, TIES)
    file, text = out / "recipe.lock.yaml", (out / "recipe.lock.yaml").read_text()
    weights = load_file(out / "model.safetensors")
    weights["lm_head.weight"] *= factor
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    digest = sha256(out / "model.safetensors")
    held = read(text, "x").data["lock"]["outputs"]["model.safetensors"]["sha256"]
    file.write_text(text.replace(held, digest).replace(torch.__version__, "1.0+other"))
    again = api.merge(file, family.folder / "again")
    told = again.report["replay"]
    assert (told["outcome"], told["tensor"]) == (says, "lm_head.weight")
    assert told["distance"] == pytest.approx((factor - 1) / factor, rel=0.3)
    assert not told["same_build"]
    assert told["then"]["torch"] == "1.0+other"
    if says == "beyond tolerance":
        with pytest.raises(CheckpointError, match="not those of the run that wrote the lock"):
            api.merge(file, family.folder / "no", locked=True)
    (out / "model.safetensors").unlink()
    ran = family.cli("merge", file, "alone")
    assert ran.rc == 0
    assert "where torch 1.0+other on cpu made the lock: not compared" in ran.err


def test_a_faulty_lock_is_a_faulty_recipe(family: Zoo) -> None:
    out = merged(family, TIES)
    text = (out / "recipe.lock.yaml").read_text()
    faulty = family.folder / "faulty.yaml"
    for before, after, says in (
        ("  torch:", "  tourch:", "unknown key 'lock.tourch'"),
        ("  folder: ..", "  folder: [1]", "lock.folder must be text"),
        ("bytes:", "byte:", "unknown key"),
    ):
        faulty.write_text(text.replace(before, after))
        with pytest.raises(RecipeError, match=says):
            api.check(faulty)


def test_a_lock_names_the_files_of_adapters(zoo: Zoo) -> None:
    """Shards and config of each adapter; it runs again, and another scale is drift."""
    base = peft_models.save(zoo.folder / "base", "llama")
    for seed, name in enumerate(("one", "two")):
        peft_models.adapt(base, zoo.folder / name, seed)
    both = {"source": "./base", "adapter": ["./one", {"source": "./two", "weight": 0.5}]}
    out = merged(zoo, {"method": "linear", "models": {"m": both, "n": "./base"}})
    file = out / "recipe.lock.yaml"
    told = read(file.read_text("utf-8"), "lock").data
    assert {"m", "m-adapter-0", "m-adapter-1", "n"} == set(told["lock"]["inputs"])
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(told["lock"]["inputs"]["m-adapter-1"]) == names
    again = api.merge(file, zoo.folder / "again", locked=True)
    assert again.report["replay"]["outcome"] == "same bytes"
    config = zoo.folder / "two/adapter_config.json"
    settings = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps(settings | {"lora_alpha": 99}), "utf-8")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        api.merge(file, zoo.folder / "third", locked=True)
