"""What no merge can be made of, by every method of the catalogue: told by `check`, nothing read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenized import listed, rows, save, words
from zoo import Ran, Zoo, llama

from mowmerge.checkpoint import reader
from mowmerge.methods import registry
from mowmerge.methods.registry import Parameter
from mowmerge.recipe.parameters import shown

METHODS = sorted(name for name in registry.names() if registry.get(name).origin == "mowmerge")
RANKED = [
    (name, word)
    for name in METHODS
    for word in ("rank", "gate_rank")
    if word in registry.get(name).parameters
]
RECIPE, CHECKPOINT, SOURCE = 3, 4, 5  # exit codes


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is opened."""

    def opened(*args: Any) -> None:
        raise AssertionError("a tensor was opened")

    monkeypatch.setattr(reader.StoredReader, "open", opened)


def checked(zoo: Zoo, **content: Any) -> Ran:
    zoo.recipe({key: value for key, value in content.items() if value is not None})
    return zoo.here("check", "recipe.yaml")


def taken(name: str) -> dict[str, Any]:
    """A recipe of a method with a base and as many models as it takes."""
    count = registry.get(name).count or 2
    return {"base": "o/z", "models": {each: f"o/{each}" for each in "ab"[:count]}, "method": name}


def outside(p: Parameter) -> Iterator[Any]:
    """Values that a parameter cannot have."""
    if p.kind == "choice":
        yield from ("nonsense", 3)
    elif p.kind == "boolean":
        yield from ("yes", 1)
    else:
        yield from ("much", True)
        step = 1 if p.kind == "integer" else 1e-3
        yield from [p.low - step] if p.low != float("-inf") else []
        yield from [p.high + step] if p.high != float("inf") else []


@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_outside_its_range(zoo: Zoo, name: str) -> None:
    """One recipe with all parameters wrong, since all faults come at once."""
    known = registry.get(name).parameters
    wrong = {word: list(outside(p)) for word, p in known.items()}
    for i in range(max(map(len, wrong.values()), default=0)):
        given = {word: values[i] for word, values in wrong.items() if i < len(values)}
        ran = checked(zoo, **taken(name), parameters=given)
        assert (ran.rc, ran.out) == (RECIPE, "")
        for word, value in given.items():
            (line,) = [line for line in ran.err.splitlines() if f" parameters.{word} must" in line]
            assert "recipe.yaml:" in line
            assert line.endswith(f", not {shown(value)}")
            assert known[word].range in line or isinstance(value, str | bool)


def test_a_misspelt_method_hides_no_other_fault(zoo: Zoo) -> None:
    models = {"a": {"source": "o/a", "wieght": 1}, "b": {"source": "o/b", "weight": "much"}}
    ran = checked(zoo, base="o/z", models=models, method="tiess", parameters={"density": 2})
    assert (ran.rc, ran.out) == (RECIPE, "")
    for told in (
        "there is no method 'tiess'\n  -> did you mean 'ties'?", "parameters.density must be 0..1",
        "models.a.wieght is not a parameter of 'ties'\n  -> did you mean 'weight'?",
        "models.b.weight must be a number, not 'much'",
    ):  # fmt: skip
        assert told in ran.err
    ran = checked(zoo, models=models, method="quite another", parameters={"density": 2})
    assert "there is no method" in ran.err
    assert "density" not in ran.err


@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_are_none(zoo: Zoo, name: str) -> None:
    numbers = [p for p in registry.get(name).parameters.values() if p.kind in ("number", "integer")]
    for p in numbers[:2]:
        for text in (".nan", ".inf"):
            models = json.dumps(taken(name))[:-1]
            (zoo.folder / "recipe.yaml").write_text(
                f"{models}, parameters: {{{p.name}: {text}}}}}\n"
            )
            ran = zoo.here("check", "recipe.yaml")
            assert ran.rc == RECIPE
            assert f"parameters.{p.name} must be" in ran.err


@pytest.mark.parametrize("name", [n for n in METHODS if registry.get(n).needs_base])
def test_a_missing_base(zoo: Zoo, name: str) -> None:
    ran = checked(zoo, **taken(name) | {"base": None})
    assert (ran.rc, ran.out) == (RECIPE, "")
    assert f"'{name}' needs a base, and the recipe names none" in ran.err


def test_paths_to_nothing(zoo: Zoo) -> None:
    """All at once, by line; what may be on the Hub is left to the merge."""
    zoo.family(llama(1), 2)
    text = (
        "base: ./bas\nmodels:\n  a: ~/nowhere-at-all\n  b: org/b\n"
        "  c: {source: base, adapter: [./lora, org/lora]}\n"
        "  d: {source: {models: {x: ./a, y: ./none}, method: linear}}\nmethod: linear\n"
    )
    zoo.recipe(text)
    ran = zoo.here("check", "recipe.yaml")
    assert (ran.rc, ran.out) == (SOURCE, "")
    told = [line for line in ran.err.splitlines() if "there is no folder or file" in line]
    lines = {line.split("'")[1]: line.split(":")[2].strip() for line in told}
    assert lines == {"./bas": "1", "~/nowhere-at-all": "3", "./lora": "5", "./none": "6"}
    assert "did you mean 'base'?" in ran.err
    zoo.recipe(text.replace("./bas", "./base").replace("./lora", "org/x").replace("./none", "./b"))
    assert zoo.here("check", "recipe.yaml", "--set", "models.a=org/a").rc == 0


def test_a_merge_names_what_lies_beside_a_path(zoo: Zoo) -> None:
    zoo.family(llama(1), 2)
    zoo.recipe("models: {a: ./a, c: ./bse}\nmethod: linear\n")
    ran = zoo.here("merge", "recipe.yaml", "--dry-run")
    assert ran.rc == SOURCE
    assert "recipe.yaml:1: there is no folder or file './bse'\n  -> did you mean 'base'?" in ran.err


COUNTED = [n for n in METHODS if registry.get(n).count or registry.get(n).at_least > 1]


@pytest.mark.parametrize("name", COUNTED)
def test_another_number_of_models_than_it_takes(zoo: Zoo, name: str) -> None:
    spec = registry.get(name)
    wrong = ["abc"] + ["a"] * ((spec.count or spec.at_least) > 1)
    for letters in wrong if spec.count else wrong[1:]:
        ran = checked(zoo, **taken(name) | {"models": {each: f"o/{each}" for each in letters}})
        assert (ran.rc, ran.out) == (RECIPE, "")
        assert f"'{name}' takes " in ran.err
        assert f"not {len(letters)}" in ran.err


def test_methods_of_two_are_among_those() -> None:
    assert {"slerp", "nuslerp", "model_stock", "mow", "rmm", "passthrough"} <= {*COUNTED}


@pytest.mark.parametrize(("name", "word"), RANKED)
def test_a_rank_above_that_of_every_matrix(zoo: Zoo, name: str, word: str) -> None:
    zoo.family(llama(1), 2)
    given = {"codec": "low_rank"} if name == "mow" else {}
    ran = checked(zoo, method=name, parameters={**given, word: 17})
    assert (ran.rc, ran.out) == (CHECKPOINT, "")
    assert f"parameters.{word} is 17, and no matrix has a rank above 16" in ran.err
    assert checked(zoo, method=name, parameters={**given, word: 16}).rc == 0


def test_the_rank_of_an_adapter(zoo: Zoo) -> None:
    zoo.family(llama(1), 2)
    ran = checked(zoo, method="linear", output={"format": "adapter", "rank": 17})
    assert ran.rc == CHECKPOINT
    assert "output.rank is 17, and no matrix has a rank above 16" in ran.err


SLICED = [n for n in METHODS if not registry.get(n).dynamic and not registry.get(n).fit]


@pytest.mark.parametrize("name", SLICED)
def test_slices_past_the_depth(zoo: Zoo, name: str) -> None:
    zoo.family(llama(2), registry.get(name).count or 2)
    ran = checked(zoo, method=name, slices=[{"layers": "0..1"}, {"layers": "1..2"}])
    assert (ran.rc, ran.out) == (CHECKPOINT, "")
    assert "slices.1: layers 1..2 of 'a', which has 2 (0..1)" in ran.err


UNFITTED = [n for n in METHODS if not registry.get(n).fit]


@pytest.mark.parametrize("name", UNFITTED)
def test_models_of_other_shapes(zoo: Zoo, name: str) -> None:
    zoo.family(llama(1), registry.get(name).count or 2)
    zoo.save("a", {n: torch.ones(shape) for n, shape in llama(1, hidden=32).items()})
    ran = checked(zoo, method=name)
    assert (ran.rc, ran.out) == (CHECKPOINT, "")
    assert "has the shape" in ran.err
    assert "only models of one architecture can be merged" in ran.err


@pytest.mark.parametrize("name", UNFITTED)
def test_tokenizers_that_cannot_be_reconciled(zoo: Zoo, name: str) -> None:
    count = registry.get(name).count or 2
    for model in ["base", *"ab"[:count]]:
        save(zoo, model, words(listed(["<unk>", "x", "y"])), rows(1, 2, 3))
    swapped = words(listed(["<unk>", "y", "x"]))
    save(zoo, "a", swapped, rows(1, 3, 2))
    ran = checked(zoo, method=name)
    assert (ran.rc, ran.out) == (CHECKPOINT, "")
    assert "the token 'x' has id 1 in the tokenizer that is written and 2 in that of 'a'" in ran.err
    swapped["model"] = {"type": "Unigram", "vocab": [["<unk>", 0], ["x", -1], ["y", -2]],
                        "unk_id": 0}  # fmt: skip
    save(zoo, "a", swapped, rows(1, 2, 3))
    ran = checked(zoo, method=name, vocabulary={})
    assert (ran.rc, ran.out) == (CHECKPOINT, "")
    assert "name whose tokens the output has" in ran.err
