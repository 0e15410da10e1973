"""The registry: what it finds, what it reads from a signature, and that it loads no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest

from mowmerge.errors import RecipeError
from mowmerge.methods import registry
from mowmerge.methods.contracts import MethodError, NonNegative, PerModel, Seed, Unit
from mowmerge.methods.registry import merge_method

ROOT = Path(__file__).parents[2]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry of its own, so that a test's methods are forgotten."""
    monkeypatch.setattr(registry, "_found", dict(registry._found))
    registry._plugins.cache_clear()
    yield
    registry._plugins.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = [EntryPoint(name, value, "mowmerge.methods") for name, value in points]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    registry._plugins.cache_clear()


def test_names_are_the_files() -> None:
    files = (ROOT / "mowmerge/methods/static").glob("[!_]*.py")
    assert {file.stem for file in files} <= set(registry.names())
    assert registry.names() == sorted(registry.names())
    assert {"linear", "slerp", "ties"} <= set(registry.names())


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(RecipeError, match="no method 'tise'") as caught:
        registry.get("tise")
    assert caught.value.problems[0].hint == "did you mean 'ties'?"
    with pytest.raises(RecipeError) as caught:
        registry.get("quaternion")
    assert "linear" in caught.value.problems[0].hint


def test_describing_every_method_loads_no_torch() -> None:
    program = """
import sys
from mowmerge.methods import registry
for name in registry.names():
    spec = registry.get(name)
    spec.check(spec.complete({}), spec.count or 2)
    spec.scope(spec.complete({})), spec.summary, spec.needs_base
    assert all(p.help and not p.fault(p.default) for p in spec.parameters.values())
loaded = {"torch", "numpy", "transformers", "safetensors"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_what_is_read_from_a_signature(room: None) -> None:
    @merge_method(paper="none", at_least=2, laws={"scale": {"share": 1.0}})
    def every_kind(
        deltas: Any,
        *,
        weight: PerModel[float] = 1.0,
        share: PerModel[Unit] = 0.5,
        ridge: NonNegative = 1e-6,
        rank: int = 4,
        seed: Seed = 0,
        on: bool = True,
        how: Literal["this", "that"] = "that",
        base: Any = None,
        rng: Any = None,
        state: Any = None,
    ) -> Any:
        """The first line.

        Args:
            weight: a coefficient
                on two lines: of help.
            share: in 0..1.

        Source: none.
        """

    spec = registry.get("every_kind")
    assert spec.function is every_kind
    assert spec.inputs == {"deltas", "base", "rng", "state"}
    assert spec.values == "deltas"
    assert spec.needs_base
    assert spec.base_optional
    assert spec.summary == "The first line."
    kinds = {name: (p.kind, p.per_model, p.range) for name, p in spec.parameters.items()}
    assert kinds == {
        "weight": ("number", True, ""),
        "share": ("number", True, "0..1"),
        "ridge": ("number", False, "at least 0"),
        "rank": ("integer", False, ""),
        "seed": ("integer", False, "0..9.22337e+18"),
        "on": ("boolean", False, ""),
        "how": ("choice", False, ""),
    }
    assert spec.parameters["how"].choices == ("this", "that")
    assert spec.parameters["weight"].help == "a coefficient on two lines: of help."
    assert spec.parameters["share"].help == "in 0..1."
    assert spec.complete({"share": 0.2})["share"] == 0.2
    assert spec.complete({})["how"] == "that"
    assert spec.holds("scale", spec.complete({"share": 1.0}))
    assert not spec.holds("scale", spec.complete({}))
    assert not spec.holds("identity", spec.complete({}))
    with pytest.raises(MethodError, match="at least 2 models, not 1"):
        spec.check(spec.complete({}), 1)


def test_the_faults_of_a_value_are_told() -> None:
    parameters = registry.get("dare").parameters
    assert parameters["density"].fault(1.5) == "must be 0..1"
    assert parameters["density"].fault("half") == "must be a number"
    assert parameters["density"].fault(float("nan")) == "must be finite"
    assert parameters["mask"].fault("randon") == "must be one of random, magnitude"
    assert parameters["seed"].fault(0.5) == "must be an integer"
    assert parameters["seed"].fault(-1).startswith("must be 0..")
    assert registry.get("linear").parameters["normalize"].fault(1) == "must be true or false"


def test_a_parameter_needs_a_default(room: None) -> None:
    with pytest.raises(TypeError, match="'weight' has no default"):

        @merge_method(paper="none")
        def forgotten(models: Any, *, weight: float) -> Any:
            """Nothing."""


def test_an_unknown_law_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown laws"):
        merge_method(paper="none", laws=("idempotence",))


PLUGIN = '''
from mowmerge.methods.registry import merge_method


@merge_method(paper="none")
def halved(models, *, by: float = 2.0):
    """The first model over a number.

    Args:
        by: the number.
    """
    return models[0] / by
'''


@pytest.mark.parametrize("module", ["plugin_alone", "plugin_pack.methods"])
def test_another_package_adds_a_method(
    room: None, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / (module.replace(".", "/") + ".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    install(monkeypatch, ("halved", f"{module}:halved"))
    assert "halved" in registry.names()
    assert module not in sys.modules  # names import nothing
    spec = registry.get("halved")
    assert spec.parameters["by"].help == "the number."
    assert spec.origin == module.partition(".")[0]


def test_a_name_taken_twice_is_refused(room: None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ("ties", "other.package:ties"))
    with pytest.raises(RecipeError, match="provided twice"):
        registry.names()
    install(monkeypatch, ("mine", "one.package:mine"), ("mine", "other.package:mine"))
    with pytest.raises(RecipeError, match=r"other.package:mine.*provided twice"):
        registry.names()
