"""Experts on the tasks of others: with whose head, what is blank, and what is forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from mowmerge import api
from mowmerge.evals import markdown, page
from mowmerge.evals.score import Evaluation
from mowmerge.evals.settings import Options
from tests.evals.making import lms, rows
from tests.evals.making import recipe as written
from tests.evals.test_evaluator import LABELS, SIZES
from tests.evals.test_evaluator import recipe as recipe
from tests.zoo import Zoo

ALL = Options(experts="all")


def transplanted(folder: Path, trunk: str, head: str) -> Any:
    """An expert's backbone under another's head, by hand."""
    model = ViTForImageClassification.from_pretrained(folder / head)
    model.vit.load_state_dict(
        ViTForImageClassification.from_pretrained(folder / trunk).vit.state_dict()
    )
    return model.eval()


def by_hand(folder: Path, name: str, model: Any) -> list[float]:
    """The loss of each picture of a task, sorted."""
    processor = ViTImageProcessorPil.from_pretrained(folder / name)
    found = []
    for file in (folder / f"data-{name}").rglob("*.png"):
        with Image.open(file) as image, torch.inference_mode():
            given = processor(image.convert("RGB"), return_tensors="pt")
            logp = model(**given).logits[0].log_softmax(-1)
        found.append(-float(logp[LABELS[name].index(file.parent.name)]))
    return sorted(found)


def test_an_expert_on_anothers_task_has_that_tasks_head(tmp_path: Path, recipe: Path) -> None:
    found = api.evaluate(tmp_path / "out", recipe, options=ALL)
    plain = api.evaluate(tmp_path / "out", recipe)
    assert found.scores == plain.scores and not plain.crossed
    assert [cost.row for cost in found.costs] == [cost.row for cost in plain.costs]
    assert set(found.flags) == set(plain.flags) and set(found.models) == set(plain.models)
    crossed = {(s.row, s.task): s for s in found.crossed}
    assert set(crossed) == {("expert pets", "sky"), ("expert sky", "pets")}
    for (row, task), score in crossed.items():
        trunk = row.removeprefix("expert ")
        losses = by_hand(tmp_path, task, transplanted(tmp_path, trunk, task))
        assert sorted(score.nll) == pytest.approx(losses, abs=1e-6)
        own = next(s for s in found.scores if (s.row, s.task) == ("expert", task))
        assert max(abs(a - b) for a, b in zip(sorted(own.nll), losses, strict=True)) > 1e-3


@pytest.mark.parametrize("labels", [3, 5])  # as many as pets have, and as nobody has
def test_a_base_with_a_head_of_its_own_answers_by_those_of_the_experts(
    tmp_path: Path, recipe: Path, labels: int
) -> None:
    base = ViTForImageClassification(ViTConfig(**SIZES, num_labels=labels))
    base.vit.load_state_dict(ViTModel.from_pretrained(tmp_path / "base").state_dict(), strict=False)
    base.save_pretrained(tmp_path / "base")
    found = api.evaluate(tmp_path / "out", recipe)
    for task in LABELS:
        losses = by_hand(tmp_path, task, transplanted(tmp_path, "base", task))
        score = next(s for s in found.scores if (s.row, s.task) == ("base", task))
        assert sorted(score.nll) == pytest.approx(losses, abs=1e-6)


def test_the_report_says_what_each_forgot(tmp_path: Path, recipe: Path) -> None:
    found = api.evaluate(tmp_path / "out", recipe, options=ALL)
    made = api.report_on(found, tmp_path / "out", recipe)
    assert made.version == 2 and made.matrix is not None
    cells = {(c.expert, c.task): c for c in made.matrix.cells}
    values = {(s.row, s.task): s.value for s in [*found.scores, *found.crossed]}
    assert cells["pets", "pets"].own and not cells["pets", "sky"].own
    assert cells["pets", "pets"].value == values["expert", "pets"]
    pets = cells["sky", "pets"]
    assert pets.value == values["expert sky", "pets"]
    gap = values["expert sky", "pets"] - values["base", "pets"]
    assert pets.over_base == pytest.approx(gap)
    low, high = pets.over_base_interval or (1.0, -1.0)
    assert low <= gap <= high
    forgotten = {f.expert: f for f in made.matrix.forgetting}
    assert forgotten["sky"].tasks == ["pets"] and forgotten["sky"].signed == pytest.approx(gap)
    best = {b.task: b for b in made.matrix.best}["pets"]
    top = max(values["expert", "pets"], values["expert sky", "pets"])
    assert best.difference == pytest.approx(values["merged", "pets"] - top)
    text = page.render(made)
    assert 'id="matrix"' in text and "Every expert on every task" in markdown.render(made)
    items = json.loads((tmp_path / "out-eval/items.json").read_text())["tasks"]
    assert "expert sky" in items["pets"]["rows"]
    own = api.report_on(api.evaluate(tmp_path / "out", recipe), tmp_path / "out", recipe)
    assert own.matrix is None and 'id="matrix"' not in page.render(own)
    old = json.loads(own.model_dump_json()) | {"version": 1}
    del old["matrix"]
    assert type(own).model_validate(old).matrix is None


def test_language_models_are_asked_whole_held_out_tasks_too(tmp_path: Path) -> None:
    lms(tmp_path, "one", "two")
    tasks = {
        name: {"type": "causal-lm", "data": rows(tmp_path / f"{name}.jsonl", {"text": text}),
               **({"expert": name} if name != "held" else {})}
        for name, text in {"one": "the cat sat on", "two": "a dog ran", "held": "a hen"}.items()
    }  # fmt: skip
    file = written(tmp_path, "base", ["one", "two"], tasks)
    api.merge(file, tmp_path / "out")
    found = api.evaluate(tmp_path / "out", file, options=ALL)
    assert [(s.row, s.task) for s in found.crossed] == [
        ("expert one", "two"), ("expert one", "held"), ("expert two", "one"),
        ("expert two", "held"),
    ]  # fmt: skip
    made = api.report_on(found, tmp_path / "out", file)
    assert made.matrix is not None and made.matrix.tasks == ["one", "two", "held"]
    values = {s.row: s.value for s in [*found.scores, *found.crossed] if s.task == "held"}
    cell = next(c for c in made.matrix.cells if (c.expert, c.task) == ("two", "held"))
    assert cell.over_base == pytest.approx(values["base"] - values["expert two"])  # lower is better
    mine = api.evaluate({"two": tmp_path / "two"}, file, against=())
    assert next(s for s in mine.scores if s.task == "held").value == values["expert two"]


def test_what_an_expert_cannot_do_is_blank_and_says_why(tmp_path: Path, recipe: Path) -> None:
    torch.manual_seed(0)
    config = ViTForImageClassification.from_pretrained(tmp_path / "sky").config
    config.num_hidden_layers = 3
    ViTForImageClassification(config).save_pretrained(tmp_path / "sky")  # since it was merged
    found = api.evaluate(tmp_path / "out", recipe, options=ALL)
    assert not found.crossed
    assert "layers.2" in found.blank["sky"]["pets"] and "absent" in found.blank["pets"]["sky"]
    made = api.report_on(found, tmp_path / "out", recipe)
    assert made.matrix is not None
    blank = {(c.expert, c.task): c.absent for c in made.matrix.cells if c.value is None}
    assert set(blank) == {("sky", "pets"), ("pets", "sky")} and all(blank.values())
    assert "Blank cells" in page.render(made)


def test_a_head_of_its_own_that_knows_no_such_label_is_blank(tmp_path: Path, recipe: Path) -> None:
    content = json.loads(recipe.read_text())
    del content["heads"]
    del content["tasks"]["sky"]["metric"]
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(content))
    found: Evaluation = api.evaluate({}, plain, against=("experts",), options=ALL)
    assert [(s.row, s.task) for s in found.scores] == [("expert", "pets"), ("expert", "sky")]
    assert not found.crossed and "does not know" in found.blank["pets"]["sky"]


def test_the_command_takes_it(tmp_path: Path, recipe: Path) -> None:
    zoo = Zoo(tmp_path)
    args = ("eval", "out", "--tasks", "recipe.yaml", "--no-cache")
    ran = zoo.here(*args, "--experts", "all", "--json")
    assert ran.rc == 0, ran.err
    told = json.loads(ran.out)
    assert len(told["matrix"]["cells"]) == 4 and "--experts all" in told["run"]["command"]
    ran = zoo.here(*args, "--experts", "all", "--against", "base")
    assert ran.rc == 2 and "names no experts" in ran.err
    assert zoo.here(*args, "--experts", "some").rc == 2
