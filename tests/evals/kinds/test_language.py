"""Perplexity, multiple choice and generation beside loops written by hand, and beside lm-eval."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mowmerge import api
from mowmerge.errors import RecipeError, SourceError
from mowmerge.evals import models
from mowmerge.evals.score import Score
from mowmerge.evals.settings import Options
from tests.evals.making import WORDS, lms, recipe, rows

ROWS = ("merged", "base", "expert")


def sentence(chance: Random, n: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(n))


def scores(folder: Path, file: Path, **options: Any) -> dict[tuple[str, str], Score]:
    api.merge(file, folder / "out", force=True)
    found = api.evaluate(folder / "out", file, options=Options(**options))
    return {(s.row, s.task): s for s in found.scores}


def model_of(folder: Path, row: str) -> Any:
    name = {"merged": "out", "base": "base", "expert": "one"}[row]
    return LlamaForCausalLM.from_pretrained(folder / name).eval()


def test_perplexity_and_bits_per_byte_by_hand(tmp_path: Path) -> None:
    lms(tmp_path, "one")
    chance = Random(0)
    texts = [sentence(chance, n) for n in (1, 2, 5, 32, 33, 70, 150)]
    data = rows(tmp_path / "text.jsonl", *({"text": text} for text in texts))
    about = {"type": "causal-lm", "expert": "one", "data": data}
    file = recipe(tmp_path, "base", ["one"], {
        "ppl": about, "bits": about | {"metric": "bits_per_byte"},
        "wide": about | {"options": {"window": 16, "stride": 4}},
    })  # fmt: skip
    found = scores(tmp_path, file, batch=3)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "base")
    for row in ROWS:
        model = model_of(tmp_path, row)
        for task, window, stride in (("ppl", 32, 16), ("wide", 16, 4)):
            total, count = 0.0, 0
            for text in texts:
                ids = tokens(text)["input_ids"]
                for place in range(1, len(ids)):  # each token, from the window that reads it first
                    start = max(0, math.ceil((place + 1 - window) / stride)) * stride
                    with torch.inference_mode():
                        logits = model(input_ids=torch.tensor([ids[start:place]])).logits
                    total -= float(logits[0, -1].log_softmax(-1)[ids[place]])
                    count += 1
            assert found[row, task].value == pytest.approx(math.exp(total / count), rel=1e-6), row
            assert found[row, task].extras["tokens"] == count
            assert count == sum(len(text.split()) - 1 for text in texts)
            if task == "ppl":
                nbytes = sum(len(text.encode()) for text in texts)
                bits = found[row, "bits"]
                assert bits.value == pytest.approx(total / math.log(2) / nbytes, rel=1e-6)
                mean = sum(w * x for w, x in zip(bits.weights, bits.items, strict=True))
                assert mean / sum(bits.weights) == pytest.approx(bits.value)
    assert found["merged", "ppl"].value != found["base", "ppl"].value


def test_multiple_choice_by_hand(tmp_path: Path) -> None:
    lms(tmp_path, "one")
    chance = Random(1)
    held = [
        {"text": sentence(chance, chance.randint(1, 40)),
         "choices": [sentence(chance, n) for n in (1, 2, 3, 4)], "label": chance.randrange(4)}
        for _ in range(23)
    ]  # fmt: skip
    held[0]["text"] += "  "
    about = {"type": "multiple-choice", "expert": "one", "data": rows(tmp_path / "c.jsonl", *held)}
    file = recipe(
        tmp_path, "base", ["one"], {"plain": about, "norm": about | {"metric": "accuracy_norm"}}
    )
    found = scores(tmp_path, file, batch=5)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "base")
    for row in ROWS:
        model, right, normed = model_of(tmp_path, row), 0, 0
        for item in held:
            context, sums = tokens(item["text"])["input_ids"], []
            for choice in item["choices"]:
                after = tokens(choice)["input_ids"]
                ids = (context + after)[-33:]
                with torch.inference_mode():
                    logp = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
                sums.append(sum(float(logp[i - len(after)][t]) for i, t in enumerate(after)))
            right += max(range(4), key=sums.__getitem__) == item["label"]
            each = [x / len(c) for x, c in zip(sums, item["choices"], strict=True)]
            normed += max(range(4), key=each.__getitem__) == item["label"]
        assert found[row, "plain"].value == right / 23
        assert found[row, "norm"].value == normed / 23
        assert found[row, "plain"].extras == {"accuracy_norm": normed / 23}
        assert sum(found[row, "plain"].items) == right


def test_generation_is_greedy_bounded_and_compared_whole(tmp_path: Path) -> None:
    lms(tmp_path, "one")
    chance, tokens = Random(2), None
    texts = [sentence(chance, n) for n in (1, 3, 7, 12, 20, 5, 9)]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = model_of(tmp_path, "base")

    def greedy(text: str) -> str:
        ids = tokens(text, return_tensors="pt")["input_ids"]
        made: list[int] = []
        while len(made) < 6:
            with torch.inference_mode():
                last = int(model(input_ids=ids).logits[0, -1].argmax())
            if last == 2:
                break
            made.append(last)
            ids = torch.cat([ids, torch.tensor([[last]])], 1)
        return tokens.decode(made, skip_special_tokens=True)

    answers = {text: greedy(text) for text in texts}
    wrong = texts[3]
    held = [{"text": t, "answer": "no" if t == wrong else f" {a} "} for t, a in answers.items()]
    about = {"type": "generation", "expert": "one", "data": rows(tmp_path / "g.jsonl", *held)}
    first = answers[texts[0]].split()
    stop = next(word for word in (*first, "cat") if word in WORDS or word)
    file = recipe(tmp_path, "base", ["one"], {
        "plain": about | {"options": {"max_new_tokens": 6}},
        "stopped": about | {"options": {"max_new_tokens": 6, "stop": stop}},
        "chat": about | {"options": {"max_new_tokens": 6, "chat": True}},
    })  # fmt: skip
    found = scores(tmp_path, file, batch=3)
    base = found["base", "plain"]
    assert base.value == pytest.approx(6 / 7) and sorted(base.items) == [0.0, *[1.0] * 6]
    assert sorted(base.predicted) == sorted(a.strip() for a in answers.values())
    assert base.extras["truncated"] > 0 and base.extras["mean_tokens"] <= 6
    cut = sorted(a.split(stop)[0].strip() for a in answers.values())
    assert sorted(found["base", "stopped"].predicted) == cut
    assert sorted(found["base", "chat"].predicted) == sorted(
        greedy(f"| {t} the").strip() for t in texts
    )


def test_a_held_out_task_is_scored_for_base_and_merged(tmp_path: Path) -> None:
    lms(tmp_path, "one")
    data = rows(tmp_path / "text.jsonl", {"text": "the cat sat"}, {"text": "a dog ran on"})
    file = recipe(tmp_path, "base", ["one"], {
        "own": {"type": "causal-lm", "expert": "one", "data": data},
        "general": {"type": "causal-lm", "data": data},
    })  # fmt: skip
    assert set(scores(tmp_path, file)) == {
        ("merged", "own"), ("base", "own"), ("expert", "own"), ("merged", "general"),
        ("base", "general"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"metric": "bits"}, "(?s)causal-lm has no metric 'bits'"),
        ({"options": {"chat": True}}, "takes no 'chat' in options"),
        ({"options": {"widow": 3}}, "(?s)unknown key 'tasks.t.options.widow'.*'window'"),
        ({"columns": {"label": "x"}}, "takes no 'label' in columns"),
        ({"type": "casual-lm"}, "(?s)must be one of.*'causal-lm'"),
        ({"options": {"max_new_tokens": 0}}, "at least 1"),
    ],
)
def test_what_check_refuses(tmp_path: Path, task: dict[str, Any], message: str) -> None:
    data = rows(tmp_path / "text.jsonl", {"text": "the cat"})
    file = recipe(tmp_path, "base", ["one"], {"t": {"type": "causal-lm", "data": data} | task})
    with pytest.raises(RecipeError, match=message):
        api.check(file)


def test_labels_and_empty_splits_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lms(tmp_path, "one")
    monkeypatch.setattr(models, "load", None)
    choices = rows(tmp_path / "c.jsonl", {"text": "a", "choices": ["b", "c"], "label": "d"})
    about = {"type": "multiple-choice", "expert": "one", "data": choices}
    file = recipe(tmp_path, "base", ["one"], {"t": about})
    with pytest.raises(RecipeError, match="the label 'd', which is none of its 2 choices"):
        api.evaluate({}, file, against=["experts"])
    features = datasets.Features({"text": datasets.Value("string")})
    none = datasets.Dataset.from_dict({"text": []}, features=features)
    none.to_parquet(tmp_path / "none.parquet")
    data = {"path": "parquet", "data_files": {"test": "./none.parquet"}}
    file = recipe(tmp_path, "base", ["one"], {"t": {"type": "causal-lm", "data": data}})
    with pytest.raises(SourceError, match="task 't' has an empty split"):
        api.evaluate({}, file, against=["experts"])
