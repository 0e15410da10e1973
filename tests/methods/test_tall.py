"""Tall matrices at a rank: what is found by rows is what the whole matrix has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.costs import SHAPES
from bench.header_only import header_only
from made import made
from torch import Tensor
from zoo import Zoo, load, raw

from mowmerge import api, planner
from mowmerge.dynamic.format import Code
from mowmerge.errors import CheckpointError
from mowmerge.memory import working_bytes
from mowmerge.methods.contracts import Block, Draws
from mowmerge.methods.dynamic.twin_merging import twin_merging
from mowmerge.methods.ops import exclusive, tall
from mowmerge.plan import RUN
from mowmerge.planner import Options
from mowmerge.reduction import driven


def turns(models: Tensor, anchor: Tensor, rank: int, height: int = 700) -> Sequence[tall.Turn]:
    """Of a reduction over blocks of so many rows."""
    shape = tuple(anchor.shape)

    def fill(fold: Any) -> Any:
        fold = fold.fresh()
        for at in range(0, shape[0], height):
            rows = slice(at, at + height)
            fold.observe(Block(models[:, rows], {}, Draws(), anchor.numel(), anchor=anchor[rows]))
        return fold

    found: Sequence[tall.Turn] = driven(tall.turns(rank, exclusive), fill)
    return found


def falling(rows: int, columns: int, seed: int) -> Tensor:
    """A matrix of singular values 1, 1/2, 1/4 ..."""
    draws = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, columns, generator=draws, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    return ((left * 0.5 ** torch.arange(columns)) @ right.T).float()


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_cut_is_the_best_of_its_rank_and_says_what_it_loses(rank: int) -> None:
    anchor = torch.randn(3000, 24, generator=torch.Generator().manual_seed(1))
    models = torch.stack([anchor + falling(3000, 24, seed) for seed in (2, 3)])
    found = turns(models, anchor, rank)
    for model, turn in zip(models, found, strict=True):
        delta = (model - anchor).double()
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        ours = turn.left(model - anchor) @ turn.right
        torch.testing.assert_close(ours.double(), best, rtol=0, atol=2e-7)
        least = float((delta - best).norm() / delta.norm())
        assert float(turn.lost) == pytest.approx(least, rel=1e-4, abs=1e-6)
        balance = turn.left(model - anchor).norm(dim=0) / turn.right.norm(dim=1)
        torch.testing.assert_close(balance, torch.ones(rank), rtol=1e-3, atol=0)


def test_blocks_decide_nothing() -> None:
    rows, found = torch.randn(1, 2500, 9), []
    for height in (2500, 37, 1):
        fold = tall._Products(lambda block: block.values)
        for at in range(0, 2500, height):
            fold.observe(Block(rows[:, at : at + height], {}, Draws(), rows.numel()))
        found += fold.each()
    assert all(torch.equal(found[0], one) for one in found)
    square = rows[0].double().T @ rows[0].double()
    torch.testing.assert_close(found[0].tril(), square.tril())


def test_what_is_nothing_or_of_a_lower_rank_has_zeros_behind() -> None:
    anchor = torch.randn(800, 9)
    pair = torch.randn(800, 2) @ torch.randn(2, 9)
    nothing, two = turns(torch.stack([anchor, anchor + pair]), anchor, 5)
    assert not nothing.across.any() and not nothing.right.any() and nothing.lost == 0
    assert two.right[:2].norm(dim=1).all() and not two.right[2:].any()
    torch.testing.assert_close(two.left(pair) @ two.right, pair, rtol=0, atol=1e-4)


def test_only_tall_matrices_that_are_cut_are_read_by_rows() -> None:
    for shape, codec in (((800, 101), "low_rank"), ((800,), "full"), ((800, 9), "full"),
                         ((800, 3, 3, 3), "low_rank"), ((0, 0), "low_rank")):  # fmt: skip
        assert not tall.by_rows(Code("w", shape, codec, 2, "0"))
    assert tall.by_rows(Code("w", (800, 100), "low_rank", 2, "0"))


def test_a_table_through_a_merge_is_what_the_function_makes_of_it(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, density = "model.embed_tokens.weight", 0.34  # in runs of 2184 rows, and one of 1
    models = zoo.family({name: (4369, 30), "model.norm.weight": (30,)}, 3)
    content = {"method": "twin_merging", "parameters": {"density": density}}
    tensors, report = zoo.merge(content, "one", workers=1)
    monkeypatch.setattr(planner, "BLOCK", RUN)
    assert raw(zoo.merge(content, "two", workers=2)[0]) == raw(tensors)
    found = made(zoo.folder / "one")
    anchor, code = found.tensors[name], found.codes[name]
    assert (code.codec, code.rank) == ("low_rank", 10)
    each = torch.stack([models[e][name] for e in "abc"])
    whole = twin_merging(each, anchor, code, density=density)  # by LAPACK, without a state
    for k, slot in enumerate(found.slots(name)):
        theirs = whole["u"][:, 10 * k : 10 * k + 10] @ whole["v"][10 * k : 10 * k + 10]
        torch.testing.assert_close(slot.float(), theirs, rtol=0, atol=2e-5)
    (told,) = [t for t in report["tensors"] if t["name"] == name]
    assert told["svd"] == "exact"
    assert told["lost"] == pytest.approx(whole["lost"].tolist(), rel=1e-4)


def test_an_anchor_of_the_whole_tensor_is_made_once(zoo: Zoo) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    zoo.family({name: (900, 30), "model.norm.weight": (30,)}, 3)
    content = {"method": "twin_merging", "rest": {"method": "iso_c"}}
    plan = api.plan(zoo.recipe(content))
    job = next(job for job in plan.jobs if job.output.name == name)
    assert job.scope == "row" and job.anchor is not None and job.anchor.matrix
    zoo.merge(content)
    found = made(zoo.folder / "out")
    zoo.merge({"method": "iso_c"}, "static")
    assert torch.equal(found.tensors[name], load(zoo.folder / "static")[name])


def test_a_nan_in_a_table_is_named(zoo: Zoo) -> None:
    name = "model.embed_tokens.weight"
    models = zoo.family({name: (900, 30), "model.norm.weight": (30,)}, 2)
    models["b"][name][877, 3] = float("nan")
    zoo.save("b", models["b"])
    with pytest.raises(CheckpointError, match=f"'{name}' holds NaN") as caught:
        zoo.merge({"method": "twin_merging"})
    assert caught.value.problems[0].where == "model 'b'"


@pytest.mark.parametrize("size", ["8B", "70B"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("twin_merging", {}), ("mow", {"codec": "low_rank", "embeddings": "all", "others": True})],
)
def test_vocabulary_tables_are_not_what_takes_the_memory(
    tmp_path: Path, size: str, method: str, parameters: dict[str, Any]
) -> None:
    header_only(tmp_path / size, **SHAPES[size])
    (tmp_path / "recipe.yaml").write_text(
        f"version: 1\nbase: ./{size}\nmethod: {method}\n"
        f"models: {{a: ./{size}, b: ./{size}, c: ./{size}}}\nparameters: {parameters}\n"
    )
    plan = api.plan(tmp_path / "recipe.yaml", options=Options(workers=1, download=False))
    tables = [job for job in plan.jobs if job.output.shape[:1] == (128256,)]
    assert {(job.scope, job.code.codec if job.code else "") for job in tables} == {
        ("row", "low_rank")
    }
    columns = tables[0].output.shape[1]
    products = 3 * 8 * columns**2
    for job in tables:
        assert products < working_bytes(job, plan.block) < 4 * products
