"""The folder of a dynamic checkpoint, the plan as it is shown, the survey's cache, and the ends of
runs that are cut off.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import Zoo, left, load, raw

from mowmerge import api, memory, survey
from mowmerge.checkpoint import writer
from mowmerge.engine import Engine
from mowmerge.errors import ResourceError
from mowmerge.planner import Options
from mowmerge.ranks import Ranks

MOW = {"method": "mow", "parameters": {"blocks": 1}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- the folder


@pytest.mark.parametrize("method", ["mow", "wemoe", "emr", "smile"])
def test_everything_in_the_folder_is_hashed(zoo: Zoo, method: str) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": method}, hashes=True)
    out = zoo.folder / "out"
    lines = (out / "SHA256SUMS").read_text().splitlines()
    sums = dict(reversed(line.split("  ")) for line in lines)
    for name, digest in sums.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest, name
    there = {p.name for p in out.iterdir()}
    assert there - set(sums) == {"SHA256SUMS", "README.md", "report.json"}
    wanted = {
        "config.json",
        "model.safetensors.index.json",
        "recipe.yaml",
        "modeling.py",
        "format.py",
    }
    assert wanted <= set(sums)
    assert any(name.startswith("dynamic-") for name in sums)
    assert ("router.safetensors" in sums) == (method != "emr")


def test_the_code_is_that_of_the_package(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": "emr"})
    folder = Path(sys.modules["mowmerge.dynamic.format"].__file__ or "").parent
    for file in folder.glob("[a-z]*.py"):
        assert (zoo.folder / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("smile", {"rank": 4}),
        ("rank_one_moe", {"rank": 4}),
        ("twin_merging", {"density": 0.02}),
        ("mow", {"codec": "low_rank", "rank": 4, "blocks": 1}),
        ("rmm", {"rank": 4}),
    ],
)
def test_what_a_cut_to_a_rank_loses_is_in_the_report(
    zoo: Zoo, method: str, given: dict[str, Any]
) -> None:
    large, small = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    models = zoo.family({large: (260, 240), small: (240, 40), "model.norm.weight": (240,)}, 2)
    _, report = zoo.merge({"method": method, "parameters": given})
    told = {line["name"]: line for line in report["tensors"]}
    of_anchor = method in ("twin_merging", "mow")  # what is cut is the difference from that
    anchor = load(zoo.folder / "out") if of_anchor else models["base"]
    for name, how in ((large, "randomised"), (small, "exact")):
        rank = 1 if method == "twin_merging" and name == small else 4
        assert told[name]["svd"] == how
        for model, lost in zip("ab", told[name]["lost"], strict=True):
            values = torch.linalg.svdvals((models[model][name] - anchor[name]).double())
            least = float(values[rank:].norm() / values.norm())
            assert least * 0.9999 <= lost <= least * 1.01
    assert "lost" not in told["model.norm.weight"]


def test_the_report(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    _, report = zoo.merge(MOW)
    found = report["survey"]
    assert set(found) == {"dissimilarity", "dynamic"}
    assert list(found["dissimilarity"]["mlp"]) == ["model.layers.0", "model.layers.1"]
    assert [len(blocks) for blocks in found["dynamic"].values()] == [1, 1]
    line = next(t for t in report["tensors"] if t["action"] == "dynamic")
    assert (line["codec"], line["gate"], line["anchor"]) == ("full_abs", "0", "task_arithmetic")
    assert len(line["delta_norms"]) == 3
    size = torch.Size(line["shape"]).numel() * 4
    assert line["written_bytes"] == 4 * size
    assert report["planned_peak_bytes"] > memory.RUNTIME
    json.dumps(report)


@pytest.mark.parametrize(("method", "words"), [
    ("mow", "routers choose, and are to be trained first"),
    ("emr", "whoever calls it says whose sample it is, with `task_ids`"),
    ("smile", "each token chooses for itself, and nothing is trained"),
])  # fmt: skip
def test_the_card_says_what_it_is_and_how_to_load_it(zoo: Zoo, method: str, words: str) -> None:
    models = zoo.family("llama", 2)
    for name, tensors in models.items():
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        zoo.save(name, tensors, config=config)
    zoo.merge({"method": method})
    card = (zoo.folder / "out/README.md").read_text()
    assert words in card
    assert "import mowmerge.hf" in card
    assert "AutoModelForCausalLM.from_pretrained(" in card
    assert f"\n| {method} | " in card
    assert f"\n- {method}\n" in card
    if method != "emr":
        assert "\n| task_arithmetic | " in card
    settings = json.loads((zoo.folder / "out/config.json").read_text())
    assert settings["auto_map"]["AutoModelForCausalLM"].endswith(".MowmergeForCausalLM")


# --- the command line


def test_the_plan_is_shown_with_its_bound_and_then_exactly(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    zoo.recipe(MOW)
    rough = zoo.here("merge", "recipe.yaml", "--dry-run").out
    assert "write at most " in rough
    assert "decided by a survey of the weights: --survey runs it" in rough
    assert "  model.layers.0.mlp.up_proj.dyn_abs" in rough
    assert "full_abs, 3 slots, gate 0" in rough
    assert "anchor" in rough and "task_arithmetic" in rough
    exact = zoo.here("merge", "recipe.yaml", "--dry-run", "--survey").out
    assert "at most" not in exact and "--survey" not in exact
    plan = api.survey(zoo.folder / "recipe.yaml")
    assert plan.manifest is not None
    assert f" {len(plan.manifest.codes)} dynamic, 1 file(s) of deltas and one of routers;" in exact
    assert sum("dyn_abs" in line for line in exact.splitlines()) == len(plan.manifest.codes)


def test_the_plan_as_json(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    zoo.recipe(MOW)
    rough = json.loads(zoo.here("merge", "recipe.yaml", "--dry-run", "--json").out)
    assert rough["dynamic"]["undecided"] is True
    assert rough["dynamic"]["survey"] is None
    ran = zoo.here("merge", "recipe.yaml", "--dry-run", "--json", "--survey")
    exact = json.loads(ran.out)
    assert exact["dynamic"]["undecided"] is False
    assert exact["write_bytes"] < rough["write_bytes"]
    assert exact["dynamic"]["experts"] == ["a", "b", "c"]
    assert exact["dynamic"]["gates"] == {"0": {"scope": "sample", "router": "0"}}
    coded = [t["dynamic"] for t in exact["tensors"] if "dynamic" in t]
    assert {c["codec"] for c in coded} == {"full_abs"}
    assert {c["anchor"]["method"] for c in coded} == {"task_arithmetic"}
    parts = [p["name"] for c in coded for p in c["parts"]]
    result = zoo.here("merge", "recipe.yaml", "out")
    assert result.rc == 0, result.err
    found = load(zoo.folder / "out")
    assert {n for n in found if "dyn_" in n} == set(parts)
    assert set(found) == {n for shard in exact["shards"] for n in shard["tensors"]}
    assert exact["write_bytes"] == sum(shard["bytes"] for shard in exact["shards"])
    assert f"{len(coded)} tensors dynamic, " in result.out
    static = len(exact["tensors"]) - len(coded)
    assert f"dynamic, {static} merged, 0 copied, " in result.out


def test_check_shows_the_rest_and_methods_the_family(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe({"method": "wemoe", "parameters": {"scale": [0.1, 0.3]}})
    shown = json.loads(zoo.here("check", "recipe.yaml", "--json").out)["recipe"]
    assert shown["rest"]["method"] == "task_arithmetic"
    assert shown["rest"]["parameters"]["scale"] == [0.1, 0.3]
    zoo.recipe({"method": "mow", "rest": {"method": "ties"}})
    shown = json.loads(zoo.here("check", "recipe.yaml", "--json").out)["recipe"]
    assert shown["rest"]["parameters"]["density"] == 0.2
    zoo.recipe({"method": "linear"})
    assert json.loads(zoo.here("check", "recipe.yaml", "--json").out)["recipe"]["rest"] is None
    described = json.loads(zoo.here("methods", "mow", "--json").out)
    assert (described["family"], described["models"]["at_least"]) == ("dynamic", 2)


def test_progress_counts_every_byte_of_data(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    for method in ("emr", "mow", "e_wemoe"):
        counted: list[int] = []
        total: list[int] = []

        def begin(plan: Any, total: list[int] = total, counted: list[int] = counted) -> Any:
            total.append(plan.data_bytes)
            return counted.append

        api.merge(zoo.recipe({"method": method}), zoo.folder / method, begin=begin, hashes=False)
        assert sum(counted) == total[0]


# --- the survey


def test_a_survey_is_kept_for_the_same_inputs_and_no_others(
    zoo: Zoo, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = zoo.family("llama", 3)
    ran: list[int] = []
    true = Engine.measure

    def counting(self: Engine, asked: Any) -> Any:
        ran.append(len(asked))
        return true(self, asked)

    monkeypatch.setattr(Engine, "measure", counting)
    first = api.survey(zoo.recipe(MOW)).surveyed
    assert api.survey(zoo.recipe(MOW), options=Options(workers=2)).surveyed == first
    assert len(ran) == 1
    assert len(list((cache / "mowmerge/surveys").iterdir())) == 1
    models["b"]["model.layers.1.mlp.up_proj.weight"] *= 3
    zoo.save("b", models["b"])
    second = api.survey(zoo.recipe(MOW)).surveyed
    assert len(ran) == 2 and second != first
    api.survey(zoo.recipe(MOW | {"parameters": {"blocks": 2}}))
    assert len(ran) == 3
    assert api.survey(zoo.recipe({"method": "wemoe"})).surveyed is None
    assert len(ran) == 3


def test_a_cache_that_is_of_no_use_is_done_without(zoo: Zoo, cache: Path) -> None:
    zoo.family("llama", 3)
    first = api.survey(zoo.recipe(MOW)).surveyed
    (file,) = (cache / "mowmerge/surveys").iterdir()
    file.write_text("{")
    assert api.survey(zoo.recipe(MOW)).surveyed == first
    assert json.loads(file.read_text()) == first
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("no folder")
    assert api.survey(zoo.recipe(MOW)).surveyed == first


def test_a_surveyed_plan_has_a_fingerprint_of_its_own(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    recipe = zoo.recipe(MOW)
    exact, rough = api.survey(recipe), api.plan(recipe)
    assert exact.fingerprint != rough.fingerprint
    assert survey.survey(api.check(recipe), rough, Ranks()) == exact.surveyed
    assert rough.undecided and not exact.undecided


# --- cut off


def test_no_room_is_said_and_nothing_is_left(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.family("llama", 3)
    true, calls = os.pwrite, [0]

    def full(fd: int, data: Any, offset: int) -> int:
        calls[0] += 1
        if calls[0] > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return true(fd, data, offset)

    monkeypatch.setattr(writer.os, "pwrite", full)
    with pytest.raises(ResourceError, match="No space left|no space|disk"):
        zoo.merge({"method": "emr"})
    assert calls[0] > 40
    assert not (zoo.folder / "out").exists()
    assert left(zoo.folder) == []


KILLED = """
import random, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from killing import killed, steps
from mowmerge import merge
from mowmerge.tensors import torch
torch.set_num_threads(1)

def run():
    merge("recipe.yaml", "out", force=True, hashes=False)

run()
out = Path("out")
whole, draws, early = sorted(p.name for p in out.iterdir()), random.Random(5), 0
shutil.rmtree(out)
last = steps(run)
shutil.rmtree(out)
for i in range(int(sys.argv[1])):
    killed(run, draws.randrange(last))
    early += Path(".out.partial").exists()
    if out.exists() and sorted(p.name for p in out.iterdir()) != whole:
        sys.exit(f"killed run {i} left a broken checkpoint")
    shutil.rmtree(out, ignore_errors=True)
print(early)
"""


def test_a_kill_leaves_nothing_or_a_whole_checkpoint(zoo: Zoo) -> None:
    zoo.family({f"model.layers.{i}.mlp.up_proj.weight": (300, 1000) for i in range(3)}, 2)
    zoo.recipe({"method": "emr", "output": {"shard_size": "2MB"}})
    ran = zoo.python(KILLED, 8, Path(__file__).parent)
    assert ran.rc == 0, ran.err
    assert int(ran.out) > 4


# --- memory


def test_max_memory_narrows_blocks_and_names_the_tensor_it_cannot(zoo: Zoo) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (700, 1000), "model.norm.weight": (1000,)}
    zoo.family(shapes, 3)
    wide = api.plan(zoo.recipe({"method": "emr"}), options=Options(workers=1))
    small = Options(workers=1, max_memory=wide.peak_bytes - 1)
    narrow = api.plan(zoo.recipe({"method": "emr"}), options=small)
    assert narrow.peak_bytes < wide.peak_bytes and narrow.block < wide.block
    whole = raw(zoo.merge({"method": "emr"}, "wide")[0])
    limit = narrow.peak_bytes
    assert raw(zoo.merge({"method": "emr"}, "narrow", workers=1, max_memory=limit)[0]) == whole
    with pytest.raises(ResourceError, match="is too little") as caught:
        api.plan(zoo.recipe({"method": "smile"}), options=small)
    assert "up_proj.weight', scope tensor" in caught.value.problems[0].where
