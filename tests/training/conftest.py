"""Every test's own cache of data sets, and checkpoints that are built once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mowmerge.dynamic.format import Router
from tests.training.checkpoints import WIDTH, Made, checkpoint

ROUTERS: dict[str, tuple[str, dict[str, Any], Router | None]] = {
    "linear": ("vit", {}, Router("linear", WIDTH, 3, layer=1)),
    "twin": ("vit", {}, Router("twin", WIDTH, 3, hidden=32)),
    "statistics": ("vit", {}, Router("twin", WIDTH, 3, hidden=64, layer=1, pool="statistics")),
    "centroid": ("vit", {}, Router("centroid", WIDTH, 3, layer=1)),
    "token": ("vit", {}, Router("mlp", WIDTH, 3, layer=1)),
    "wemoe": (
        "vit", {"scope": "block"},
        Router("mlp", WIDTH, 3, activation="none", init=0.3, objective="entropy"),
    ),
    "shared": (
        "vit", {"scope": "block"},
        Router("mlp", WIDTH, 3, code=8, activation="none", init=0.3, objective="entropy"),
    ),
    "bert": ("bert", {}, Router("linear", WIDTH, 3, layer=1, pool="statistics")),
    "llama": ("llama", {}, Router("linear", WIDTH, 3, layer=1, objective="distill")),
    "emr": ("vit", {"scope": "task"}, None),
}  # fmt: skip


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture
def make(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    _built: dict[str, Made],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Made]:
    """A checkpoint by its name in ROUTERS, the test's own copy."""

    def build(which: str, copy: str = "") -> Made:
        if which not in _built:
            kind, more, router = ROUTERS[which]
            root = tmp_path_factory.mktemp(which)
            monkeypatch.setenv("TQDM_DISABLE", "1")
            _built[which] = checkpoint(root / "zoo", kind, router, **more)
        first = _built[which]
        root = first.recipe.parent
        target = tmp_path / f"{which}{copy}"
        target.mkdir()
        shutil.copytree(first.out, target / "out")
        for file in root.iterdir():
            if file.is_file():
                shutil.copy2(file, target)
        return Made(target / "out", target / first.recipe.name, first.experts)

    return build
