"""What a plan says of memory holds: large tensors through each registered method.

Each merge runs in a child of one process that has all modules loaded, and what the child's memory
grew by is set beside what the plan states beyond what any process takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from zoo import Zoo, environment

from mowmerge.memory import RUNTIME
from mowmerge.methods import registry

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
SLACK, EACH = 16 << 20, 4 << 20  # bytes that an allocator may keep or not: in all, and a worker's
FAMILIES: dict[str, tuple[int, int, int, str]] = {  # tensors, rows, columns, dtype
    "tiny": (1, 64, 512, "bfloat16"),
    "tall": (1, 16_384, 256, "bfloat16"),  # 16 MiB in fp32, and still quick to decompose
    "square": (1, 2048, 2048, "bfloat16"),  # where few of many triplets are kept
    "single": (1, 16_384, 256, "float32"),
    "many": (8, 4096, 512, "bfloat16"),  # each of them a task
    "some": (4, 8192, 256, "bfloat16"),
}
GIVEN: dict[str, dict[str, Any]] = {
    "wudi": {"steps": 2},  # as much memory at once as with all
    "doge": {"steps": 2},
    "wudi closed": {"solver": "closed"},
    "wudi leading": {"solver": "closed", "interference": "leading"},
    "drm vertical": {"direction": "vertical"},
    "knots global": {"density": 0.3},
    "ties tensor": {"trim": "tensor", "elect": "normmass"},
    "twin_merging magnitude": {"keep": "magnitude"},
    "tall_mask ties": {"merge": "ties"},
    "mow full": {"codec": "full"},
    "mow low_rank": {"codec": "low_rank"},
    "one_bit marked": {"zeros": "marked"},
}
OTHERS = [  # case, family, workers
    ("smile", "square", 1), ("twin_merging", "square", 1), ("rmm", "square", 1),
    ("linear", "single", 1), ("emr", "single", 1), ("smile", "single", 1),
    ("linear", "many", 8), ("slerp", "many", 8), ("ties tensor", "many", 8), ("ties", "many", 8),
    ("arcee_fusion", "many", 8), ("della", "many", 4), ("widen", "many", 8),
    ("emr", "many", 8), ("wemoe", "many", 8), ("e_wemoe", "many", 8), ("bitdelta", "many", 8),
    ("iso_c", "some", 4), ("tsv_m", "some", 4), ("opcm", "some", 4), ("smile", "some", 4),
]  # fmt: skip
APART = {
    "adamerging": "merges as task_arithmetic; the fit before it also takes a model's activations",
    "adamerging_pp": "merges as task_arithmetic; the fit before it also takes activations",
    "pem_composition": "merges adapters alone, and whole tensors are refused",
}
CHILDREN = """
import json, os, sys
from pathlib import Path
import torch
from mowmerge import api, reduction
from mowmerge.planner import Options

reduction.SPAN = 1 << 21  # as many tasks as a large model has
torch.set_num_threads(1)

def kept(word):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[word].split()[0]) * 1024

def family(name, tensors, rows, columns, dtype):
    from safetensors.torch import save_file
    kind, base = getattr(torch, dtype), torch.randn(rows, columns)
    for model in ("base", "a", "b", "c"):
        value, held = base if model == "base" else base + 0.01 * torch.randn(rows, columns), {}
        for i in range(tensors):
            at = f"model.layers.{i}."
            held[f"{at}mlp.up_proj.weight"] = (value * 1.01**i).to(kind)
            for norm in ("input", "post_attention"):
                held[f"{at}{norm}_layernorm.weight"] = torch.ones(columns, dtype=kind)
        folder = Path(f"{name}-{model}")
        folder.mkdir()
        save_file(held, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": dtype}))

def measured(method, parameters, wants_base, count, workers, which):
    def run(name):
        models = {model: f"./{name}-{model}" for model in "abc"[:count]}
        content = {"method": method, "models": models, "parameters": parameters}
        if wants_base:
            content["base"] = f"./{name}-base"
        Path(f"{name}.yaml").write_text(json.dumps(content))
        options = Options(workers=workers)
        return api.merge(f"{name}.yaml", "out", options=options, hashes=False, force=True)

    run("tiny")  # what is set up at the first merge
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    floor, code = kept("VmRSS"), kept("RssFile")
    done = run(which)
    code = kept("RssFile") - code  # of libraries, which is in what any process takes
    return [floor, kept("VmHWM") - code, done.report["planned_peak_bytes"]]

def in_child(work, *args):
    child = os.fork()
    if child == 0:
        try:
            print(json.dumps(work(*args)), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)

for each in json.loads(sys.argv[1]):
    in_child(family, *each)
for line in sys.stdin:
    in_child(measured, *json.loads(line))
"""


class Told(NamedTuple):
    """Bytes before a large merge, at its peak, and at the peak as the plan has it."""

    floor: int
    peak: int
    stated: int


class Measuring:
    """A process that measures merges in children of its own."""

    def __init__(self, zoo: Zoo) -> None:
        families = json.dumps([(name, *sizes) for name, sizes in FAMILIES.items()])
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILDREN, families], cwd=zoo.folder, text=True,
            env=environment(OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(zoo.folder / "cache")),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        for _ in FAMILIES:
            self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline() or '"it ended"')

    def __call__(self, case: str, family: str, workers: int) -> Told:
        method = registry.get(case.partition(" ")[0])
        based = bool(method.wants_base or method.dynamic)
        asked = [
            method.name, GIVEN.get(case, {}), based, method.count or 3, workers, family,
        ]  # fmt: skip
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return Told(*self._answer())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measuring]:
    made = Measuring(Zoo(tmp_path_factory.mktemp("memory")))
    yield made
    made.close()


def cases() -> list[Any]:
    """Every method, with parameters that make it hold something else too; other tensors, and
    several workers, whose peaks meet or do not, for some of each scope and codec."""
    names = [*registry.names(), *(case for case in GIVEN if case not in registry.names())]
    each = [*((name, "tall", 1) for name in names if name not in APART), *OTHERS]
    return [pytest.param(*case, marks=[pytest.mark.slow] if case[2] > 1 else []) for case in each]


@pytest.mark.parametrize(("case", "family", "workers"), cases())
def test_the_peak_is_what_the_plan_says(
    measured: Measuring, case: str, family: str, workers: int
) -> None:
    found = measured(case, family, workers)
    grown, planned = found.peak - found.floor, found.stated - RUNTIME
    told = (
        f"{case}, {family}, {workers}: {grown / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB:"
        f" {planned / grown:.2f}; in all {found.peak / 1e6:.0f}, stated {found.stated / 1e6:.0f}"
    )
    print(told)
    assert RUNTIME + grown <= 1.1 * found.stated, told
    if family != "some":  # several workers' matrices need not be there at once
        assert planned <= 4 / 3 * grown + SLACK + workers * EACH, told


def test_methods_that_are_not_tried_are_known() -> None:
    assert set(APART) <= set(registry.names())


def test_a_process_takes_no_more_than_is_said_of_it(zoo: Zoo) -> None:
    """A whole command, with all that is loaded for it."""
    zoo.family("llama", 3)
    zoo.recipe({"method": "ties"})
    code = (
        "import sys\nfrom mowmerge.cli import main\nsys.argv = ['mowmerge', 'merge', 'recipe.yaml',"
        " 'out', '--workers', '1', '--quiet']\ntry:\n    main()\nfinally:\n    lines ="
        " open('/proc/self/status').read().splitlines()\n    print(*[line for line in lines if"
        " 'VmHWM' in line])"
    )
    ran = zoo.python(code)
    assert 0.6 * RUNTIME < int(ran.out.split()[1]) * 1024 < 1.1 * RUNTIME, ran
