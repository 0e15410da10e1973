"""Generated pages are fresh, README's commands are two, recipes carry the modeline and work."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
import torch

from mowmerge.methods import registry
from mowmerge.recipe import parse

ROOT = Path(__file__).parent.parent


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page", ["methods.md", "cli.md", "report-fields.md", "recipe.schema.json", "report.schema.json"]
)
def test_generated_page_is_fresh(page: str) -> None:
    current = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert current == _generator().pages()[page], "run `python docs/generate.py`"


def test_readme_has_one_demo_and_one_test_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- (\w+) -->\n```sh\n(.*?)\n```", text, re.S))
    assert set(blocks) == {"demo", "test"}
    assert all("\n" not in command for command in blocks.values())


def test_links_in_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (2, 3)])
def test_the_first_method_that_one_writes_takes_every_shape(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^ +```python\n( +\"\"\"Median.*?)^ +```", text, re.M | re.S)
    monkeypatch.setattr(registry, "_found", {})
    made: dict[str, Any] = {"__name__": "mowmerge.methods.static.median"}
    exec(dedent(block), made)
    deltas = torch.tensor([5.0, -1.0, 2.0]).view(3, *(1 for _ in shape)).expand(3, *shape)
    assert torch.equal(made["median"](deltas, scale=2.0), torch.full(shape, 4.0))


def _recipes() -> list[Any]:
    """Every YAML block of a page that is a recipe as it stands."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        for i, text in enumerate(blocks):
            keys = set(re.findall(r"^(\w+):", text, re.M))
            if "models" in keys and keys & {"method", "merge_method"} and ", ...}" not in text:
                found.append(pytest.param(text, id=f"{page.stem}-{i}"))
    return found


@pytest.mark.parametrize("text", _recipes())
def test_a_recipe_in_a_page_is_one(text: str) -> None:
    assert parse.loads(text).models


def test_files_are_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "mowmerge").rglob("*.py")
    }
    assert {path: n for path, n in lengths.items() if n > 400} == {}
