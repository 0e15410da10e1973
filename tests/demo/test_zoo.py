"""The zoo's data and folders, with a base and experts that are hardly trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTModel

import mowmerge
from mowmerge import api
from mowmerge.demo import images, tour, vit, zoo
from mowmerge.demo.images import SPLITS, TASKS
from mowmerge.errors import CheckpointError, ResourceError, SourceError
from tests.peft_models import quiet
from tests.zoo import ROOT, Zoo

ROWS = [
    "base", "expert", "mow", "mow, task given", "mow, oracle", "linear", "task_arithmetic", "ties",
    "wemoe, task given", "wemoe, oracle",
]  # fmt: skip
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A zoo of a step or two, in a folder `mowmerge-demo`."""
    import datasets.config

    folder = tmp_path_factory.mktemp("hasty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(vit, "BASE_STEPS", 2)
        patch.setattr(vit, "STEPS", 1)
        patch.setattr(zoo, "PROCESSES", 1)
        short = {name: replace(m, steps=m.steps and 2) for name, m in tour.MERGES.items()}
        patch.setattr(tour, "MERGES", short)
        zoo.build(folder / "mowmerge-demo")
        tour.write_recipes(folder / "mowmerge-demo")
        for file in (folder / "mowmerge-demo").glob("*.yaml"):
            text = file.read_text("utf-8")
            file.write_text(text.replace("    type:", "    limit: 40\n    type:"), "utf-8")
        yield folder / "mowmerge-demo"


def test_no_two_splits_of_any_tasks_share_a_picture() -> None:
    held: dict[str, set[str]] = {split: set() for split in SPLITS}
    for task, of in TASKS.items():
        for split, seen in held.items():
            drawn = images.samples(task, split)
            assert set(drawn.labels) == set(range(len(of.labels)))
            assert split != "test" or len(drawn.labels) >= 300
            seen |= {sha256(pixels.tobytes()).hexdigest() for pixels in drawn.pixels}
    train, validation, test = held.values()
    assert not train & validation and not (train | validation) & test


def test_digits_and_tiles_are_in_one_split_each() -> None:
    shares = [images._share(100, split) for split in SPLITS]
    assert sorted(np.concatenate(shares)) == list(range(100))
    for file in ("brick.png", "china.jpg"):
        seen = [{tile.tobytes() for tile in images._tiles(file, split)} for split in SPLITS]
        assert sum(map(len, seen)) == len(set.union(*seen))


def test_training_sees_what_the_processor_gives() -> None:
    pixels = images.samples("photographs", "validation").pixels[:5]
    given = zoo.processor()([Image.fromarray(each) for each in pixels], return_tensors="pt")
    assert given["pixel_values"].numpy() == pytest.approx(vit.normalised(pixels).numpy(), abs=1e-6)


def test_the_data_loads_with_names(hasty: Path) -> None:
    import datasets

    loaded = datasets.load_dataset("parquet", data_dir=str(hasty / "data/parity"))
    assert set(loaded) == set(SPLITS)
    assert loaded["test"].features["label"].names == ["even", "odd"]
    drawn = images.samples("parity", "test")
    assert loaded["test"]["label"][:] == drawn.labels.tolist()
    assert np.array_equal(np.asarray(loaded["test"][7]["image"]), drawn.pixels[7])


def test_experts_differ_from_the_base_and_keep_its_heads(hasty: Path) -> None:
    base = load_file(hasty / "base/model.safetensors")
    for task, of in TASKS.items():
        expert = load_file(hasty / task / "model.safetensors")
        head = load_file(hasty / f"base/heads/{task}.safetensors")
        assert {k: v.tolist() for k, v in expert.items() if k in head} == {
            k: v.tolist() for k, v in head.items()
        }
        assert {k.removeprefix("vit.") for k in expert} - set(head) == set(base)
        assert any((expert[f"vit.{k}"] != v).any() for k, v in base.items())
        assert list(mowmerge.load(hasty / "base", task=task).config.label2id) == list(of.labels)


def test_a_second_run_builds_nothing(hasty: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in hasty.rglob("*")}
    said: list[str] = []
    zoo.build(hasty, said.append)
    tour.write_recipes(hasty)
    assert said == [] and {p: p.stat().st_mtime_ns for p in hasty.rglob("*")} == before


def test_what_is_not_whole_is_built_again(hasty: Path, tmp_path: Path) -> None:
    again = shutil.copytree(hasty, tmp_path / "zoo")
    (again / "parity").rename(again / ".parity.partial")
    (again / ".parity.partial/rest.txt").touch()
    (again / "ties.yaml").unlink()
    said: list[str] = []
    zoo.build(again, said.append)
    tour.write_recipes(again)
    assert said == ["experts: 1 to train, 1 at once", "expert: parity"]
    weights = "parity/model.safetensors"
    assert (again / weights).read_bytes() == (hasty / weights).read_bytes()
    assert (again / "ties.yaml").read_text("utf-8") == tour.recipe("ties")
    assert not (again / "parity/rest.txt").exists() and not list(again.glob(".*"))


def test_a_damaged_base_is_named_before_training(hasty: Path, tmp_path: Path) -> None:
    again = shutil.copytree(hasty, tmp_path / "zoo")
    shutil.rmtree(again / "parity")
    shard = again / "base/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"(?s)base/model\.safetensors.*remove what is dam"):
        api.demo(again)


def test_the_command_shows_models_by_tasks(hasty: Path) -> None:
    ran = Zoo(hasty.parent).here("demo")
    assert ran.rc == 0, ran.err
    table, _, told = ran.out.partition("\n\n")
    head, _, *rows = table.splitlines()
    assert head.split() == ["model", *TASKS, "mean", "normalised"]
    assert [row.split("  ")[0] for row in rows] == ROWS
    assert told.splitlines()[0].startswith("mow ")
    assert "merging: ties" in ran.err and "training the routers: mow, 2 steps" in ran.err
    for name in ("linear", "task_arithmetic", "ties"):
        assert mowmerge.load(hasty / "merged" / name, task="digits").config.num_labels == 10
    for name in ("mow", "wemoe"):
        assert len(mowmerge.load(hasty / "merged" / name).mow_heads) == len(TASKS)
    assert all(name in (hasty / "report/report.html").read_text("utf-8") for name in TASKS)


def test_a_file_in_the_way_and_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="is a file"):
        zoo.build(tmp_path / "file")
    monkeypatch.setitem(images.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(SourceError, match="needs no-such-package") as caught:
        zoo.build(tmp_path / "zoo")
    assert caught.value.problems[0].hint == images.HINT
    assert not (tmp_path / "zoo").exists()
    monkeypatch.delitem(images.PACKAGES, "no_such_module")
    with pytest.raises(SourceError, match=r"ships none\.png"):
        images._picture("none.png")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_runs_on_the_zoo(
    recipe: Path, hasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hasty.parent)
    first, second = recipe.read_text("utf-8").splitlines()[:2]
    assert first == "# yaml-language-server: $schema=../docs/recipe.schema.json"
    assert second.startswith("# ")
    if recipe.stem == "lora":  # as its second line says
        for task in images.TASKS:
            where = hasty / task, hasty / "base", hasty.parent / "lora" / task
            assert not api.extract_lora(*where, rank=16).report["lost"]
    fitted = ["parameters.steps=2"] if recipe.stem == "adamerging" else []
    out = api.merge(recipe, tmp_path / "out", overrides=fitted).path
    if recipe.stem == "lora":
        from peft import PeftModel

        assert not api.verify(out).problems
        below = ViTModel.from_pretrained(hasty / "base", add_pooling_layer=False)
        before = {name: value.clone() for name, value in below.state_dict().items()}
        with quiet():
            after = PeftModel.from_pretrained(below, out).merge_and_unload().state_dict()
        assert after.keys() == before.keys()
        assert any(
            not torch.equal(after[name], before[name]) for name in before if "q_proj" in name
        )
        return
    if (out / "router.safetensors").exists() or list(out.glob("dynamic-*")):
        assert len(mowmerge.load(out).mow_heads) == len(images.TASKS)
        return
    kept = [file.stem for file in (out / "heads").glob("*.safetensors")]
    assert kept and all(mowmerge.load(out, task=task) for task in kept)
