"""What a plan says of memory holds: a large tensor through each registered method."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from zoo import Zoo

from mowmerge.memory import RUNTIME
from mowmerge.methods import registry

SHAPE = (32_768, 512)  # 64 MiB in fp32, and still quick to decompose
GIVEN: dict[str, dict[str, Any]] = {
    "wudi": {"steps": 2},  # as much memory at once as with all
    "doge": {"steps": 2},
    "wudi closed": {"solver": "closed"},
    "wudi leading": {"solver": "closed", "interference": "leading"},
    "wudi leading adam": {"steps": 2, "interference": "leading"},
    "drm vertical": {"direction": "vertical"},
    "knots vertical": {"direction": "vertical", "trim": "tensor"},
    "knots tensor": {"trim": "tensor"},
    "knots global": {"density": 0.3},
    "ties tensor": {"trim": "tensor", "elect": "normmass"},
}
QUICK = ("linear", "ties", "iso_c")
MEASURED = """
import json, sys
from pathlib import Path
from mowmerge import api
from mowmerge.planner import Options

def kept(word):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[word].split()[0]) * 1024

def run(recipe, out):
    return api.merge(recipe, out, options=Options(workers=1, stats=stats), hashes=False)

stats = sys.argv[1] == "stats"
run("small.yaml", "small-out")  # what is imported and set up at the first merge
Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
floor = kept("VmRSS")
done = run("large.yaml", "large-out")
print(json.dumps([floor, kept("VmHWM"), done.report["planned_peak_bytes"]]))
"""
MB = 1e6


def cases() -> list[Any]:
    """Every static method; most of them are slow to try."""
    names = [name for name in registry.names() if registry.get(name).family == "static"]
    names.remove("pem_composition")  # of adapters alone, and refused for what is a whole tensor
    names += [case for case in GIVEN if case not in names]
    return [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("case", cases())
def test_the_peak_is_what_the_plan_says(zoo: Zoo, case: str) -> None:
    name = case.partition(" ")[0]
    method = registry.get(name)
    models = dict.fromkeys("abc"[: method.count or 3])
    if method.needs_factors(method.complete({})):
        pytest.skip("for adapters alone")
    for size, shape in (("small", (4, 256)), ("large", SHAPE)):
        base = torch.randn(shape)
        for model in ("base", *models):
            value = base if model == "base" else base + 0.01 * torch.randn(shape)
            zoo.save(f"{size}-{model}", {"model.layers.0.mlp.up_proj.weight": value.bfloat16()})
        needed = method.wants_base and not method.base_optional
        zoo.recipe({
            "method": name, "models": {m: f"./{size}-{m}" for m in models},
            "base": f"./{size}-base" if needed or method.wants_base else None,
            "parameters": GIVEN.get(case, {}),
        }, size)  # fmt: skip
    del base, value
    ran = zoo.python(MEASURED, "bare")
    assert ran.rc == 0, ran.err
    floor, peak, stated = json.loads(ran.out)
    told = f"{case}: {peak / MB:.0f} MB, stated {stated / MB:.0f} MB, floor {floor / MB:.0f} MB"
    print(told, f"({(peak - floor) / MB:.0f} of {(stated - RUNTIME) / MB:.0f})")
    assert peak <= 1.1 * stated, told
    assert stated <= 1.5 * peak, told
