"""How an evaluation runs: mixed batches, memory that ends, what is kept, and several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mowmerge import api
from mowmerge.errors import RecipeError, ResourceError, SourceError
from mowmerge.evals import aggregates, costs, markdown, models, page, words
from mowmerge.evals.kinds import causal_lm
from mowmerge.evals.score import Evaluation
from mowmerge.evals.settings import Options
from tests.evals.kinds.test_language import sentence
from tests.evals.making import lms, recipe, rows
from tests.zoo import Zoo

N = 11


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A merge of two language models, with a task each and one that is held out."""
    lms(tmp_path, "one", "two")
    chance, tasks = Random(0), {}
    for task in ("one", "two", "general"):
        texts = ({"text": sentence(chance, chance.randint(2, 20))} for _ in range(N))
        tasks[task] = {"type": "causal-lm", "data": rows(tmp_path / f"{task}.jsonl", *texts)}
        if task != "general":
            tasks[task]["expert"] = task
    made = recipe(tmp_path, "base", ["one", "two"], tasks)
    api.merge(made, tmp_path / "out")
    return made


def figures(found: Evaluation) -> dict[tuple[str, str], Any]:
    return {(s.row, s.task): (s.value, s.items, s.weights) for s in found.scores}


def near(found: Evaluation, other: Evaluation) -> None:
    for (key, one), two in zip(figures(found).items(), figures(other).values(), strict=True):
        assert one[0] == pytest.approx(two[0], rel=1e-6), key
        assert one[1] == pytest.approx(two[1], rel=1e-5), key
        assert one[2] == two[2]


class Watched:
    """Stands in for a type's `answer`: remembers batches, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[tuple[str, int]]] = []
        self.most, self.last, self._true = 10**9, 10**9, causal_lm.answer
        monkeypatch.setattr(causal_lm, "answer", self)

    def __call__(self, loaded: Any, way: str, places: Sequence[Any], given: Any) -> Any:
        if len(places) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(self.batches) == self.last:
            raise KeyboardInterrupt
        self.batches.append([(place.job.name, place.item) for place in places])
        return self._true(loaded, way, places, given)

    def items(self) -> int:
        """How many, those left out that were run alone for their time."""
        return sum(len(batch) for batch in self.batches if len(batch) > 1)


def test_batches_mix_tasks_and_what_they_hold_decides_nothing(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    found = api.evaluate(tmp_path / "out", file, options=Options(batch=8))
    first = watched.batches[0]
    assert len(first) == 8 and len({task for task, _ in first}) == 3
    merged = [place for batch in watched.batches[:5] for place in batch]
    assert sorted(item for task, item in merged if task == "one") == list(range(N))
    near(found, api.evaluate(tmp_path / "out", file, options=Options(batch=1)))
    near(found, api.evaluate(tmp_path / "out", file, options=Options(batch=64, seed=3)))


def test_out_of_memory_halves_the_batch(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = api.evaluate(tmp_path / "out", file)
    watched = Watched(monkeypatch)
    watched.most = 5
    smaller = api.evaluate(tmp_path / "out", file, options=Options(batch=16))
    near(found, smaller)
    assert smaller.settings["batch"] == 4
    assert max(map(len, watched.batches)) == 4
    watched.most = 0
    with pytest.raises(ResourceError, match="(?s)memory does not suffice for one item.*is kept"):
        api.evaluate(tmp_path / "out", file)


def test_what_is_scored_is_kept_and_an_interruption_loses_a_batch(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(batch=4, cache=tmp_path / "cache")
    watched = Watched(monkeypatch)
    watched.last = 5
    with pytest.raises(KeyboardInterrupt):
        api.evaluate(tmp_path / "out", file, options=options)
    assert watched.items() == 20
    for journal in (tmp_path / "cache").glob("*.jsonl"):  # as a kill in the middle of a line
        with journal.open("a") as stream:
            stream.write('{"item": 99, "nl')
    watched.batches.clear()
    watched.last = 10**9
    found = api.evaluate(tmp_path / "out", file, options=options)
    assert watched.items() == (13 - 1) + (33 - 1) + 2 * 11  # fours; what is left over is alone
    monkeypatch.setattr(models, "load", None)  # nothing is loaded any more
    again = api.evaluate(tmp_path / "out", file, options=options)
    assert figures(again) == figures(found)
    content = json.loads(file.read_text())
    content["tasks"]["one"]["metric"] = "bits_per_byte"
    file.write_text(json.dumps(content))
    assert api.evaluate(tmp_path / "out", file, options=options).scores[0].metric == "bits_per_byte"


def test_other_weights_or_data_are_scored_anew_and_nothing_else(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(cache=tmp_path / "cache")
    before = figures(api.evaluate(tmp_path / "out", file, options=options))
    weights = load_file(tmp_path / "two/model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, tmp_path / "two/model.safetensors", {"format": "pt"})
    watched = Watched(monkeypatch)
    after = figures(api.evaluate(tmp_path / "out", file, options=options))
    assert {key for key in before if before[key] != after[key]} == {("expert", "two")}
    assert {task for batch in watched.batches for task, _ in batch} == {"two"}
    watched.batches.clear()
    rows(tmp_path / "one.jsonl", {"text": "the cat sat on a mat"})
    os.utime(tmp_path / "one.jsonl", (1, 1))
    api.evaluate(tmp_path / "out", file, options=options)
    assert {task for batch in watched.batches for task, _ in batch} == {"one"}


def test_other_merges_stand_beside_it(tmp_path: Path, file: Path) -> None:
    shutil.copytree(tmp_path / "out", tmp_path / "second")
    api.merge(file, tmp_path / "mow", overrides=["method=mow", "parameters={blocks: 1}"])
    rivals = ["base", str(tmp_path / "second"), str(tmp_path / "mow")]
    found = api.evaluate(tmp_path / "out", file, against=rivals)
    values = {(s.row, s.task): s for s in found.scores}
    assert list(dict.fromkeys(s.row for s in found.scores)) == [
        "merged", "second", "mow", "mow, oracle", "base",
    ]  # fmt: skip
    assert values["second", "one"].items == values["merged", "one"].items
    assert ("mow", "general") in values and ("mow, oracle", "general") not in values
    assert len(values["mow", "one"].routed) == N
    gates = found.gates["mow"]["one"]
    assert all(len(g.mean) == 2 and g.entropy >= 0 for g in gates.values())
    assert sum(next(iter(gates.values())).mean) == pytest.approx(1.0, abs=1e-4)
    assert found.flags["mow, oracle"]["needs_task_id"] and not found.flags["mow"]["needs_task_id"]
    assert found.flags["mow"]["output"] == "dynamic"
    assert found.flags["mow"]["faithful"] == "variant (mow)"
    shutil.copytree(tmp_path / "out", tmp_path / "x/merged")
    with pytest.raises(RecipeError, match="two of the models to score are called 'merged'"):
        api.evaluate(tmp_path / "out", file, against=[str(tmp_path / "x/merged")])


def test_what_is_known_of_models_data_and_costs(tmp_path: Path, file: Path) -> None:
    found = api.evaluate(tmp_path / "out", file)
    assert set(found.models) == {"merged", "base", "expert one", "expert two"}
    assert found.models["base"].source == "./base" and found.models["base"].dtype == "float32"
    assert len({m.sha256 for m in found.models.values()}) == 4
    assert {t: d.n for t, d in found.data.items()} == dict.fromkeys(("one", "two", "general"), N)
    assert found.data["one"].split == "test" and len(found.data["one"].sha256) == 64
    costs = {cost.row: cost for cost in found.costs}
    size = sum(v.numel() for v in load_file(tmp_path / "base/model.safetensors").values())
    assert set(costs) == {"merged", "base", "expert"}
    for cost in costs.values():
        assert size <= cost.parameters <= size + 64 * 16 + 64
        assert cost.seconds > 0 and cost.latency > 0 and cost.peak_bytes > 1 << 20
        assert cost.throughput == pytest.approx(cost.items / cost.seconds)
    assert costs["merged"].items == 3 * N and costs["expert"].items == 2 * N
    assert {"torch", "transformers", "mowmerge"} <= set(found.settings["versions"])
    flags = found.flags["merged"]
    assert flags["needs_base"] and not flags["needs_data"] and not flags["needs_labels"]
    assert (flags["heads"], flags["faithful"], flags["output"]) == ("merged", "yes", "static")
    assert (
        found.flags["expert"] | {"needs_base": False, "heads": "own", "faithful": None}
        == (found.flags["expert"])
    )
    (tmp_path / "out/recipe.yaml").unlink()
    (tmp_path / "out/recipe.lock.yaml").unlink()  # a folder that somebody else merged
    unknown = api.evaluate(tmp_path / "out", file, against=()).flags["merged"]
    assert unknown["needs_base"] is None and unknown["faithful"] is None


def test_what_answers_cost_is_kept_with_them_and_with_what_they_ran_on(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(cache=tmp_path / "cache")
    first = api.evaluate(tmp_path / "out", file, options=options)
    assert {c.row: (c.items, c.earlier) for c in first.costs} == {
        "merged": (3 * N, False), "base": (3 * N, False), "expert": (2 * N, False)
    }  # fmt: skip
    on = first.costs[0].on
    assert set(on) == {"machine", "device", "threads", "processes", "batch"}
    assert (on["device"], on["threads"], on["batch"]) == ("cpu", torch.get_num_threads(), 64)
    again = api.evaluate(tmp_path / "out", file, options=options)
    for one, two in zip(first.costs, again.costs, strict=True):
        assert two.earlier and two.latency > 0
        assert two == replace(one, earlier=True)
    monkeypatch.setattr(costs, "_processor", lambda: "another machine")
    shutil.copytree(tmp_path / "out", tmp_path / "second")
    model = load_file(tmp_path / "second/model.safetensors")
    save_file({n: v * 1.01 for n, v in model.items()},
              tmp_path / "second/model.safetensors", {"format": "pt"})  # fmt: skip
    both = api.evaluate(
        tmp_path / "out", file, against=("base", "experts", str(tmp_path / "second")),
        options=options,
    )  # fmt: skip
    found = {c.row: c for c in aggregates.costs(both.costs)}
    assert found["second"].on["machine"] == "another machine" and not found["second"].earlier
    assert found["base"].on == on and found["base"].earlier
    assert set(found["second"].ratios) == {"parameters", "bytes_on_disk"}
    assert set(found["base"].ratios) == {
        "parameters", "bytes_on_disk", "peak_bytes", "latency", "throughput",
    }  # fmt: skip
    made = api.report_on(both, tmp_path / "out", file)
    said = " ".join(words.conditions(made))
    assert (
        "second: measured in this run, on machine another machine" in said and "earlier run" in said
    )
    assert "merged (earlier)" in page.render(made) and "merged (earlier)" in markdown.render(made)
    monkeypatch.undo()
    content = json.loads(file.read_text())
    rows(tmp_path / "more.jsonl", {"text": "a hen sat"})
    content["tasks"]["more"] = content["tasks"]["general"] | {
        "data": {"path": "json", "data_files": {"test": "./more.jsonl"}}
    }
    file.write_text(json.dumps(content))  # a task more: what is new and what was kept add up
    added = {c.row: c for c in api.evaluate(tmp_path / "out", file, options=options).costs}
    assert added["merged"].items == 3 * N + 1 and not added["merged"].earlier
    assert added["expert"].items == 2 * N and added["expert"].earlier


def test_an_expert_that_is_gone_is_named_with_its_task(tmp_path: Path, file: Path) -> None:
    shutil.rmtree(tmp_path / "two")
    with pytest.raises(SourceError, match="the expert 'two' of task 'two' cannot be had") as caught:
        api.evaluate(tmp_path / "out", file)
    assert "./two" in str(caught.value) and "recipe.yaml" in str(caught.value)


def test_the_command_keeps_by_default_and_says_so(tmp_path: Path, file: Path) -> None:
    zoo = Zoo(tmp_path)
    first = zoo.here("eval", "out", "--tasks", "recipe.yaml", "--json")
    assert first.rc == 0, first.err
    assert list((tmp_path / ".mowmerge-cache").glob("*.jsonl"))
    again = zoo.here("eval", "out", "--tasks", "recipe.yaml", "--json")
    assert json.loads(first.out)["scores"] == json.loads(again.out)["scores"]
    shutil.rmtree(tmp_path / ".mowmerge-cache")
    ran = zoo.here("eval", "out", "--tasks", "recipe.yaml", "--against", "out2", "--no-cache")
    assert ran.rc == 5 and "out2" in ran.err
    assert not (tmp_path / ".mowmerge-cache").exists()
    assert zoo.here("eval", "out", "--dtype", "int8").rc == 2


def test_a_file_of_tasks_alone_is_scored_with_the_folders_models(
    tmp_path: Path, file: Path
) -> None:
    tasks = json.loads(file.read_text())["tasks"]
    (tmp_path / "elsewhere").mkdir()
    alone = tmp_path / "elsewhere/tasks.yaml"
    for name in list(tasks):
        shutil.copy(tmp_path / f"{name}.jsonl", tmp_path / "elsewhere")
    alone.write_text(json.dumps({"tasks": tasks}))
    found = api.evaluate(tmp_path / "out", alone)
    assert figures(found) == figures(api.evaluate(tmp_path / "out", file))
    zoo = Zoo(tmp_path)
    ran = zoo.here("eval", "out", "--tasks", "elsewhere/tasks.yaml", "--no-cache", "--json")
    assert ran.rc == 0, ran.err
    told = json.loads(ran.out)
    assert told["run"]["recipe"] == "recipe" and "elsewhere/tasks.yaml" in told["run"]["command"]
    alone.write_text("tasks:\n  one: {expert: oen, type: causal-lm, data: {path: json}}\n")
    ran = zoo.here("eval", "out", "--tasks", "elsewhere/tasks.yaml")
    assert ran.rc == 3 and "tasks.yaml:2" in ran.err and "did you mean 'one'" in ran.err


def test_a_model_that_is_spread_over_devices_scores_the_same(tmp_path: Path, file: Path) -> None:
    near(
        api.evaluate(tmp_path / "out", file, options=Options(device="auto")),
        api.evaluate(tmp_path / "out", file, options=Options(device="cpu")),
    )
    with pytest.raises(ResourceError, match="there is no device 'cuda:7' here"):
        api.evaluate(tmp_path / "out", file, options=Options(device="cuda:7"))


def test_bf16_weights(tmp_path: Path, file: Path) -> None:
    found = figures(api.evaluate(tmp_path / "out", file))
    half = api.evaluate(tmp_path / "out", file, options=Options(dtype="bfloat16"))
    assert half.models["merged"].dtype == "bfloat16"
    for key, (value, *_) in figures(half).items():
        assert value == pytest.approx(found[key][0], rel=0.05) and value != found[key][0]


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path: Path, file: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
        "29517", "-m", "mowmerge", "eval", "out", "--tasks", "recipe.yaml", "--json",
        "--no-cache",
    ]  # fmt: skip
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root, "HF_DATASETS_CACHE": str(tmp_path / "hf")}
    ran = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    one = figures(api.evaluate(tmp_path / "out", file))
    assert found["settings"]["processes"] == 2
    for score in found["scores"]:
        value, items, _ = one[score["model"], score["task"]]
        assert score["value"] == pytest.approx(value, rel=1e-6)
        assert score["items"] == pytest.approx(items, rel=1e-5)


def test_fewer_processes_than_told_are_refused(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="WORLD_SIZE says 2 processes"):
        api.evaluate(tmp_path / "out", file)
