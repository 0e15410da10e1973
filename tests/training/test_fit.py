"""The fit pass on tiny ViT and BERT zoos: its gradients, its invariants, its bytes, its faults."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

import mowmerge
from mowmerge import api
from mowmerge.engine import Engine
from mowmerge.errors import CheckpointError, RecipeError, ResourceError
from mowmerge.planner import Options
from mowmerge.recipe.complete import completed
from mowmerge.training import fit
from tests.zoo import Zoo, load, raw

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
LABELS = {"pets": ["cat", "dog", "hen"], "sky": ["grey", "clear"], "sea": ["calm", "rough"]}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
COUNT = 12


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where models and data are made once; the data stay here, tests change copies of models."""
    import datasets.config

    folder, before = tmp_path_factory.mktemp("store"), datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def maps(labels: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {v: i for i, v in enumerate(labels)}}


def apart(model: Any, base: Any, step: float = 0.1) -> Any:
    """The model with its backbone a step away from the base, and a head that says something."""
    held = {name.partition(".")[2]: p for name, p in model.named_parameters()}
    for name, value in base.named_parameters():
        if name in held:
            held[name].data = value.data + step * torch.randn_like(value)
    model.classifier.weight.data.normal_()
    return model.eval()


def vits(store: Path, folder: Path) -> dict[str, Any]:
    return copied(build_vits, store, folder)


def berts(store: Path, folder: Path) -> dict[str, Any]:
    return copied(build_berts, store, folder)


def copied(build: Callable[[Path], dict[str, Any]], store: Path, folder: Path) -> dict[str, Any]:
    """A zoo's models in the test's folder, made in the store if they are not there; its tasks."""
    at = store / build.__name__
    if not at.exists():
        at.mkdir()
        (at / "tasks.json").write_text(json.dumps(build(at)))
    for name in ("base", *LABELS):
        shutil.copytree(at / name, folder / name)
    found: dict[str, Any] = json.loads((at / "tasks.json").read_text())
    return found


def build_vits(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    chance = random.Random(0)
    sizes = {**SIZES, "image_size": 8, "patch_size": 4}
    base = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
    base.save_pretrained(folder / "base")
    tasks = {}
    for name, labels in LABELS.items():
        apart(ViTForImageClassification(ViTConfig(**sizes, **maps(labels))), base).save_pretrained(
            folder / name
        )
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / name)
        for split in ("train", "test"):
            for i in range(COUNT):
                at = folder / f"data-{name}" / split / labels[i % len(labels)]
                at.mkdir(parents=True, exist_ok=True)
                Image.frombytes("RGB", (8, 8), chance.randbytes(192)).save(at / f"{i:03d}.png")
        data = {"path": "imagefolder", "data_dir": str(folder / f"data-{name}")}
        tasks[name] = {"expert": name, "type": "image-classification", "data": data}
    return tasks


def build_berts(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    chance = random.Random(0)
    sizes = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 16}
    base = BertModel(BertConfig(**sizes))
    base.save_pretrained(folder / "base")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tasks = {}
    for name, labels in LABELS.items():
        model = BertForSequenceClassification(BertConfig(**sizes, **maps(labels)))
        apart(model, base).save_pretrained(folder / name)
        BertTokenizer(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder / name)
        for split in ("train", "test"):
            lines = [
                {"text": " ".join(chance.choices(WORDS[5:], k=3 + i)), "label": i % len(labels)}
                for i in range(COUNT)
            ]
            at = folder / f"{name}-{split}.json"
            at.write_text("\n".join(map(json.dumps, lines)))
        data = {
            "path": "json",
            "data_files": {s: str(folder / f"{name}-{s}.json") for s in ("train", "test")},
        }
        tasks[name] = {"expert": name, "type": "text-classification", "data": data}
    return tasks


BUILDS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"vit": vits, "bert": berts}


def written(folder: Path, of: dict[str, Any], name: str = "recipe", **changed: Any) -> Path:
    """A recipe over a zoo; what is changed goes over its parameters, or beside them."""
    split = {"splits": {"router": "train", "eval": "test"}}
    content: dict[str, Any] = {
        "version": 1, "base": "./base", "models": {n: f"./{n}" for n in LABELS},
        "method": "adamerging", "heads": {"match": "classifier.*"},
        "parameters": {"steps": 3, "batch": 4, "rate": 0.02},
        "tasks": {n: {**task, **split} for n, task in of.items()},
    }  # fmt: skip
    content["parameters"] |= changed.pop("parameters", {})
    content |= changed
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}, indent=1))
    return file


@pytest.fixture(params=list(BUILDS))
def zoo(request: pytest.FixtureRequest, store: Path, tmp_path: Path) -> dict[str, Any]:
    return BUILDS[request.param](store, tmp_path)


def learned(out: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((out / "coefficients.json").read_text())[
        "tensors"
    ]
    return found


def run(file: Path, out: str = "out", **options: Any) -> api.Result:
    return api.merge(file, file.parent / out, options=Options(**options), force=True)


# --- gradients


class Ready:
    """A fit that is about to start, and its loss written as one graph."""

    def __init__(self, file: Path) -> None:
        self.recipe = api.check(file)
        self.plan = api.plan(self.recipe)
        assert self.plan.fit
        self.merged = fit.Merged(self.plan, self.plan.fit)
        self.tasks = [
            fit.Task(self.recipe, self.plan, n, self.merged.leaves) for n in self.plan.fit.tasks
        ]

    def batches(self) -> list[Any]:
        """What each task's first step is given."""
        found = []
        for task in self.tasks:
            chosen = fit.islice(fit.order(0, task.name, len(task.items)), 4)
            samples = [task.items.input(i) for i in chosen]
            found.append(fit.inputs.encode(task._processor, samples, task.model.config))
        return found

    def loss(self, weights: Tensor, batches: list[Any]) -> Tensor:
        """The sum of mean entropies as a function of the coefficients, by functional_call."""
        total = torch.zeros((), dtype=weights.dtype)
        for task, given in zip(self.tasks, batches, strict=True):
            located = fit._locator(task.model)
            state = {}
            for job in self.merged._jobs:
                base, rows = self.merged._parts(job)
                w = weights[self.merged._index[job.output.name]]
                value = base.to(w) + (w[:, None] * rows.to(w)).sum(0)
                state[located(job.output.name)] = value.view(job.output.shape)
            model = task.model.to(weights.dtype)
            inputs = {k: v.to(weights.dtype) if v.is_floating_point() else v
                      for k, v in given.items()}  # fmt: skip
            logits = torch.func.functional_call(model, state, (), inputs).logits
            p = logits.softmax(-1)
            total = total - (p * p.log()).sum(-1).mean()
        return total


@pytest.mark.parametrize("method", ["adamerging", "adamerging_pp"])
@pytest.mark.parametrize("granularity", ["tensor", "task"])
def test_the_gradient_is_that_of_the_whole_graph_and_of_differences(
    tmp_path: Path, zoo: dict[str, Any], method: str, granularity: str
) -> None:
    given = {"granularity": granularity}
    ready = Ready(written(tmp_path, zoo, method=method, parameters=given))
    batches = ready.batches()
    for task in ready.tasks:
        task.learn(0)
    ours = ready.merged.gradient()
    assert ours.abs().max() > 1e-3
    weights = ready.merged.weights.detach().clone().requires_grad_()
    (whole,) = torch.autograd.grad(ready.loss(weights, batches), weights)
    assert torch.allclose(ours, whole, atol=1e-5, rtol=1e-4)
    wide, h = weights.detach().double(), 1e-5
    for i in range(0, len(wide), max(1, len(wide) // 5)):
        up, down = wide.clone(), wide.clone()
        up[i] += h
        down[i] -= h
        slope = (ready.loss(up, batches) - ready.loss(down, batches)) / (2 * h)
        assert float(ours[i]) == pytest.approx(float(slope), abs=1e-5, rel=1e-3)


def test_task_wise_is_the_sum_over_tensors(tmp_path: Path, zoo: dict[str, Any]) -> None:
    sums = []
    for granularity in ("tensor", "task"):
        ready = Ready(written(tmp_path, zoo, parameters={"granularity": granularity}))
        for task in ready.tasks:
            task.learn(0)
        gradient = ready.merged.gradient()
        each = dict.fromkeys(LABELS, 0.0)
        for job in ready.merged._jobs if granularity == "tensor" else ready.merged._jobs[:1]:
            for given, i in zip(job.models, ready.merged._index[job.output.name], strict=True):
                each[given.model] += float(gradient[i])
        sums.append(each)
    assert sums[0] == pytest.approx(sums[1], rel=1e-5, abs=1e-6)


def test_balanced_entropies_are_shares_of_the_most_they_can_be(store: Path, tmp_path: Path) -> None:
    tasks, gradients = vits(store, tmp_path), []
    for balance in (False, True):
        given = {"balance": balance}
        ready = Ready(written(tmp_path, {"pets": tasks["pets"]}, parameters=given))
        ready.tasks[0].learn(0)
        gradients.append(ready.merged.gradient())
    assert torch.allclose(gradients[0], gradients[1] * math.log(3), rtol=1e-4, atol=1e-8)


def test_reading_task_vectors_again_each_step_changes_nothing(
    tmp_path: Path, zoo: dict[str, Any]
) -> None:
    file = written(tmp_path, zoo, method="adamerging_pp")
    recipe = api.check(file)
    plan = api.plan(recipe)
    assert plan.fit
    assert plan.fit.held
    again = replace(plan, fit=replace(plan.fit, held=False))
    one, two = (fit.fit(recipe, p).coefficients for p in (plan, again))
    assert one == two


# --- invariants


@pytest.mark.parametrize("steps", [0, 3])
def test_no_steps_is_task_arithmetic_and_steps_are_not(
    tmp_path: Path, zoo: dict[str, Any], steps: int
) -> None:
    fitted = run(written(tmp_path, zoo, parameters={"steps": steps}))
    plain = written(tmp_path, zoo, "ta", method="task_arithmetic")
    plain.write_text(json.dumps(json.loads(plain.read_text()) | {"parameters": {"scale": 0.3}}))
    same = raw(load(fitted.path)) == raw(load(run(plain, "plain").path))
    assert same == (steps == 0)
    values = {w for row in learned(fitted.path).values() for w in row.values()}
    assert (values == {0.3}) == (steps == 0)
    assert fitted.report["fit"]["steps"] == steps


def test_the_entropy_falls_and_the_bounds_hold(tmp_path: Path, zoo: dict[str, Any]) -> None:
    file = written(tmp_path, zoo, parameters={"steps": 40, "rate": 0.05, "batch": 6})
    result = run(file)
    assert "coefficients.json" in (result.path / "README.md").read_text()
    for task in result.report["fit"]["tasks"].values():
        assert task["entropy_last"] < task["entropy_first"]
    values = [w for row in learned(result.path).values() for w in row.values()]
    assert min(values) == 0.0 and max(values) == 1.0


def test_coefficients_of_zero_are_the_base_and_of_one_the_expert(
    tmp_path: Path, zoo: dict[str, Any]
) -> None:
    given = {"steps": 0, "weight": {"pets": 1, "sky": 0, "sea": 0}}
    one = load(run(written(tmp_path, zoo, parameters=given)).path)
    none = load(run(written(tmp_path, zoo, parameters={"steps": 0, "weight": 0})).path)
    assert raw(none) == raw(load(tmp_path / "base"))
    expert = load(tmp_path / "pets")
    for name, value in one.items():
        theirs = next(v for k, v in expert.items() if k.partition(".")[2] == name)
        assert torch.allclose(value, theirs, atol=1e-6)


def test_an_expert_that_is_the_base_stays_where_it_started(store: Path, tmp_path: Path) -> None:
    tasks = vits(store, tmp_path)
    base = ViTModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    model = ViTForImageClassification.from_pretrained(tmp_path / "sky")
    model.vit.load_state_dict(base.state_dict())
    model.save_pretrained(tmp_path / "sky")
    rows = learned(run(written(tmp_path, tasks)).path)
    assert {row["sky"] for row in rows.values()} == {0.3}
    assert {row["pets"] for row in rows.values()} != {0.3}


def test_experts_in_another_order_have_their_coefficients_with_them(
    tmp_path: Path, zoo: dict[str, Any]
) -> None:
    order = list(reversed(LABELS))
    rows = learned(run(written(tmp_path, zoo)).path)
    file = written(tmp_path, zoo, models={n: f"./{n}" for n in order})
    moved = learned(run(file, "moved").path)
    assert list(next(iter(moved.values()))) == order
    for name, row in rows.items():
        if not name.endswith("key.bias"):  # softmax takes no notice of it: Adam follows roundings
            assert moved[name] == pytest.approx(row, abs=1e-4)


def test_an_expert_given_twice_has_equal_gradients(tmp_path: Path, zoo: dict[str, Any]) -> None:
    models = {n: f"./{n}" for n in LABELS} | {"again": "./sky"}
    rows = learned(run(written(tmp_path, zoo, models=models)).path)
    assert all(row["again"] == pytest.approx(row["sky"], abs=1e-6) for row in rows.values())


def test_one_coefficient_a_model(tmp_path: Path, zoo: dict[str, Any]) -> None:
    rows = learned(run(written(tmp_path, zoo, parameters={"granularity": "task"})).path)
    assert len({tuple(row.values()) for row in rows.values()}) == 1
    assert len(set(next(iter(rows.values())).values())) == len(LABELS)


def test_all_kept_and_of_one_sign_the_two_methods_are_one(store: Path, tmp_path: Path) -> None:
    tasks = vits(store, tmp_path)
    base = ViTModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    torch.manual_seed(1)
    signs = {n: torch.randn_like(p).sign() for n, p in base.named_parameters()}
    for name in LABELS:
        model = ViTForImageClassification.from_pretrained(tmp_path / name)
        for key, value in model.vit.named_parameters():
            value.data = base.get_parameter(key) + 0.1 * torch.rand_like(value) * signs[key]
        model.save_pretrained(tmp_path / name)
    plain = learned(run(written(tmp_path, tasks)).path)
    file = written(tmp_path, tasks, method="adamerging_pp", parameters={"density": 1})
    both = learned(run(file).path)
    for name, row in plain.items():
        assert both[name] == pytest.approx(row, abs=1e-6)


# --- bytes and what is written


@pytest.mark.parametrize("method", ["adamerging", "adamerging_pp"])
def test_two_runs_and_a_replay_write_the_same_bytes(
    tmp_path: Path, zoo: dict[str, Any], method: str
) -> None:
    first = run(written(tmp_path, zoo, method=method), "first").path
    second = run(written(tmp_path, zoo, method=method), "second", workers=2).path
    assert (first / "SHA256SUMS").read_text() == (second / "SHA256SUMS").read_text()
    assert "  coefficients.json\n" in (first / "SHA256SUMS").read_text()
    file = written(
        tmp_path, zoo, "replay", method=method, tasks=None, coefficients="first/coefficients.json"
    )
    third = run(file, "third")
    assert raw(load(third.path)) == raw(load(first))
    same = [(f / "coefficients.json").read_bytes() for f in (first, third.path)]
    assert same[0] == same[1]
    assert "fit" not in third.report


def test_a_fit_that_was_done_is_not_done_again(
    tmp_path: Path, zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, zoo)
    wanted = run(file, "wanted")

    def cut(*args: Any) -> None:
        raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", cut)
        with pytest.raises(RuntimeError, match="cut off"):
            api.merge(file, tmp_path / "out", resume=True)
    changed = written(tmp_path, zoo, "changed", parameters={"steps": 4})
    with pytest.raises(ResourceError, match=r"parameters.steps was 3, is 4"):
        api.merge(changed, tmp_path / "out", resume=True)
    monkeypatch.setattr(fit, "fit", cut)
    taken = api.merge(file, tmp_path / "out", resume=True)
    assert raw(load(taken.path)) == raw(load(wanted.path))
    name = "coefficients.json"
    assert (taken.path / name).read_bytes() == (wanted.path / name).read_bytes()
    for report in (taken.report, wanted.report):
        report["fit"].pop("seconds")
    assert taken.report["fit"] == wanted.report["fit"]
    assert taken.report["warnings"] == wanted.report["warnings"]
    again = api.merge(taken.path / "recipe.lock.yaml", tmp_path / "again", locked=True)
    assert again.report["replay"]["outcome"] == "same bytes"


def test_what_is_written_down(tmp_path: Path, zoo: dict[str, Any]) -> None:
    result = run(written(tmp_path, zoo))
    content = json.loads((result.path / "coefficients.json").read_text())
    assert content["version"] == 1 and content["methods"] == ["adamerging"]
    assert content["models"] == list(LABELS)
    assert content["uses_test_inputs"] is False
    samples = content["data"]["pets"]
    assert (samples["split"], samples["count"], samples["expert"]) == ("train", 12, "pets")
    assert len(samples["sha256"]) == 64
    assert content["tensors"].keys() == load(result.path).keys()
    assert content["without_gradient"] == []
    line = next(t for t in result.report["tensors"] if t["action"] == "merged")
    assert line["parameters"]["weight"] == tuple(content["tensors"][line["name"]].values())
    assert mowmerge.load(result.path, task="sky").config.num_labels == 2


def test_rules_may_leave_tensors_to_another_method(tmp_path: Path, zoo: dict[str, Any]) -> None:
    rules = [{"match": {"role": "norm"}, "method": "linear"}]
    result = run(written(tmp_path, zoo, rules=rules))
    by_method: dict[str, set[str]] = {}
    for tensor in result.report["tensors"]:
        by_method.setdefault(tensor["method"], set()).add(tensor["name"])
    assert by_method["adamerging"] == set(learned(result.path))
    assert len(by_method["linear"]) > 4


def test_a_fitted_method_in_a_rule_is_recognised(tmp_path: Path, zoo: dict[str, Any]) -> None:
    rules = [{"match": {"role": "mlp"}, "method": "adamerging_pp", "parameters": {"steps": 2}}]
    file = written(tmp_path, zoo, method="task_arithmetic", rules=rules)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"parameters": {}}))
    result = run(file)
    assert result.report["fit"]["methods"] == ["adamerging_pp"]
    assert all("mlp" in n or "intermediate" in n or "output" in n for n in learned(result.path))


# --- the rest of a dynamic merge


def _mow(folder: Path, of: dict[str, Any], name: str = "recipe", **changed: Any) -> Path:
    file = written(folder, of, name, method="mow")
    content = json.loads(file.read_text()) | {"parameters": {"blocks": 1}} | changed
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}, indent=1))
    return file


def test_the_rest_of_mow_is_fitted_where_the_tasks_have_data(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tasks = vits(store, tmp_path)
    planned = api.plan(_mow(tmp_path, tasks))
    assert planned.rest == "adamerging_pp, not task_arithmetic: the tasks have data for it"
    assert planned.fit is not None
    assert planned.fit.steps == 500
    rest = {"method": "adamerging_pp", "parameters": {"steps": 2}}
    named = api.plan(_mow(tmp_path, tasks, rest=rest))
    assert named.rest == "adamerging_pp"
    assert named.fit is not None
    out = run(_mow(tmp_path, tasks, rest=rest), "named").path
    again = _mow(tmp_path, tasks, "again", tasks=None, coefficients="named/coefficients.json")
    assert api.plan(again).rest.endswith("not task_arithmetic: its coefficients are given")
    replayed = run(again, "again").path
    for file in ("model-00001-of-00001.safetensors", "dynamic-00001-of-00001.safetensors"):
        assert (out / file).read_bytes() == (replayed / file).read_bytes()
    for merge in (out, replayed):
        locked = api.merge(merge / "recipe.lock.yaml", tmp_path / f"{merge.name}-2", locked=True)
        assert locked.report["replay"]["outcome"] == "same bytes"
        assert "fit" not in locked.report
    static = api.plan(_mow(tmp_path, tasks, rest={"method": "task_arithmetic"}))
    assert (static.rest, static.fit) == ("task_arithmetic", None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.pop("tasks"), "there are no tasks"),
        (lambda c: c["tasks"].pop("sky"), "model 'sky' has no task"),
        (lambda c: c["tasks"]["sky"].update(type="causal-lm"), "task 'sky' is no classification"),
        (lambda c: c["tasks"]["sky"]["splits"].pop("router"), "task 'sky' has no router split"),
    ],
)
def test_the_rest_of_mow_is_task_arithmetic_where_they_have_none(
    store: Path, tmp_path: Path, change: Callable[[Any], Any], why: str
) -> None:
    file = _mow(tmp_path, vits(store, tmp_path))
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    planned = api.plan(file)
    assert planned.rest == f"task_arithmetic, not adamerging_pp: {why}"
    assert planned.fit is None
    assert completed(api.check(file))["rest"]["method"] == "task_arithmetic"


# --- faults


def test_what_check_says(store: Path, tmp_path: Path) -> None:
    tasks = vits(store, tmp_path)
    for changed, message in (
        ({"tasks": None}, r"(?s):\d+: 'adamerging' is fitted on data, and the recipe has no tasks.*"
                          r"coefficients: OUT/coefficients\.json"),
        ({"method": "linear", "parameters": None, "coefficients": "x"}, "no method of the"),
        ({"method": "mow", "parameters": None, "tasks": None,
          "rest": {"method": "adamerging"}}, "'adamerging' is fitted on data, and .* no tasks"),
        ({"method": "wemoe", "parameters": None, "coefficients": "x"}, "no method of the"),
        ({"coefficients": "nowhere.json"}, r":\d+: 'nowhere\.json' cannot be read"),
        ({"coefficients": "base/config.json"}, "holds no coefficients"),
    ):  # fmt: skip
        file = written(tmp_path, tasks)
        content = json.loads(file.read_text()) | changed
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}, indent=1))
        with pytest.raises(RecipeError, match=message):
            api.plan(file)
    file = written(tmp_path, tasks)
    content = json.loads(file.read_text())
    del content["tasks"]["sky"]["splits"]["router"]
    content["tasks"]["sea"]["type"] = "causal-lm"
    file.write_text(json.dumps(content, indent=1))
    with pytest.raises(
        RecipeError, match=r"(?s):\d+: .*task 'sky' names none.*splits: \{router"
    ) as e:
        api.check(file)
    assert "'sea' is a causal-lm task" in str(e.value)


def test_coefficients_of_another_merge_are_refused(store: Path, tmp_path: Path) -> None:
    tasks = vits(store, tmp_path)
    out = run(written(tmp_path, tasks)).path
    held = json.loads((out / "coefficients.json").read_text())
    first = next(iter(held["tensors"]))
    for change, message in (
        (lambda c: c["tensors"].pop(first), f"tensors of one only: {first}"),
        (lambda c: c["tensors"][first].pop("sky"), "has them for the models pets, sea"),
        (lambda c: c["tensors"][first].update(sky=1.5), r"one must be 0\.\.1"),
        (lambda c: c.update(methods=["adamerging_pp"]), "of adamerging_pp, not of adamerging"),
        (lambda c: c.update(version=2), "version"),
    ):
        content = json.loads(json.dumps(held))
        change(content)
        (tmp_path / "c.json").write_text(json.dumps(content))
        with pytest.raises(RecipeError, match=message):
            api.plan(written(tmp_path, tasks, coefficients="c.json"))


def test_what_the_fit_refuses(store: Path, tmp_path: Path) -> None:
    tasks = vits(store, tmp_path)
    file = written(tmp_path, tasks)
    content = json.loads(file.read_text())
    content["tasks"]["pets"]["splits"] = {"router": "train", "eval": "train"}
    file.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="share 12 sample"):
        run(file)
    assert not (tmp_path / "out").exists()
    rules = [{"match": {"role": "mlp"}, "parameters": {"steps": 7}}]
    with pytest.raises(RecipeError, match="must be the same for all tensors"):
        api.plan(written(tmp_path, tasks, rules=rules))
    with pytest.raises(ResourceError, match="too little"):
        api.plan(written(tmp_path, tasks), options=Options(max_memory=400 << 20))
    inner = {"source": json.loads(written(tmp_path, tasks).read_text())}
    outer = {"version": 1, "models": {"x": inner}, "method": "passthrough"}
    (tmp_path / "outer.yaml").write_text(json.dumps(outer))
    with pytest.raises(RecipeError, match="nested recipe 'x' is to be fitted"):
        api.plan(tmp_path / "outer.yaml")
    model = ViTForImageClassification.from_pretrained(tmp_path / "sky")
    model.classifier.bias.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "sky")
    with pytest.raises(CheckpointError, match="step 1 of the fit: the entropy of task 'sky'"):
        run(written(tmp_path, tasks))


def test_test_inputs_and_models_without_a_task_are_said(store: Path, tmp_path: Path) -> None:
    tasks = vits(store, tmp_path)
    file = written(tmp_path, {"pets": tasks["pets"]})
    content = json.loads(file.read_text())
    content["tasks"]["pets"]["splits"] = {"router": "test"}
    file.write_text(json.dumps(content))
    result = run(file)
    assert json.loads((result.path / "coefficients.json").read_text())["uses_test_inputs"] is True
    said = " ".join(result.report["warnings"])
    assert "task 'pets': fitted on the split 'test'" in said
    assert "model 'sky' has no task" in said and "model 'pets' has no task" not in said


def test_predictions_of_one_class_are_a_warning(store: Path, tmp_path: Path) -> None:
    tasks = vits(store, tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path / "sky")
    model.classifier.bias.data = torch.tensor([0.0, 50.0])
    model.save_pretrained(tmp_path / "sky")
    result = run(written(tmp_path, tasks))
    assert any("task 'sky': 100% of the fit's last" in w for w in result.report["warnings"])
    assert any("'clear'" in w for w in result.report["warnings"])


def test_the_command_says_what_it_will_fit_and_how_it_goes(store: Path, tmp_path: Path) -> None:
    tasks = vits(store, tmp_path)
    written(tmp_path, tasks)
    zoo = Zoo(tmp_path)
    ran = zoo.here("merge", "recipe.yaml", "--dry-run")
    assert "a fit pass comes first" in ran.out and "3 steps, 12 samples of each of 3" in ran.out
    ran = zoo.here("merge", "recipe.yaml", "--dry-run", "--json")
    assert json.loads(ran.out)["fit"]["steps"] == 3
    ran = zoo.here("merge", "recipe.yaml", "out")
    assert ran.rc == 0, ran.err
    assert "fit: step 3 of 3, mean entropy" in ran.err
    assert zoo.here("merge", "recipe.yaml", "out", "--force", "--quiet").err == ""
    assert not {"fit", "step"} & set(ran.out.split())


def test_entropy_by_hand() -> None:
    even, sure = fit.entropy(torch.tensor([[1.0, 1.0], [1000.0, -1000.0]])).tolist()
    assert even == pytest.approx(0.6931472) and sure == 0.0


def test_the_order_is_the_seeds_and_goes_round() -> None:
    draw = fit.order(3, "a", 5)
    first, second = ([next(draw) for _ in range(5)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(5)) and first != second
    again = fit.order(3, "a", 5)
    assert [next(again) for _ in range(10)] == first + second
