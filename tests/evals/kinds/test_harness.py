"""Tasks of lm-evaluation-harness by name: the figures are its own, for static and dynamic alike."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mowmerge import api
from mowmerge.errors import RecipeError
from tests.evals.kinds.test_language import sentence
from tests.evals.making import lms, recipe, rows

lm_eval = pytest.importorskip("lm_eval")

CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Any]:
    """Local task files, and what a recipe says of them; `own` asks the same without the harness."""
    lms(tmp_path, "one", "two")
    chance = Random(3)
    held = [
        {"text": sentence(chance, chance.randint(1, 9)), "answer": "the cat",
         "choices": [sentence(chance, n) for n in (1, 2, 3)], "label": chance.randrange(3)}
        for _ in range(17)
    ]  # fmt: skip
    data = rows(tmp_path / "c.jsonl", *held)
    (tmp_path / "yaml").mkdir()
    for name, text in (("choose", CHOOSE), ("write", WRITE)):
        (tmp_path / f"yaml/{name}.yaml").write_text(text.format(file=tmp_path / "c.jsonl"))
    about = {"type": "lm-eval", "expert": "one", "options": {"include": "./yaml"}}
    return {
        "choose": about, "write": about,
        "norm": about | {"metric": "acc_norm", "options": {"include": "./yaml", "name": "choose"}},
        "own": {"type": "multiple-choice", "expert": "one", "data": data},
    }  # fmt: skip


def by_the_harness(tmp_path: Path, folder: Path) -> Any:
    """simple_evaluate as its own documentation has it."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)
    manager = TaskManager(include_path=str(tmp_path / "yaml"), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=lm, tasks=["choose", "write"], task_manager=manager, bootstrap_iters=0
    )["results"]


def test_the_figures_are_the_harness_own_and_those_of_our_type(
    tmp_path: Path, tasks: dict[str, Any]
) -> None:
    file = recipe(tmp_path, "base", ["one", "two"], tasks)
    out = api.merge(file, tmp_path / "out").path
    found = {(s.row, s.task): s for s in api.evaluate(out, file).scores}
    for row, folder in (("merged", "out"), ("base", "base"), ("expert", "one")):
        theirs = by_the_harness(tmp_path, tmp_path / folder)
        choose, norm, write = (found[row, name] for name in ("choose", "norm", "write"))
        assert choose.metric == "acc,none" and norm.metric == "acc_norm,none"
        assert choose.value == theirs["choose"]["acc,none"] == found[row, "own"].value
        assert norm.value == theirs["choose"]["acc_norm,none"] == choose.extras["acc_norm,none"]
        assert norm.value == found[row, "own"].extras["accuracy_norm"]
        assert write.value == theirs["write"]["exact_match,none"]
        assert len(choose.items) == 17 and sum(choose.items) == pytest.approx(17 * choose.value)


def test_a_dynamic_checkpoint_told_its_expert_scores_as_the_expert(
    tmp_path: Path, tasks: dict[str, Any]
) -> None:
    everything = {"blocks": 2, "norms": "all", "embeddings": "all", "others": True}
    file = recipe(tmp_path, "base", ["one", "two"], tasks, method="mow", parameters=everything)
    out = api.merge(file, tmp_path / "mow").path
    found = api.evaluate(out, file)
    scores = {(s.row, s.task): s for s in found.scores}
    assert {row for row, _ in scores} == {"merged", "merged, oracle", "base", "expert"}
    for name in tasks:
        oracle, expert = scores["merged, oracle", name], scores["expert", name]
        assert oracle.value == expert.value, name
        assert oracle.items == expert.items
    assert len(scores["merged", "own"].routed) == 17
    assert set(found.gates) == {"merged"}


@pytest.mark.parametrize("method", ["mow", "wemoe"])
def test_a_dynamic_checkpoint_answers_in_batches_as_one_at_a_time(
    tmp_path: Path, tasks: dict[str, Any], method: str
) -> None:
    """Log likelihoods whole, rolled and greedy ones, and generations, whatever is beside them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from mowmerge.evals.kinds.lm_eval import _masked

    parameters = {"blocks": 2} if method == "mow" else {}
    file = recipe(tmp_path, "base", ["one", "two"], tasks, method=method, parameters=parameters,
                  rest={"method": "linear"})  # fmt: skip
    model = api.load(api.merge(file, tmp_path / "out").path)
    torch.manual_seed(5)
    with torch.no_grad():
        for value in model.mow_router.parameters():
            value.add_(torch.randn_like(value) * 0.3)
    words = AutoTokenizer.from_pretrained(tmp_path / "one")
    chance = Random(1)
    pairs = [(sentence(chance, 1 + i % 9), f" {sentence(chance, 1 + i % 4)}") for i in range(40)]
    pairs.append((sentence(chance, 60), " the cat"))  # loses its beginning

    def asked(kind: Any, size: int) -> tuple[list[Any], list[Any], list[str]]:
        lm = kind(pretrained=model, backend="causal", tokenizer=words, batch_size=size)
        told = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        texts = [Instance("loglikelihood_rolling", {}, p[:1], i) for i, p in enumerate(pairs)]
        how = {"until": ["."], "max_gen_toks": 4}
        open_ = [Instance("generate_until", {}, (p[0], how), i) for i, p in enumerate(pairs)]
        return (lm.loglikelihood(told, disable_tqdm=True),
                lm.loglikelihood_rolling(texts, disable_tqdm=True),
                lm.generate_until(open_, disable_tqdm=True))  # fmt: skip

    alone, batched, careless = asked(HFLM, 1), asked(_masked(0), 16), asked(HFLM, 16)
    assert [p for p, _ in batched[0]] == pytest.approx([p for p, _ in alone[0]], abs=1e-5)
    assert [greedy for _, greedy in batched[0]] == [greedy for _, greedy in alone[0]]
    assert batched[1] == pytest.approx(alone[1], rel=1e-6, abs=1e-5)
    assert batched[2] == alone[2]
    far = [abs(a - b) for (a, _), (b, _) in zip(alone[0], careless[0], strict=True)]
    assert max(far) > 1e-3  # without a mask the routers see the padding


def test_what_is_refused(tmp_path: Path, tasks: dict[str, Any]) -> None:
    task = tasks["choose"]
    for change, message in (
        ({"options": {"include": "./yaml", "name": "chose"}}, "(?s)no task 'chose'.*'choose'"),
        ({"metric": "accuracy"}, "(?s)no metric 'accuracy'.*acc"),
    ):
        file = recipe(tmp_path, "base", ["one"], {"choose": task | change})
        with pytest.raises(RecipeError, match=message):
            api.evaluate({}, file, against=["base"])
    assert json.loads(file.read_text())["tasks"]["choose"]["type"] == "lm-eval"
