"""Tables of which experts change few rows are stored row by row, exactly, in any blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made import made
from torch import Tensor
from zoo import Zoo, raw

from mowmerge import api
from mowmerge.errors import CheckpointError
from mowmerge.methods.contracts import Block, Draws, Site
from mowmerge.methods.tables import ChangedRows, kept_whole
from mowmerge.planner import Options

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def family(zoo: Zoo, rows: Mapping[str, list[int]], dtype: Any = torch.float32) -> Any:
    """Experts that differ from the base's table in these rows, and everywhere else."""
    models = zoo.family("llama", 2, dtype=dtype)
    for name, changed in rows.items():
        table = models["base"][TABLE].clone()
        table[changed] = models[name][TABLE][changed]
        models[name] |= {TABLE: table}
        zoo.save(name, models[name])
    return models


def test_rows_are_counted_whatever_the_blocks() -> None:
    deltas = torch.zeros(2, 6, 5)
    deltas[0, 1, 4] = deltas[0, 4, 0] = deltas[1, 2] = 1
    flat = deltas.view(2, -1)
    for size in (1, 3, 5, 7, 12, 30):
        fold, rest = ChangedRows(5).fresh(), ChangedRows(5)
        for i, start in enumerate(range(0, 30, size)):
            block = Block(flat[:, start : start + size], {}, Draws(start=start), 30)
            (rest if i % 2 else fold).observe(block)
        if rest._changed is not None:
            fold.merge(rest)
        assert fold.total.tolist() == [2, 1], size


def test_the_smaller_code_is_taken() -> None:
    site = Site("t.weight", (100, 8), "F32", "embedding", None, None, 0, 8, 2)
    few, many, none = ({"rows": {"t.weight": n}} for n in ([5, 3], [100, 90], [0, 0]))
    code = kept_whole(site, few)
    assert code is not None
    assert (code.codec, code.kept, code.each) == ("row_sparse", 8, (5, 3))
    codecs = [c and c.codec for c in (kept_whole(site, many), kept_whole(site, None))]
    assert codecs == ["full", "full"]
    assert kept_whole(site, none) is None


@pytest.mark.parametrize("method", ["bitdelta", "one_bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_come_back_and_the_file_is_smaller(zoo: Zoo, method: str, dtype: Any) -> None:
    rows = {"a": [3, 17, 4], "b": [23]}
    models = family(zoo, rows, dtype)
    _, report = zoo.merge({"method": method})
    found = made(zoo.folder / "out")
    code = found.codes[TABLE]
    assert (code.codec, code.each) == ("row_sparse", (3, 1))
    assert found.parts(code)["rowidx"].tolist() == [3, 4, 17, 23]
    assert found.parts(code)["ptr"].tolist() == [0, 3, 4]
    assert found.codes[HEAD].codec == "full"
    assert report["survey"]["rows"] == {TABLE: [3, 1], HEAD: [24, 24]}
    for k, name in enumerate("ab"):
        got, want = found.expert(TABLE, k), models[name][TABLE].double()
        same = [i for i in range(24) if i not in rows[name]]
        assert torch.equal(got[same], models["base"][TABLE].double()[same])
        torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6,
                                   atol=2e-3 if dtype == torch.bfloat16 else 1e-6)  # fmt: skip
    held = json.loads((zoo.folder / "out/config.json").read_text())["mowmerge"]
    assert held["format"] == 3
    assert api.inspect(zoo.folder / "out")["codes"][0]["codec"] in ("row_sparse", "full")


def test_what_nobody_changed_stays_static(zoo: Zoo) -> None:
    family(zoo, {"a": [], "b": []})
    zoo.merge({"method": "bitdelta"})
    assert TABLE not in made(zoo.folder / "out").codes


def test_the_bytes_do_not_depend_on_blocks(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from mowmerge import streaming

    family(zoo, {"a": [0, 3, 17, 18], "b": [5, 23]})
    zoo.merge({"method": "bitdelta"})
    whole = made(zoo.folder / "out").tensors
    length = streaming.block_length

    def short(block: int, job: Any, *, whole: bool) -> int:
        table = job.output.name == TABLE
        return 4 * 16 if table else length(block, job, whole=whole)

    monkeypatch.setattr(streaming, "block_length", short)
    (zoo.folder / "out").rename(zoo.folder / "first")
    zoo.merge({"method": "bitdelta"})
    assert raw(made(zoo.folder / "out").tensors) == raw(whole)


def test_the_plan_says_at_most_and_then_exactly(zoo: Zoo) -> None:
    family(zoo, {"a": [1], "b": [2]})
    recipe = zoo.recipe({"method": "bitdelta"})
    rough, exact = api.plan(recipe), api.survey(recipe)
    assert rough.undecided and not exact.undecided
    assert exact.write_bytes < rough.write_bytes
    assert api.merge(recipe, zoo.folder / "out").report["written_bytes"] == exact.write_bytes
    size = sum(f.stat().st_size for f in (zoo.folder / "out").glob("*.safetensors"))
    assert size == exact.write_bytes


@pytest.mark.parametrize("changed", [[1, 2, 7], []])
def test_rows_that_are_not_those_counted_are_an_error(zoo: Zoo, changed: list[int]) -> None:
    family(zoo, {"a": [1, 4], "b": [2]})
    recipe = api.check(zoo.recipe({"method": "bitdelta"}))
    plan = api.survey(recipe)
    models = family(zoo, {"a": changed, "b": [2]})
    assert models
    from mowmerge.engine import Engine

    class Nowhere:
        def write(self, name: str, start: int, data: memoryview) -> None:
            pass

    with pytest.raises(CheckpointError, match="not as many values to keep as were counted before"):
        Engine(replace(plan, workers=1)).run(Nowhere())


@pytest.mark.parametrize("kind", ["table", "tied"])
def test_the_model_runs_with_it(zoo: Zoo, kind: str) -> None:
    """Gates on an expert give that expert's own embedding, in batches that mix."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=24, tie_word_embeddings=kind == "tied",
    )  # fmt: skip
    plain = LlamaForCausalLM(config)
    plain.save_pretrained(zoo.folder / "base")
    held: dict[str, Tensor] = {}
    for name, rows in (("a", [3, 5]), ("b", [5, 9, 11])):
        made_ = LlamaForCausalLM.from_pretrained(zoo.folder / "base")
        with torch.no_grad():
            made_.model.embed_tokens.weight[rows] += torch.randn(len(rows), 16)
        made_.save_pretrained(zoo.folder / name)
        held[name] = made_.model.embed_tokens.weight.detach().clone()
    recipe = zoo.recipe({
        "base": "./base", "models": {"a": "./a", "b": "./b"}, "method": "bitdelta",
    })  # fmt: skip
    out = api.merge(recipe, zoo.folder / "out", options=Options(workers=1)).path
    model = api.load(out)
    assert model._manifest.codes[0].codec == "row_sparse"
    ids = torch.tensor([[3, 5, 9, 1], [3, 5, 9, 1], [11, 11, 5, 3]])
    with torch.no_grad():
        found = model(input_ids=ids, task_ids=torch.tensor([0, 1, 1])).logits
        for b, name in enumerate("abb"):
            own = LlamaForCausalLM.from_pretrained(zoo.folder / name).eval()
            torch.testing.assert_close(
                found[b : b + 1], own(input_ids=ids[b : b + 1]).logits, rtol=1e-4, atol=1e-4
            )
