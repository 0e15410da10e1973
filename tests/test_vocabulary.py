"""Experts with different tokenizers: rows placed by token, the rules for those that lack."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN, assert_within_tolerance, expected, extra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from zoo import Tensors, Zoo, load, raw

from mowmerge import api
from mowmerge.errors import CheckpointError, RecipeError
from mowmerge.planner import Options, build
from mowmerge.recipe import parse
from tests.tokenized import EMBED, HEAD, firsts, listed, rows, save, view, words, written

LINEAR = {"method": "linear", "base": "./base", "models": {"a": "./a", "b": "./b"}}


@pytest.fixture
def five(zoo: Zoo) -> Zoo:
    """base: <unk> x y z; a has z before y, and w; b has neither x nor z, and w and v."""
    save(zoo, "base", words(listed(["<unk>", "x", "y", "z"])), rows(1, 2, 3, 4))
    save(zoo, "a", words(listed(["<unk>", "x", "z", "y", "w"])), rows(10, 20, 40, 30, 50))
    save(zoo, "b", words(listed(["w", "y", "<unk>", "v"])), rows(500, 300, 100, 600))
    return zoo


def planned(zoo: Zoo, vocabulary: Any, **content: Any) -> Any:
    return build(parse.load(zoo.recipe({**LINEAR, "vocabulary": vocabulary, **content})))


def views(zoo: Zoo, vocabulary: Any, **content: Any) -> dict[str, list[float]]:
    plan = planned(zoo, vocabulary, **content)
    found = {name: firsts(view(plan, name)) for name in plan.sources}
    for name, numbers in found.items():  # a head of a hundred times the embedding stays that
        assert firsts(view(plan, name, HEAD)) == [100 * n for n in numbers]
    return found


# --- by hand


def test_a_union_by_hand(five: Zoo) -> None:
    """Output: <unk> x y z w v. w is in a and b, v in b alone, and the base has neither."""
    assert views(five, {}) == {
        "base": [1, 2, 3, 4, 275, 600],
        "a": [10, 20, 30, 40, 50, 600],
        "b": [100, 2, 300, 4, 500, 600],
    }
    got, report = five.merge({**LINEAR, "vocabulary": {}})
    assert firsts(got[EMBED]) == [55, 11, 165, 22, 275, 600]
    assert firsts(got[HEAD]) == [5500, 1100, 16500, 2200, 27500, 60000]
    out = five.folder / "out"
    assert written(out) == listed(["<unk>", "x", "y", "z", "w", "v"])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 6
    told = report["vocabulary"]
    assert (told["source"], told["tokens"], told["rows"], told["added"]) == ("base", 6, 6, 2)
    assert told["models"] == {
        "base": {"tokens": 4, "shared": 4, "added": 0, "moved": 0, "left": 0,
                 "missing": {"mean": 2}},
        "a": {"tokens": 5, "shared": 5, "added": 1, "moved": 2, "left": 0, "missing": {"mean": 1}},
        "b": {"tokens": 4, "shared": 4, "added": 1, "moved": 4, "left": 0, "missing": {"base": 2}},
    }  # fmt: skip


@pytest.mark.parametrize(("source", "tokens", "b"), [
    ("base", ["<unk>", "x", "y", "z"], [100, 2, 300, 4]),
    ("a", ["<unk>", "x", "z", "y", "w"], [100, 2, 4, 300, 500]),
    ("b", ["w", "y", "<unk>", "v"], [500, 300, 100, 600]),
])  # fmt: skip
def test_one_models_tokens(five: Zoo, source: str, tokens: list[str], b: list[float]) -> None:
    assert views(five, {"source": source})["b"] == b
    five.merge({**LINEAR, "vocabulary": {"source": source}})
    assert written(five.folder / "out") == listed(tokens)


@pytest.mark.parametrize(("missing", "b"), [
    ("base", [100, 2, 300, 4, 500, 600]),
    ("mean", [100, 20, 300, 40, 500, 600]),
    ("zero", [100, 0, 300, 0, 500, 600]),
    ({"token": "<unk>"}, [100, 100, 300, 100, 500, 600]),
    ({"model": "a"}, [100, 20, 300, 40, 500, 600]),
    ({"model": "a", "token": "w"}, [100, 50, 300, 50, 500, 600]),
    ({"model": "base", "id": 0}, [100, 1, 300, 1, 500, 600]),
])  # fmt: skip
def test_rows_that_lack(five: Zoo, missing: Any, b: list[float]) -> None:
    assert views(five, {"missing": missing})["b"] == b


@pytest.mark.parametrize(("about", "a", "b"), [
    ("zero", 20, 0),
    ({"source": "zero", "force": True}, 0, 0),
    ({"source": "mean"}, 20, 20),
    ({"model": "a"}, 20, 20),
    ({"model": "a", "token": "w"}, 20, 50),
    ({"model": "a", "id": 2}, 20, 40),
    ({"token": "y"}, 20, 300),
    ({"source": {"token": "y"}, "force": True}, 30, 300),
    ({"force": True}, 2, 2),
    ({}, 20, 2),
])  # fmt: skip
def test_one_token(five: Zoo, about: Any, a: float, b: float) -> None:
    found = views(five, {"tokens": {"x": about}})
    assert (found["a"][1], found["b"][1]) == (a, b)
    assert [n for i, n in enumerate(found["b"]) if i != 1] == [100, 300, 4, 500, 600]


def test_tokens_that_the_source_lacks_are_added(five: Zoo) -> None:
    """Whoever has it; the rest by the rule. What nobody has is new, and said to be."""
    wanted = {"w": {"model": "b"}, "<new>": {"model": "a", "token": "y"}}
    plan = planned(five, {"source": "base", "tokens": wanted})
    assert firsts(view(plan, "base")) == [1, 2, 3, 4, 500, 30]
    assert firsts(view(plan, "a")) == [10, 20, 30, 40, 50, 30]
    assert any("'<new>', which no model has, is added" in line for line in plan.warnings)
    five.merge({**LINEAR, "vocabulary": {"source": "base", "tokens": wanted}})
    out = five.folder / "out"
    assert written(out) == listed(["<unk>", "x", "y", "z", "w", "<new>"])
    said = {
        t["content"]: t for t in json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    }
    assert said["<new>"]["special"]
    assert not said["w"]["special"]


def test_without_a_base_what_lacks_is_the_mean(five: Zoo) -> None:
    found = views(five, {}, base=None)
    assert found == {
        "a": [10, 20, 40, 30, 50, 600],
        "b": [100, 20, 40, 300, 500, 600],
    }  # fmt: skip


# --- holes, padding, ties, biases


def test_holes_and_padded_rows(zoo: Zoo) -> None:
    """base has no token 1, and two rows beyond its tokens; a has one row less than base."""
    save(zoo, "base", words({"<unk>": 0, "x": 2, "y": 3}), rows(1, 2, 3, 4, 5, 6))
    save(zoo, "a", words({"x": 0, "<unk>": 1, "z": 3}), rows(30, 10, 20, 40, 50))
    content = {"models": {"a": "./a"}}
    # z is token 4, a padded row of the base; row 5 is in the base alone; row 1 in none but it
    assert views(zoo, {}, **content) == {
        "base": [1, 2, 3, 4, 40, 6],
        "a": [10, 2, 30, 4, 40, 6],
    }
    zoo.merge({**LINEAR, "models": {"a": "./a"}, "vocabulary": {}})
    assert written(zoo.folder / "out") == {"<unk>": 0, "x": 2, "y": 3, "z": 4}
    assert views(zoo, {"source": "base"}, **content)["a"] == [10, 2, 30, 4, 50, 6]


@pytest.mark.parametrize(("multiple", "count"), [(1, 5), (4, 8), (8, 8), (None, 6)])
def test_padding_to_a_multiple(zoo: Zoo, multiple: int | None, count: int) -> None:
    """Rows of no token in any model are the mean of the model's own."""
    save(zoo, "base", words(listed(["<unk>", "x", "y"])), rows(1, 2, 3, 4, 5, 6))
    save(zoo, "a", words(listed(["<unk>", "x", "y", "z", "w"])), rows(2, 4, 6, 8, 10))
    found = views(zoo, {"pad_to_multiple_of": multiple}, models={"a": "./a"})
    assert found == {
        "base": [1, 2, 3, 8, 10, 6, 3.5, 3.5][:count],
        "a": [2, 4, 6, 8, 10, 6, 6, 6][:count],
    }


def test_tokens_beyond_the_rows_have_none(zoo: Zoo) -> None:
    """A tokenizer that was given a token, and a model that was not resized."""
    save(zoo, "base", words(listed(["<unk>", "x"]), {"<pad>": 2}), rows(1, 3))
    save(zoo, "a", words(listed(["<unk>", "x"])), rows(10, 30))
    assert views(zoo, {}, models={"a": "./a"}) == {"base": [1, 3, 2], "a": [10, 30, 20]}


def test_ties_on_either_side(five: Zoo) -> None:
    """A tied expert gives its embedding where the base has a head, and a copy stays a copy."""
    said = words(listed(["<unk>", "x", "z", "y", "w"]))
    save(five, "a", said, rows(10, 20, 40, 30, 50, tied=True))
    got, _ = five.merge({**LINEAR, "models": {"a": "./a"}, "vocabulary": {}})
    assert firsts(got[HEAD]) == [10, 20, 30, 40, 50] == firsts(got[EMBED])
    few, embed = words(listed(["<unk>", "y"])), rows(7, 8, tied=True)[EMBED]
    for name in (EMBED, EMBED.removeprefix("model.")):  # rows that it lacks are of others' heads
        save(five, "few", few, {name: embed})
        content = {"models": {"few": "./few", "b": {"source": "./b", "weight": 0}}}
        got, _ = five.merge({**LINEAR, **content, "vocabulary": {}}, force=True)
        assert firsts(got[EMBED]) == [7, 2, 8, 4, 500, 600]
        assert firsts(got[HEAD]) == [7, 200, 8, 400, 50000, 60000]

    save(five, "base", words(listed(["<unk>", "x", "y", "z"])), rows(1, 2, 3, 4, tied=True))
    embed = rows(10, 20, 40, 30, 50)[EMBED]
    save(five, "a", said, {EMBED: embed, HEAD: embed.clone()})
    got, _ = five.merge({**LINEAR, "models": {"a": "./a"}, "vocabulary": {}}, force=True)
    assert firsts(got[EMBED]) == [10, 20, 30, 40, 50]
    assert HEAD not in got


def test_biases_and_names_with_a_prefix(zoo: Zoo) -> None:
    """BERT's: a bias of the head is placed, positions and token types are not."""
    shared = {"embeddings.position_embeddings.weight": torch.ones(3, 2),
              "embeddings.token_type_embeddings.weight": torch.ones(2, 2)}  # fmt: skip

    def bert(words_: list[float], bias: list[float], prefix: str) -> Tensors:
        value = torch.tensor(words_, dtype=torch.float32).unsqueeze(1).repeat(1, 2)
        body = {"embeddings.word_embeddings.weight": value, **shared}
        head = {"cls.predictions.bias": torch.tensor(bias, dtype=torch.float32)}
        return {prefix + key: v for key, v in {**body, **head}.items()}

    save(zoo, "base", words(listed(["<unk>", "x", "y"])), bert([1, 2, 3], [7, 8, 9], "bert."))
    save(zoo, "a", words(listed(["y", "x", "z"])), bert([30, 20, 40], [90, 80, 70], ""))
    content = {**LINEAR, "models": {"a": "./a"}, "vocabulary": {}}
    plan = build(parse.load(zoo.recipe(content)))
    name = "bert.embeddings.word_embeddings.weight"
    assert set(plan.vocabulary.tensors) == {name, "bert.cls.predictions.bias"}
    got, _ = zoo.merge(content)
    assert firsts(got[name]) == [1, 20, 30, 40]
    assert got["bert.cls.predictions.bias"].tolist() == [7, 80, 90, 70]
    assert got["bert.embeddings.position_embeddings.weight"].shape == (3, 2)


def test_a_bias_that_lies_across(zoo: Zoo) -> None:
    """BART's final_logits_bias is [1, tokens]."""
    for name, tokens, numbers in (("base", ["<unk>", "x"], [1, 2]), ("a", ["x", "y"], [20, 30])):
        bias = torch.tensor([numbers], dtype=torch.float32)
        shared = rows(*numbers)[EMBED]
        said = words(listed(tokens))
        save(zoo, name, said, {"final_logits_bias": bias, "model.shared.embed.weight": shared})
    got, _ = zoo.merge({**LINEAR, "models": {"a": "./a"}, "vocabulary": {}})
    assert got["final_logits_bias"].tolist() == [[1, 20, 30]]


def test_narrow_rows_are_averaged_wide(zoo: Zoo) -> None:
    """1 and 1 + 2^-7 in bf16: their mean is no bf16 number, and is rounded in the base alone."""
    save(zoo, "base", words(listed(["<unk>"])), {EMBED: torch.ones(1, 2, dtype=torch.bfloat16)})
    for name, value in (("a", 1.0), ("b", 1.0078125), ("c", 1.0)):
        tensors = {EMBED: torch.tensor([[1.0] * 2, [value] * 2], dtype=torch.bfloat16)}
        tokens = ["<unk>", "y" if name == "c" else "x"]
        save(zoo, name, words(listed(tokens)), tensors)
    plan = planned(zoo, {}, models={each: f"./{each}" for each in "abc"})
    assert view(plan, "c")[1, 0].item() == 1.00390625
    assert view(plan, "a").dtype == view(plan, "base").dtype == torch.bfloat16
    assert plan.jobs[0].output.dtype == "BF16"


# --- at random


@st.composite
def families(draw: st.DrawFn) -> tuple[dict[str, dict[str, int]], dict[str, int], Any]:
    """Vocabularies with holes and spare rows, rows of each, and what a recipe asks."""
    vocabularies, heights = {}, {}
    for name in ("base", "a", "b"):
        tokens = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True))
        ids = draw(st.permutations(range(len(tokens) + draw(st.integers(0, 3)))))
        vocabularies[name] = dict(zip(tokens, ids, strict=False))
        heights[name] = 1 + max(vocabularies[name].values()) + draw(st.integers(0, 3))
    known = sorted({t for v in vocabularies.values() for t in v})
    rule = st.sampled_from(["base", "mean", "zero"])
    choices = {t: {"source": draw(rule), "force": draw(st.booleans())} for t in draw(
        st.lists(st.sampled_from(known), unique=True, max_size=2))}  # fmt: skip
    return vocabularies, heights, {
        "source": draw(st.sampled_from(["union", "base", "a"])),
        "missing": draw(rule),
        "tokens": choices,
        "pad_to_multiple_of": draw(st.sampled_from([None, 1, 4])),
    }  # fmt: skip


def by_rule(token: str, model: str, has: dict[str, dict[str, float]], asked: Any) -> float:
    """A token's row in a model, one token at a time."""
    about = asked["tokens"].get(token, {})
    if token in has[model] and not about.get("force"):
        return has[model][token]
    rule = about.get("source", asked["missing"])
    if rule == "zero":
        return 0.0
    if rule == "base" and token in has["base"]:
        return has["base"][token]
    holders = [has[m][token] for m in ("a", "b") if token in has[m]] or [has["base"][token]]
    return sum(holders) / len(holders)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(family=families())
def test_every_row_is_what_its_rule_says(zoo: Zoo, family: Any) -> None:
    vocabularies, heights, asked = family
    has = {}
    for k, (name, vocabulary) in enumerate(vocabularies.items()):
        numbers = [float(2 ** (k + 1) * (i + 1)) for i in range(heights[name])]
        save(zoo, name, words(vocabulary), rows(*numbers))
        has[name] = {token: numbers[i] for token, i in vocabulary.items()}
    in_output = vocabularies[asked["source"] if asked["source"] != "union" else "base"]
    tokens = set(in_output) | set(asked["tokens"])
    if asked["source"] == "union":
        tokens |= {t for v in vocabularies.values() for t in v}
    asked["tokens"] = {t: about for t, about in asked["tokens"].items() if t in tokens}

    plan = planned(zoo, asked)
    zoo.merge({**LINEAR, "vocabulary": asked}, force=True)
    ids = json.loads((zoo.folder / "out/tokenizer.json").read_text())
    ids = ids["model"]["vocab"]
    assert set(ids) == tokens
    assert {t: i for t, i in ids.items() if t in in_output} == in_output  # which keep their ids
    count, multiple = plan.vocabulary.rows, asked["pad_to_multiple_of"] or 1
    assert count > max(ids.values()) and count % multiple == 0
    for model in vocabularies:
        found = firsts(view(plan, model))
        wanted = [by_rule(token, model, has, asked) for token in ids]
        assert [found[i] for i in ids.values()] == wanted
        share = plan.vocabulary.models[model]
        assert share.shared == sum(t in has[model] for t in ids)
        assert share.left == sum(t not in ids for t in has[model])
        assert share.moved == sum(
            has[model].get(t, 0) and vocabularies[model][t] != i for t, i in ids.items()
        )


# --- mergekit's


@pytest.mark.parametrize(("case", "base", "weights", "content"), [
    ("mergekit_tokenizer_union_linear", "e1", {"e1": 0.6, "e5_tok": 0.4},
     {"method": "linear", "vocabulary": {"source": "union"}}),
    ("mergekit_tokenizer_base_ta", "base", {"e1": 0.3, "e5_tok": 0.5},
     {"method": "task_arithmetic", "vocabulary": {"source": "base"}}),
])  # fmt: skip
def test_golden(zoo: Zoo, case: str, base: str, weights: dict[str, float], content: Any) -> None:
    models = {n: {"source": str(GOLDEN / "models" / n), "weight": w} for n, w in weights.items()}
    got, _ = zoo.merge({**content, "base": str(GOLDEN / "models" / base), "models": models})
    ids, theirs = written(zoo.folder / "out"), extra(case)["output_vocab"]
    assert ids.keys() == theirs.keys()
    order = [ids[token] for token in sorted(theirs, key=theirs.__getitem__)]
    found = {name: got[name] for name in expected(case)}
    for name in (EMBED, HEAD):
        if name in found:
            found[name] = got[name][order]
    assert_within_tolerance(case, found)


def test_mergekits_base_gives_rows_though_the_method_has_none(five: Zoo) -> None:
    """x is in base and a, and b takes the base's; w is in a and b, and the base takes the mean."""
    models = "".join(
        f"  - {{model: ./{m}, parameters: {{weight: 1}}}}\n" for m in ("a", "base", "b")
    )
    text = (
        f"merge_method: linear\nbase_model: ./base\nmodels:\n{models}tokenizer: {{source: union}}\n"
    )
    plan = build(parse.load(five.recipe(text)))
    assert plan.base is None
    found = {name: firsts(view(plan, name)) for name in plan.sources}
    assert plan.vocabulary.source == plan.donor
    assert found["b"] == [100, 2, 300, 4, 500, 600]
    assert found[plan.donor][4] == 275


# --- what it says, and what it refuses


def test_a_dry_run_shows_the_mapping(five: Zoo) -> None:
    five.recipe({**LINEAR, "vocabulary": {}})
    ran = five.here("merge", "recipe.yaml", "--dry-run")
    assert ran.rc == 0
    assert "the tokens of base and 2 added to them, 6 in 6 rows (0 without one)" in ran.out
    assert "model  tokens  shared  added  moved  left out  missing: mean  missing: base" in ran.out
    assert "b      4       4       1      4      0         0              2" in ran.out
    ran = five.here("merge", "recipe.yaml", "--dry-run", "--json")
    told = json.loads(ran.out)["vocabulary"]
    assert told["models"]["b"]["missing"] == {"base": 2}
    assert told["tensors"] == [HEAD, EMBED]


@pytest.mark.parametrize(("asked", "said"), [
    ({"tokens": {"q": {}}}, "no model has the token 'q'"),
    ({"missing": {"token": "q"}}, "model 'base' has not the token 'q'"),
    ({"missing": {"token": "x"}}, "model 'b' has not the token 'x'"),
    ({"tokens": {"x": {"model": "b"}}}, "model 'b' has not the token 'x'"),
    ({"tokens": {"x": {"model": "a", "id": 5}}}, "model 'a' has not the row 5"),
    ({"tokens": {"v": {"source": {"token": "z"}, "force": True}}}, "'b' has not the token 'z'"),
])  # fmt: skip
def test_tokens_that_are_not_there(five: Zoo, asked: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        planned(five, asked)


def test_an_id_far_beyond_is_no_matrix(five: Zoo) -> None:
    save(five, "base", words({"<unk>": 0, "x": 10**12}), rows(1, 2))
    with pytest.raises(CheckpointError, match="far beyond its 5 tokens"):
        planned(five, {"source": "union"}, models={"a": "./a"})


def test_faults_of_the_recipe(five: Zoo) -> None:
    asked = {"source": "c", "missing": {"model": "d"}, "tokens": {"x": {"source": {"model": "e"}}}}
    with pytest.raises(RecipeError) as told:
        planned(five, asked)
    for place in ("source: there is no model 'c'", "missing.model: there is no model 'd'",
                  "tokens.x.source.model: there is no model 'e'"):  # fmt: skip
        assert f"vocabulary.{place}" in str(told.value)
    with pytest.raises(RecipeError, match="the recipe names none"):
        planned(five, {"source": "base"}, base=None)
    with pytest.raises(RecipeError, match="vocabulary cannot go into an adapter"):
        planned(five, {}, output={"format": "adapter"})


def test_tokenizers_that_are_not_there_or_not_alike(five: Zoo) -> None:
    (five.folder / "a/tokenizer.json").unlink()
    (five.folder / "b/tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError) as told:
        planned(five, {})
    first, second = told.value.problems
    assert "there is no tokenizer.json" in first.message and "save_pretrained" in first.hint
    assert "can be understood" in second.message
    said = words(listed(["<unk>", "x"]))
    said["pre_tokenizer"] = {"type": "ByteLevel"}
    save(five, "a", said, rows(1, 2))
    said["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    said["model"] = {"type": "BPE", "vocab": listed(["x", "y"]), "merges": []}
    save(five, "b", said, rows(1, 2))
    with pytest.raises(CheckpointError) as told:
        planned(five, {})
    first, second = told.value.problems
    assert "its tokens stand for bytes, and the output's for text" in first.message
    assert "its tokenizer is BPE, and the one that is added to is WordLevel" in second.message
    plan = planned(five, {"source": "b"}, models={"b": "./b"})
    assert plan.vocabulary.tokens == 2
    assert not any("splits texts otherwise" in line for line in plan.warnings)
    (five.folder / "b/tokenizer.json").write_text(
        json.dumps({**said, "normalizer": {"type": "Lowercase"}})
    )
    (line,) = planned(five, {"source": "b"}, models={"b": "./b"}).warnings
    assert line == (
        "the tokenizer of 'base' changes or splits texts otherwise than that of 'b', which is"
        " written"
    )


# --- without the key


def test_rows_of_different_tokens_are_not_merged(zoo: Zoo) -> None:
    """The same token under another id is refused; another name for an id, or more, is told."""
    tokens = ["<unk>", "x", "y", "z"]
    save(zoo, "base", words(listed(tokens)), rows(1, 2, 3, 4))
    save(zoo, "a", words(listed(["<unk>", "x", "z", "y"])), rows(1, 2, 3, 4))
    save(zoo, "b", words(listed([*tokens[:3], "<new>", "w"])), rows(1, 2, 3, 4))
    plain = {key: value for key, value in LINEAR.items() if key != "models"}
    said = "the token 'y' has id 2 in the tokenizer that is written and 3 in that of 'a' and 1 more"
    for method in ("linear", "emr"):
        with pytest.raises(CheckpointError, match=said) as told:
            build(parse.load(zoo.recipe({**plain, "method": method})))
        (problem,) = told.value.problems
        assert "vocabulary: {source: union}" in problem.hint
        assert problem.where.endswith("recipe.yaml:5")
    planned_ = build(parse.load(zoo.recipe({**plain, "models": {"b": "./b"}})))
    assert [w for w in planned_.warnings if "read texts" in w] == [
        "'b' will read texts otherwise than it learned: id 3 is '<new>' in its tokenizer and 'z'"
        " in the one written, and 1 more"
    ]
    rule = {"match": {"role": ["embedding", "head"]}, "models": ["b"]}
    build(parse.load(zoo.recipe({**plain, "rules": [rule]})))  # a's rows are not read


# --- the files beside the weights


def test_ids_go_with_the_tokens(five: Zoo) -> None:
    """Config and generation config of the base, tokens of b."""
    base, b = five.folder / "base", five.folder / "b"
    config = json.loads((base / "config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "image_token_id": 3}
    (base / "config.json").write_text(json.dumps({**config, **ids, "text": {"vocab_size": 4}}))
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 0], "top_k": 1}')
    (base / "chat_template.jinja").write_text("base's")
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps({**config, "bos_token_id": 3}))
    (b / "chat_template.jinja").write_text("b's")
    _, report = five.merge({**LINEAR, "vocabulary": {"source": "b"}})
    out = five.folder / "out"
    found = json.loads((out / "config.json").read_text())
    assert (found["vocab_size"], found["text"]["vocab_size"]) == (4, 4)
    # b's own; y is 1 there; <unk> is 2 there; z it lacks
    assert [found[key] for key in ids] == [3, [1], 2, None]
    assert any("image_token_id is dropped" in line for line in report["warnings"])
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [1, 2], "top_k": 1}
    assert (out / "chat_template.jinja").read_text() == "b's"
    (b / "generation_config.json").write_text('{"eos_token_id": 0}')
    five.merge({**LINEAR, "vocabulary": {"source": "b"}}, force=True)
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": 0}'


def test_the_size_is_that_of_the_part_which_has_it(five: Zoo) -> None:
    base = five.folder / "base"
    parts = {"text_config": {"vocab_size": 4, "k": 1}, "audio_config": {"vocab_size": 9}}
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **parts}))
    five.merge({**LINEAR, "vocabulary": {}})
    assert json.loads((five.folder / "out/config.json").read_text()) == {
        "model_type": "llama",
        "text_config": {"vocab_size": 6, "k": 1},
        "audio_config": {"vocab_size": 9},
    }


def test_lists_of_old_tokens_are_left_out(five: Zoo) -> None:
    for name in ("vocab.txt", "added_tokens.json", "special_tokens_map.json"):
        (five.folder / "base" / name).write_text("{}")
    for vocabulary, kept in (({}, False), ({"source": "base"}, True)):
        five.merge({**LINEAR, "vocabulary": vocabulary}, force=True)
        out = five.folder / "out"
        assert (out / "special_tokens_map.json").exists()
        assert (out / "vocab.txt").exists() == (out / "added_tokens.json").exists() == kept


def test_a_nested_recipe_keeps_its_tokens(five: Zoo) -> None:
    """What was placed once is placed again, and what it was given is written."""
    inner = {**LINEAR, "vocabulary": {}}
    (five.folder / "inner.yaml").write_text(json.dumps(inner))
    got, _ = five.merge({"method": "linear", "models": {"n": "./inner.yaml"}})
    assert firsts(got[EMBED]) == [55, 11, 165, 22, 275, 600]
    assert len(written(five.folder / "out")) == 6
    assert json.loads((five.folder / "out/config.json").read_text())["vocab_size"] == 6
    content = {"method": "linear", "models": {"b": "./b", "n": "./inner.yaml"}}
    save(five, "b", words(listed(["w", "y", "<unk>", "v"])), rows(1, 2, 3, 4, 5, 6))
    with pytest.raises(CheckpointError, match="in that of 'n'"):
        build(parse.load(five.recipe(content)))
    plan = build(parse.load(five.recipe({**content, "vocabulary": {}})))
    assert firsts(view(plan, "n")) == [25.5, 16, 6.5, 4, 11, 22]


def test_a_model_with_an_adapter_on_it(zoo: Zoo) -> None:
    """Tokens are the base's, and so are the rows; what is adapted is adapted."""
    at = GOLDEN / "models"
    lora = {"source": str(at / "base"), "adapter": str(at / "lora_a")}
    content = {"method": "linear", "models": {"t": str(at / "e5_tok"), "l": lora}}
    plan = build(parse.load(zoo.recipe({**content, "vocabulary": {"source": "t"}})))
    ids, base = written(at / "e5_tok"), load_file(at / "base/model.safetensors")
    theirs = written(at / "base")
    found = view(plan, "l", HEAD)
    for token in sorted(ids.keys() & theirs.keys()):
        assert torch.equal(found[ids[token]], base[HEAD][theirs[token]])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(view(plan, "l", name), base[name])


def test_a_dynamic_merge(five: Zoo) -> None:
    got, report = five.merge({"method": "emr", **{k: LINEAR[k] for k in ("base", "models")},
                              "vocabulary": {}})  # fmt: skip
    assert got[EMBED].shape == (6, 2)
    config = json.loads((five.folder / "out/config.json").read_text())
    assert config["base_config"]["vocab_size"] == 6
    assert report["vocabulary"]["rows"] == 6


def test_the_same_bytes_again(five: Zoo) -> None:
    """Whatever workers and blocks; and from the lock, which names the tokenizers it read."""
    content = {**LINEAR, "vocabulary": {"missing": "mean"}}
    first, _ = five.merge(content, hashes=True)
    again, _ = five.merge(content, "again", workers=3)
    assert raw(first) == raw(again)
    tokens = [five.folder / out / "tokenizer.json" for out in ("out", "again")]
    assert tokens[0].read_bytes() == tokens[1].read_bytes()
    lock = five.folder / "out/recipe.lock.yaml"
    assert "tokenizer.json" in lock.read_text()
    replayed = api.merge(lock, five.folder / "replayed", locked=True)
    assert raw(load(replayed.path)) == raw(first)
    assert replayed.report["replay"]["outcome"] == "same bytes"
    save(five, "b", words(listed(["w", "x", "<unk>", "v"])), rows(500, 300, 100, 600))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        api.merge(lock, five.folder / "changed", locked=True)


def test_a_plan_counts_what_placing_holds(five: Zoo) -> None:
    """A run of rows and the index a handle, however tall the matrix."""
    for name, step in (("base", 1), ("a", -1)):
        tokens = [f"t{i}" for i in range(40_000)][::step]
        save(five, name, words(listed(tokens)), {EMBED: torch.zeros(40_000, 64)})
    recipe = parse.load(five.recipe({**LINEAR, "models": {"a": "./a"}, "vocabulary": {}}))
    (job,) = build(recipe, Options(workers=1)).jobs
    assert 131_072 * 36 + 4 * 40_000 <= job.models[0].held < 131_072 * 40 < job.output.nbytes
