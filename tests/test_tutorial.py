"""Every command of docs/tutorial.md, in its order, on a zoo that is hardly trained."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest

from mowmerge.demo import tour, vit, zoo
from tests.zoo import ROOT, Zoo

TEXT = (ROOT / "docs/tutorial.md").read_text("utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def short(text: str) -> str:
    """A recipe whose splits are cut to a few samples."""
    return text.replace("    type:", "    limit: 24\n    type:")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Zoo]:
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        patch.setattr(vit, "BASE_STEPS", 2)
        patch.setattr(vit, "STEPS", 1)
        patch.setattr(zoo, "PROCESSES", 1)
        patch.setattr(
            tour, "MERGES", {k: replace(m, steps=m.steps and 2) for k, m in tour.MERGES.items()}
        )
        patch.setattr(tour, "recipe", lambda name, whole=tour.recipe: short(whole(name)))
        yield Zoo(tmp_path)


def test_every_command_runs(here: Zoo) -> None:
    ran = []
    for kind, body in BLOCK.findall(TEXT):
        if kind == "yaml" and body.startswith("# "):
            name, _, recipe = body.partition("\n")
            (here.folder / name.removeprefix("# ")).write_text(short(recipe), "utf-8")
        elif kind == "python":
            with chdir(here.folder):
                exec(body)
        elif kind == "sh":
            for line in body.splitlines():
                program, *words = shlex.split(line)
                assert program == "mowmerge"
                quick = ["--steps", "5"] if words[0] == "train-router" else []
                done = here.here(*words, *quick)
                barred = "--fail-under" in words  # these experts know nothing
                assert done.rc == (7 if barred else 0), f"{line}\n{done.err}"
                ran.append(words[0])
    assert ran.count("merge") == 5 and set(ran) >= {"demo", "train-router", "eval", "push"}
    assert (here.folder / "zoo/report/report.html").stat().st_size < 1e6
    assert (here.folder / "merged/twin-eval/report.html").is_file()
    assert (here.folder / "digits-again/config.json").is_file()
