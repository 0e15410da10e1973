"""train-router end to end: what is learned, what is left alone, what is refused."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mowmerge import api
from mowmerge.dynamic import beside, modeling
from mowmerge.dynamic.format import FORMAT
from mowmerge.errors import CheckpointError, MowmergeError, RecipeError, ResourceError, SourceError
from mowmerge.training import desk as desks
from mowmerge.training import loop
from mowmerge.training.mixture import Mixture
from mowmerge.training.settings import Options
from tests.training.checkpoints import EXPERTS, Made, routers, verified

Make = Callable[..., Made]
QUICK = Options(steps=40, batch=8)


def log(out: Path) -> list[dict[str, str]]:
    with (out / "router_log.csv").open() as stream:
        return list(csv.DictReader(stream))


def column(out: Path, name: str) -> list[float]:
    return [float(row[name]) for row in log(out) if row[name]]


@pytest.mark.parametrize("which", ["linear", "twin", "statistics", "centroid", "token", "bert"])
def test_a_classifier_tells_tasks_apart_that_can_be_told_apart(make: Make, which: str) -> None:
    made = make(which)
    before = made.bytes()
    options = Options(steps=60, batch=8, lr=0.01) if which == "token" else Options()
    result = api.train_router(made.out, made.recipe, options)
    name = "select_accuracy" if which == "token" else "accuracy"
    assert result.report["metrics"][name] == 1.0
    if which != "centroid":
        losses = column(made.out, "loss")
        assert losses[-1] < 0.3 * losses[0] < 0.4
    loss = column(made.out, "select_loss")
    assert loss[-1] < 0.3 or which == "centroid"
    after = made.bytes()
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"router.safetensors", "router_log.csv", "report.json", "SHA256SUMS"}
    assert "router.safetensors" in verified(made.out)
    report = json.loads(after["report.json"])
    assert report["recipe"] == "r"
    assert report["router"] == result.report
    assert report["router"]["tasks"]["ta"]["router"] == {"split": "train", "samples": 24}
    assert not list(made.out.parent.glob(".out*"))


@pytest.mark.parametrize("which", ["linear", "statistics"])
def test_the_trained_model_routes_what_it_never_saw(make: Make, which: str) -> None:
    """Through the model as a user loads it: the classifier says which task an eval sample is of."""
    from transformers import AutoImageProcessor

    from mowmerge.tasks.data import load

    made = make(which)
    api.train_router(made.out, made.recipe)
    model = modeling.FRONTS["ForImageClassification"].from_pretrained(made.out)
    processor = AutoImageProcessor.from_pretrained(made.out, backend="pil")
    recipe = api.check(made.recipe)
    for k, name in enumerate(EXPERTS):
        items = load(recipe, f"t{name}", "eval", labelled=False)
        given = processor([items.input(i) for i in range(len(items))], return_tensors="pt")
        with torch.no_grad():
            assert model(**given).task.tolist() == [k] * len(items)


def test_a_centroid_router_is_the_mean_of_each_tasks_features(make: Make) -> None:
    made = make("centroid")
    result = api.train_router(made.out, made.recipe)
    assert result.report["steps"] == 0
    model = modeling.FRONTS["ForImageClassification"].from_pretrained(made.out)
    from transformers import AutoImageProcessor

    from mowmerge.tasks.data import load

    items = load(api.check(made.recipe), "tb", "router", labelled=False)
    processor = AutoImageProcessor.from_pretrained(made.out, backend="pil")
    given = processor([items.input(i) for i in range(len(items))], return_tensors="pt")
    mean = model.features(1, **given).mean((0, 1))
    torch.testing.assert_close(routers(made.out)["mow_router.r0.centroids"][1], mean)


def test_entropy_falls_and_the_anchor_stays(make: Make) -> None:
    made = make("wemoe")
    before = made.bytes()
    result = api.train_router(made.out, made.recipe, QUICK)
    select = column(made.out, "select_loss")
    assert min(select) < 0.7 * select[0]
    assert result.report["kept_step"] > 0
    assert set(result.report["metrics"]["predictions"]) == {"ta", "tb", "tc"}
    after = made.bytes()
    assert all(after[n] == before[n] for n in before if n[:5] in ("model", "dynam", "confi"))
    names = {f"mow_router.r{i}.{p}" for i in (0, 1) for p in _MLP}
    assert set(routers(made.out)) == names


_MLP = ("first.weight", "first.bias", "last.weight", "last.bias", "temperature")


def test_entropy_takes_the_head_of_the_samples_task_and_leaves_gates_free(make: Make) -> None:
    """The loss of step 0 is the entropy of head k on task k, the gates at the router's own."""
    made = make("wemoe")
    _, job = _job(made, Options(batch=8))
    loss = job.judge().figures["select_loss"]
    model, processor = job._model, job._processor["image-classification"]
    expected = 0.0
    for k, sample in enumerate(job._samples):
        items = sample.select
        assert items is not None
        given = processor([items.input(i) for i in range(len(items))], return_tensors="pt")
        with torch.no_grad():
            out = model(**given, head_ids=torch.full((len(items),), k))
            p = torch.softmax(out.logits[:, : (3, 4, 5)[k]], -1)
        assert out.task.tolist() == [k] * len(items)
        assert (out.gates - 0.3).abs().max() < 0.05
        expected += float(torch.special.entr(p).sum(-1).mean())
    assert loss == pytest.approx(expected, rel=1e-5)


def _job(made: Made, options: Options) -> tuple[Any, Mixture]:
    from mowmerge.training import checkpoint, processes, train
    from mowmerge.training.mixture import Mixture

    held, asked, given = train._prepared(made.out, api.check(made.recipe), options)
    model = checkpoint.model(made.out, held, bf16=False)
    tools = {given[0].type: train._processor(made.out, given[0].type)}
    return asked, Mixture(model, tools, given, asked, processes.begin("cpu"))


def test_a_batch_in_parts_has_the_gradient_of_the_whole(make: Make) -> None:
    gradients = []
    for parts in (1, 3):
        _, job = _job(make("shared", f"-{parts}"), Options(batch=8, accumulate=parts))
        loss = job.loss(0)
        gradients.append([p.grad for p in job.routers.parameters() if p.requires_grad])
        gradients[-1].append(torch.tensor(loss))
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None
        grain = 2e-3 * float(other.abs().max())  # logits here are hundreds: rounding in fp32 shows
        torch.testing.assert_close(one, other, rtol=1e-4, atol=grain)


def test_the_gradient_of_a_router_is_that_of_finite_differences(make: Make) -> None:
    _, job = _job(make("wemoe"), Options(batch=4))
    job.loss(0)
    bias = job.routers["r0"].last.bias
    assert bias.grad is not None
    for i in range(3):
        ends = []
        for move in (1e-2, -2e-2):
            bias.data[i] += move
            ends.append(job.loss(0))
        bias.data[i] += 1e-2
        job.routers.zero_grad()
        job.loss(0)
        assert float(bias.grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=1e-3)


def test_distillation_finds_the_expert_of_each_text(make: Make) -> None:
    """With every tensor dynamic the expert's own gates make the divergence 0."""
    made = make("llama")
    result = api.train_router(made.out, made.recipe, Options(steps=30, lr=0.1, batch=8))
    select = column(made.out, "select_loss")
    assert select[-1] < 0.5 * select[0]
    assert result.report["objective"] == "distill"


def test_next_token_loss_falls(make: Make) -> None:
    made = make("llama")
    api.train_router(made.out, made.recipe, Options("lm", steps=10, lr=0.02, batch=24))
    losses = column(made.out, "loss")  # a batch is the whole split
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("which", ["linear", "wemoe"])
def test_the_seed_decides_every_byte(make: Make, which: str) -> None:
    found = []
    for copy, seed in (("", 0), ("-again", 0), ("-other", 1)):
        made = make(which, copy)
        for _ in range(1 + (copy == "-again")):  # what the file held before does not matter
            api.train_router(made.out, made.recipe, Options(steps=8, batch=4, seed=seed))
        found.append((made.bytes()["router.safetensors"], made.bytes()["router_log.csv"]))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


@pytest.mark.parametrize("which", ["twin", "wemoe"])
def test_an_interrupted_training_goes_on_to_the_same_loss(make: Make, which: str) -> None:
    whole, cut = make(which), make(which, "-cut")
    api.train_router(whole.out, whole.recipe, QUICK)
    before = cut.bytes()

    def begin(steps: int) -> loop.Tell:
        def tell(step: int, loss: float) -> None:
            if step == 23:
                raise KeyboardInterrupt

        return tell

    with pytest.raises(KeyboardInterrupt):
        api.train_router(cut.out, cut.recipe, QUICK, begin=begin)
    assert cut.bytes() == before
    with pytest.raises(CheckpointError, match="other settings"):
        api.train_router(cut.out, cut.recipe, replace(QUICK, resume=True, lr=0.5))
    steps: list[int] = []
    api.train_router(
        cut.out, cut.recipe, replace(QUICK, resume=True),
        begin=lambda n: lambda step, loss: steps.append(step),
    )  # fmt: skip
    assert steps[0] == 23  # the last look was after step 22
    assert cut.bytes()["router_log.csv"] == whole.bytes()["router_log.csv"]
    assert cut.bytes()["router.safetensors"] == whole.bytes()["router.safetensors"]


def test_every_moment_of_the_last_renames_is_true(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("centroid")
    api.train_router(made.out, made.recipe)  # there is a report on routers to be replaced
    old, real = routers(made.out), desks.os.replace
    options = Options(seed=1)
    tasks = made.tasks(seed=1, limit=20)
    for last in range(6):
        count = 0

        def cut(source: Any, target: Any, last: int = last) -> None:
            nonlocal count
            if Path(target).parent == made.out.resolve():
                if count == last:
                    raise KeyboardInterrupt
                count += 1
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(desks.os, "replace", cut)
            with pytest.raises(KeyboardInterrupt):
                api.train_router(made.out, tasks, options)
        verified(made.out)
        report = json.loads((made.out / "report.json").read_text())
        if "router" in report:
            assert report["router"]["sha256"] == desks._sha256(made.bytes()["router.safetensors"])
    assert any(not torch.equal(routers(made.out)[n], old[n]) for n in old)
    api.train_router(made.out, tasks, options)
    assert "router.safetensors" in verified(made.out)
    assert not list(made.out.parent.glob(".out*"))


def test_a_loss_that_is_not_finite_leaves_everything(make: Make) -> None:
    made = make("wemoe")
    anchor = load_file(made.out / "model-00001-of-00001.safetensors")
    anchor["layernorm.weight"][0] = math.nan
    save_file(anchor, made.out / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    before = made.bytes()
    with pytest.raises(CheckpointError, match="loss is nan at step 1.*left as it was"):
        api.train_router(made.out, made.recipe, QUICK)
    assert made.bytes() == before
    assert not list(made.out.parent.glob(".out*"))


class Falling:
    """A job whose entropy falls because everything becomes one class."""

    def __init__(self, good: int) -> None:
        self.routers = torch.nn.ModuleDict({"r": torch.nn.Linear(1, 1)})
        self._looks, self._good = 0, good

    def loss(self, step: int) -> float:
        loss = self.routers["r"].weight.sum()
        loss.backward()
        return loss.item()

    def judge(self) -> loop.Judgement:
        self._looks += 1
        gone = self._looks > self._good
        return loop.Judgement(1.0 / self._looks, {}, "99 % are one class" if gone else "")


def test_a_collapse_keeps_the_best_or_says_so(make: Make) -> None:
    made = make("wemoe")
    asked, _ = _job(made, QUICK)
    with desks.Desk(made.out, resume=False) as desk:
        with pytest.raises(CheckpointError, match="collapsed at step 2, before"):
            loop.run(Falling(1), asked, desk, "", lambda step, loss: None)
        done = loop.run(Falling(4), asked, desk, "", lambda step, loss: None)
    assert (done.step, done.kept) == (8, 6)
    assert done.collapsed


def test_the_guard_sees_one_class_for_everything(make: Make) -> None:
    _, job = _job(make("wemoe"), Options(batch=8))
    heads = job._model.mow_heads
    with torch.no_grad():
        for head in heads:
            head.weight.mul_(8)  # confident predictions of several classes
    job._first = [(1.0, 0.4)] * 3
    with torch.no_grad():
        heads[1].bias[2] = 1000.0
    verdict = job.judge()
    assert "100% of the samples of task 't" in verdict.collapsed
    assert verdict.figures["top_class_share"] == 1.0


def test_nobody_else_may_train_the_same_folder(make: Make) -> None:
    made = make("centroid")
    with desks.Desk(made.out, resume=False), pytest.raises(ResourceError, match="is running"):
        api.train_router(made.out, made.recipe)


def test_without_a_select_split_that_is_said(make: Make) -> None:
    made = make("linear")
    tasks = made.tasks(splits={"router": "train"})
    result = api.train_router(made.out, tasks, QUICK)
    assert "no select split for ta, tb, tc" in result.report["notes"][0]
    assert float(routers(made.out)["mow_router.r0.temperature"]) == 1.0


def test_bf16_trains_through_mixed_weights(make: Make) -> None:
    made = make("wemoe")
    result = api.train_router(made.out, made.recipe, replace(QUICK, steps=10, bf16=True))
    select = column(made.out, "select_loss")
    assert result.report["bf16"] and min(select) < select[0]
    assert all(t.dtype == torch.float32 for t in routers(made.out).values())


def test_the_router_file_says_whose_it_is(make: Make) -> None:
    made = make("centroid")
    api.train_router(made.out, made.recipe)
    with safe_open(made.out / "router.safetensors", "pt") as file:
        told = file.metadata()
    assert told["trained"] == "true" and json.loads(told["experts"]) == list(EXPERTS)
    assert told["weights"] == beside.digest(made.out)
    assert oct((made.out / "router.safetensors").stat().st_mode)[-3:] != "600"


def _other_shape(made: Made) -> None:
    held = routers(made.out)
    held["mow_router.r0.last.weight"] = torch.zeros(4, 16)
    save_file(held, made.out / "router.safetensors")


def _other_experts(made: Made) -> None:
    save_file(routers(made.out), made.out / "router.safetensors", {"experts": '["x", "y", "z"]'})


def _newer(made: Made) -> None:
    config = json.loads((made.out / "config.json").read_text())
    config["mowmerge"]["format"] = FORMAT + 1
    (made.out / "config.json").write_text(json.dumps(config))


def _plain(made: Made) -> None:
    (made.out / "config.json").write_text('{"model_type": "vit"}')


FAULTS: dict[str, tuple[str, Callable[[Made], None], type[MowmergeError], str]] = {
    "shape": ("linear", _other_shape, CheckpointError, "last.weight' is .4, 16. in it and .3, 16."),
    "experts": ("linear", _other_experts, CheckpointError, "other experts: x, y, z"),
    "newer": ("linear", _newer, CheckpointError, f"reads up to {FORMAT}"),
    "plain": ("linear", _plain, CheckpointError, "no dynamic checkpoint"),
    "no router": ("emr", lambda made: None, CheckpointError, "no router to train: the caller says"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_cannot_be_trained_is_refused(make: Make, fault: str) -> None:
    which, spoil, kind, message = FAULTS[fault]
    made = make(which)
    spoil(made)
    before = made.bytes()
    with pytest.raises(kind, match=message):
        api.plan_training(made.out, made.recipe)
    assert made.bytes() == before


def test_a_recipe_that_cannot_serve_is_refused_with_every_fault(make: Make) -> None:
    made = make("linear")
    content = json.loads(made.recipe.read_text())
    content["models"]["d"] = "./d"
    content["tasks"]["ta"]["expert"] = "d"
    content["tasks"]["tb"]["splits"] = {"eval": "test"}
    made.recipe.write_text(json.dumps(content))
    with pytest.raises(RecipeError) as caught:
        api.plan_training(made.out, made.recipe)
    said = [problem.message for problem in caught.value.problems]
    assert said[0].startswith("the checkpoint has no expert 'd'")
    assert said[1] == "task 'tb' has no split for routers"
    assert said[2].startswith("expert 'a' has no task")


def test_other_faults_of_tasks_are_told(make: Make) -> None:
    made = make("wemoe")
    with pytest.raises(RecipeError, match="share 24 sample"):
        api.plan_training(made.out, made.tasks(splits={"router": "train", "eval": "train"}))
    with pytest.raises(RecipeError, match="has no split 'nope'"):
        api.plan_training(made.out, made.tasks(splits={"router": "nope"}))
    with pytest.raises(RecipeError, match="which 'entropy' cannot learn from"):
        api.plan_training(made.out, made.tasks(type="causal-lm"))
    with pytest.raises(RecipeError, match="look at each block's tokens"):
        api.plan_training(made.out, made.recipe, Options("task"))
    content = json.loads(made.recipe.read_text()) | {"tasks": {}}
    made.recipe.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="has no tasks"):
        api.plan_training(made.out, made.recipe)
    with pytest.raises(SourceError, match="no folder"):
        api.plan_training(made.out / "nope", made.recipe)


@pytest.mark.parametrize(("rank", "words"), [
    ("", "nothing says which of them this is"),
    ("0", "accelerate sees 1"),
])  # fmt: skip
def test_fewer_processes_than_world_size_are_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch, rank: str, words: str
) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)  # of one process, whatever ran before
    made = make("linear")
    before = made.bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(ResourceError, match=f"WORLD_SIZE says 2 processes, and {words}"):
        api.train_router(made.out, made.recipe)
    assert made.bytes() == before
