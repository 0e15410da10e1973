"""The manifest comes back as it was written, and what contradicts itself is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mowmerge.dynamic import names
from mowmerge.dynamic.format import FORMAT, Code, FormatError, Gate, Head, Manifest, Router

CODES = (
    Code("a.weight", (4, 6), "low_rank", 2, "g", rank=2),
    Code("a.bias", (4,), "full", 2, "g"),
    Code("b", (1, 4), "one_bit", 2, "h", dtype="BF16", zeros=True),
)
MANIFEST = Manifest(
    "mow", ("x", "y"), CODES, {"g": Gate("sample", "r", 0.3), "h": Gate("block", "s", index=4)},
    {"r": Router("linear", 8, 2, layer=3), "s": Router("mlp", 8, 2, activation="none")},
    (Head("x", {"model_type": "vit"}), Head("y", {"model_type": "vit"})), "ViTForImage",
)  # fmt: skip


def test_manifest_comes_back_through_json() -> None:
    assert Manifest.from_json(json.loads(json.dumps(MANIFEST.to_json()))) == MANIFEST


def test_parts_are_named_beside_their_tensor() -> None:
    assert CODES[0].part_name("u") == "a.dyn_u"
    assert CODES[1].part_name("delta") == "a.bias.dyn_delta"
    assert CODES[2].part_name("sign") == "b.dyn_sign"


def test_heads_have_their_experts_names_where_those_are_plain() -> None:
    assert [names.head(("x", "the-y"), i) for i in (0, 1)] == ["mow_heads.x.", "mow_heads.the-y."]
    for odd in ("1", "org/y", "y.2", ""):
        assert names.head(("x", odd), 0) == "mow_heads.0."


@pytest.mark.parametrize("there", ["a.bias.dyn_u", "cls.dyn_u", "mow_heads.x.dense.weight"])
def test_patterns_read_both_ways(there: str) -> None:
    pairs = names.patterns(("a.weight", "a.bias", "cls"), ("x", "y"))
    here = there
    for disk, memory in pairs:
        here = re.sub(disk, plain(memory), here)
    assert here in ("a.bias_dyn_u", "cls_dyn_u", "mow_heads.0.dense.weight")
    back = here
    for disk, memory in pairs:
        back = re.sub(memory, plain(disk), back)
    assert back == there


def plain(pattern: str) -> str:
    """What a pattern stands for."""
    return pattern.removeprefix("^").replace("(?<![^.])", "").replace("\\.", ".")


def test_gate_is_as_wide_as_the_inputs() -> None:
    stored_in_out = Code("a.weight", (6, 4), "full", 2, "g", gate_rank=3, gate_width=6)
    assert stored_in_out.parts["gate"].shape == (6, 6)


def _edit(where: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def edit(held: dict[str, Any]) -> None:
        place: Any = held
        for key in where.split("."):
            place = place[int(key) if key.isdigit() else key] if key else place
        place.update(values)

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_edit("", format=FORMAT + 1), "upgrade mowmerge"),
        (_edit("", format=None), "upgrade mowmerge"),
        (_edit("tensors.0", codec="zip"), "'a.weight' has codec 'zip'"),
        (_edit("tensors.0", colour=1), "damaged"),
        (_edit("tensors.1", slots=3), "'a.bias' has 3 slots for 2 experts"),
        (_edit("", experts=["x", "y", "z"]), "2 slots for 3 experts"),
        (_edit("routers.r", outputs=3), "3 outputs for the 2 slots"),
        (_edit("routers.r", pool="median"), "router 'r' of kind linear cannot pool .* 'median'"),
        (_edit("routers.s", pool="statistics"), "router 's' of kind mlp cannot pool"),
        (_edit("gates.g", scope="moon"), "gate 'g' has an unknown scope"),
        (_edit("gates.g", router="none"), "gate 'g' has an unknown scope or router"),
        (_edit("gates", spare={"scope": "task"}), "gate 'spare' has no tensor"),
        (_edit("", heads=[{"expert": "x", "config": {}}]), "1 heads for 2 experts"),
        (_edit("", encoder={"reads": "minds"}), "an encoder that reads .minds."),
    ],
)
def test_contradiction_is_refused(edit: Callable[[dict[str, Any]], None], says: str) -> None:
    held = json.loads(json.dumps(MANIFEST.to_json()))
    edit(held)
    with pytest.raises(FormatError, match=says):
        Manifest.from_json(held)


def test_the_number_is_the_oldest_that_can_say_it() -> None:
    assert MANIFEST.to_json()["format"] == 5
    plain = replace(MANIFEST.codes[2], name="b.weight")
    plain = replace(MANIFEST, codes=(MANIFEST.codes[0], plain), heads=())
    wide = replace(MANIFEST.routers["r"], pool="statistics")
    top = replace(MANIFEST.routers["s"], top_k=1)
    for changed, number in (({}, 1), ({"r": wide}, 2), ({"s": top}, 2)):
        made = replace(plain, routers={**MANIFEST.routers, **changed})
        held = made.to_json()
        assert held["format"] == number
        assert Manifest.from_json(held) == made
    shared = replace(MANIFEST.codes[0], codec="basis", rank=2, basis=1)
    made = replace(plain, codes=(shared, plain.codes[1]))
    assert made.to_json()["format"] == 4
    assert Manifest.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_format_loads_no_torch() -> None:
    code = "import sys, mowmerge.dynamic.format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
