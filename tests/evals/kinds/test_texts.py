"""Text classification beside transformers' own loop: pairs, regression, and every metric."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

import mowmerge
from mowmerge import api
from mowmerge.errors import RecipeError
from mowmerge.evals.settings import Options
from tests.evals.kinds.test_language import sentence
from tests.evals.making import recipe, rows, tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32,
}  # fmt: skip
METRICS = {
    "accuracy": accuracy_score, "matthews": matthews_corrcoef,
    "macro_f1": lambda t, p: f1_score(t, p, average="macro"),
}  # fmt: skip


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    chance, found = Random(5), {}
    base = BertModel(BertConfig(**SIZES))
    base.save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    for name, labels in (("moods", 3), ("pairs", 2), ("degrees", 1)):
        model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=labels))
        model.bert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * 0.1)
        model.save_pretrained(tmp_path / name)
        tokenizer(tmp_path / name)
        held = [
            {"text": sentence(chance, chance.randint(1, 20)), "other": sentence(chance, 5),
             "label": chance.gauss(0, 1) if labels == 1 else chance.randrange(labels)}
            for _ in range(31)
        ]  # fmt: skip
        found[name] = {
            "type": "text-classification", "expert": name,
            "data": rows(tmp_path / f"{name}.jsonl", *held),
        }  # fmt: skip
    found["pairs"] |= {"columns": {"pair": "other"}, "metric": "matthews"}
    found["degrees"]["metric"] = "spearman"
    return found


def by_hand(tmp_path: Path, model: Any, name: str) -> tuple[list[float], list[float], list[float]]:
    """One text at a time: what is predicted, what is true, and the loss."""
    import json

    tokens = AutoTokenizer.from_pretrained(tmp_path / name)
    predicted, true, losses = [], [], []
    for line in (tmp_path / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        pair = [row["text"], row["other"]] if name == "pairs" else [row["text"]]
        given = tokens(*pair, truncation=True, max_length=32, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**given).logits[0]
        predicted.append(float(logits[0]) if name == "degrees" else int(logits.argmax()))
        true.append(row["label"])
        if name != "degrees":
            losses.append(-float(logits.log_softmax(-1)[row["label"]]))
    return predicted, true, losses


@pytest.mark.parametrize("metric", METRICS)
def test_the_figures_are_those_of_a_plain_loop(
    tmp_path: Path, tasks: dict[str, Any], metric: str
) -> None:
    tasks["moods"]["metric"] = metric
    file = recipe(tmp_path, "base", list(tasks), tasks, heads={"match": "classifier.*"})
    out = api.merge(file, tmp_path / "out").path
    found = {(s.row, s.task): s for s in api.evaluate(out, file, options=Options(batch=8)).scores}
    for name in tasks:
        expert = BertForSequenceClassification.from_pretrained(tmp_path / name).eval()
        merged = mowmerge.load(out, task=name)
        for row, model in (("expert", expert), ("merged", merged)):
            score = found[row, name]
            predicted, true, losses = by_hand(tmp_path, model, name)
            if name == "degrees":
                value = spearmanr(predicted, true).statistic
                assert not score.items and not score.confidence
            else:
                kind = metric if name == "moods" else "matthews"
                value = METRICS[kind](true, predicted)
                assert sorted(score.nll) == pytest.approx(sorted(losses), abs=1e-5)
            assert score.value == pytest.approx(value, abs=1e-6)
            assert sorted(score.predicted) == pytest.approx(sorted(predicted), abs=1e-5)


def test_a_label_the_head_does_not_know_is_refused(tmp_path: Path, tasks: dict[str, Any]) -> None:
    tasks["pairs"]["data"] = rows(tmp_path / "bad.jsonl", {"text": "a", "other": "b", "label": 2})
    file = recipe(tmp_path, "base", list(tasks), tasks, heads={"match": "classifier.*"})
    with pytest.raises(RecipeError, match="task 'pairs' has the label 2, which the head does not"):
        api.evaluate({}, file, against=["experts"])
