"""Planning a merge of three 70B checkpoints takes under a second and loads no torch."""

from __future__ import annotations

import json
from pathlib import Path

from bench.header_only import header_only
from zoo import Zoo

TIMED = """
import json, sys, time
from mowmerge.api import plan
took = []
for _ in range(3):
    began = time.process_time()
    planned = plan("recipe.yaml")
    took.append(time.process_time() - began)
print(json.dumps([min(took), len(planned.jobs), len(planned.shards), planned.read_bytes,
                  planned.write_bytes, "torch" in sys.modules]))
"""


def test_three_70b_checkpoints_are_planned_in_a_second(zoo: Zoo) -> None:
    for name in ("base", "a", "b"):
        header_only(zoo.folder / name)
    zoo.recipe({
        "method": "ties",
        "parameters": {"trim": "tensor", "density": [0.2, 0.5], "weight": {"a": [0, 1, 0.5]}},
        "rules": [{"match": {"role": "norm"}, "method": "linear"},
                  {"match": {"layers": "70..79"}, "parameters": {"scale": 0.5}}],
        "base": "./base",
        "models": {"a": "./a", "b": "./b"},
    })  # fmt: skip
    ran = zoo.python(TIMED)
    assert ran.rc == 0, ran.err
    seconds, jobs, shards, read, write, torch_loaded = json.loads(ran.out)
    parameters = sum(p.stat().st_size for p in Path(zoo.folder / "a").glob("*.safetensors")) / 2
    assert (jobs, torch_loaded) == (80 * 9 + 3, False)
    assert 69e9 < parameters < 72e9
    assert abs(write - 2 * parameters) < 1e6
    assert abs(read - 6 * parameters) < 1e6
    assert write / 5e9 <= shards <= write / 4e9
    assert seconds < 1
