"""The real zoo, built once: what its experts, merges and oracles have to reach, and its bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor

import mowmerge
from mowmerge import api
from mowmerge.demo import zoo
from mowmerge.demo.images import TASKS
from mowmerge.evals import evaluator
from mowmerge.tasks import heads, inputs
from mowmerge.tasks.metrics import METRICS
from mowmerge.tasks.splits import load_apart
from tests.zoo import Zoo

pytestmark = pytest.mark.slow
By = Mapping[str, float]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import datasets.config

    folder = tmp_path_factory.mktemp("real")
    zoo.build(folder / "zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder / "zoo"


@pytest.fixture(scope="module")
def table(real: Path) -> Mapping[str, By]:
    """Model -> task -> score, of what the demo shows."""
    rows: dict[str, dict[str, float]] = {}
    for score in api.demo(real).scores:
        rows.setdefault(score.row, {})[score.task] = score.value
    return rows


def test_experts_know_their_tasks(table: Mapping[str, By]) -> None:
    assert list(table["expert"]) == list(TASKS)
    assert min(table["expert"].values()) >= 0.94
    assert fmean(table["expert"].values()) >= 0.95


def test_the_plain_average_loses_much(table: Mapping[str, By]) -> None:
    lost = fmean(table["expert"].values()) - fmean(table["linear"].values())
    assert 0.12 <= lost <= 0.30


def test_json_is_one_object_and_says_nothing_else(real: Path) -> None:
    ran = Zoo(real.parent).here("demo", real, "--json")
    assert ran.rc == 0 and ran.err == ""
    assert len(json.loads(ran.out)["scores"]) == len(TASKS) * (2 + 3 + 3 + 2)


def test_routers_keep_what_static_merges_lose(table: Mapping[str, By]) -> None:
    expert = table["expert"]

    def normalised(row: str) -> float:
        return fmean(value / expert[task] for task, value in table[row].items())

    assert normalised("mow") >= 0.93 > 0.88 > normalised("ties")
    assert normalised("wemoe, task given") >= 0.93


def test_the_best_task_arithmetic_is_above_chance_everywhere(real: Path, tmp_path: Path) -> None:
    """The scale, too, is what validation says, and it is the one of the demo's recipe."""
    scales = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
    outs = {f"{scale}": tmp_path / f"{scale}" for scale in scales}
    file = real / "task_arithmetic.yaml"
    for scale, out in outs.items():
        api.merge(file, out, overrides=[f"parameters.scale={scale}"])
    picked = tmp_path / "select.yaml"
    text = file.read_text().replace(" ./", f" {real}/")
    picked.write_text(text.replace("select: validation, eval: test", "eval: validation"))
    means = {
        row["model"]: row["mean"]
        for row in evaluator.table(api.evaluate(outs, picked, against=()).scores)
    }
    best = max(means, key=lambda scale: means[scale])
    assert f"scale: {best}}}" in file.read_text(), means
    for score in api.evaluate(outs[best], file, against=()).scores:
        chance = max(score.true.count(c) for c in set(score.true)) / len(score.true)
        assert score.value > chance, score.task


def oracle(real: Path, mix: Callable[[str, Tensor, Tensor], Tensor]) -> By:
    """Accuracy by task of `mix` of each tensor of task arithmetic's and of the true expert's."""
    recipe, found = api.check(real / "task_arithmetic.yaml"), {}
    for task in TASKS:
        model = mowmerge.load(real / "merged/task_arithmetic", task=task)
        expert = heads.load(real / task, None).state_dict()
        static = model.state_dict()
        model.load_state_dict({name: mix(name, static[name], expert[name]) for name in static})
        items = load_apart(recipe, task, ["eval"])["eval"]
        predicted, processor = list[int](), zoo.processor()
        for start in range(0, len(items), 64):
            some = [items.input(i) for i in range(start, min(start + 64, len(items)))]
            with torch.inference_mode():
                logits = model(**inputs.encode(processor, some, model.config)).logits
            predicted += logits.argmax(-1).tolist()
        found[task] = METRICS["accuracy"](predicted, items.labels(model.config.label2id))
    return found


def mlp_only(name: str, static: Tensor, expert: Tensor) -> Tensor:
    return expert if ".mlp." in name else static


def rank_25(name: str, static: Tensor, expert: Tensor) -> Tensor:
    """The static tensor and the exclusive part of the expert's, matrices at a quarter of rank."""
    if static.ndim != 2:
        return expert
    left, sizes, right = torch.linalg.svd(expert - static, full_matrices=False)
    kept = max(1, len(sizes) // 4)
    return static + (left[:, :kept] * sizes[:kept]) @ right[:kept]


@pytest.mark.parametrize(("mix", "share"), [(mlp_only, 0.97), (rank_25, 0.99)])
def test_gates_on_the_true_task_give_the_experts_back(
    real: Path, table: Mapping[str, By], mix: Callable[..., Tensor], share: float
) -> None:
    assert fmean(oracle(real, mix).values()) >= share * fmean(table["expert"].values())


def test_a_second_zoo_has_the_same_bytes(real: Path, tmp_path: Path) -> None:
    zoo.build(tmp_path / "zoo")
    files = [
        p.relative_to(real) for p in real.rglob("*") if p.suffix in (".safetensors", ".parquet")
    ]
    files = [file for file in files if file.parts[0] != "merged"]
    assert len(files) == 1 + 2 * len(TASKS) + 3 * len(TASKS)
    changed = [f for f in files if (real / f).read_bytes() != (tmp_path / "zoo" / f).read_bytes()]
    assert changed == []
