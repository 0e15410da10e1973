"""The command line: what it loads, what it prints, and how it says that something is wrong."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from zoo import Ran, Zoo, environment, left, load

from mowmerge import api

RECIPE = {"method": "linear"}
COUNTED = "import sys, mowmerge.cli; sys.argv[0] = 'mowmerge'\ntry: mowmerge.cli.main()\n" \
    "finally: print(*[m for m in ('torch', 'transformers', 'safetensors', 'huggingface_hub')" \
    " if m in sys.modules], file=sys.stderr)"  # fmt: skip


# --- what is loaded


@pytest.mark.parametrize("args", [
    ["--help"], ["merge", "--help"], ["check", "recipe.yaml"], ["methods"], ["methods", "ties"],
    ["methods", "--json"], ["schema"], ["merge", "recipe.yaml", "--dry-run"],
    ["merge", "recipe.yaml", "--dry-run", "--json"],
])  # fmt: skip
def test_loads_no_torch(zoo: Zoo, args: list[str]) -> None:
    zoo.family("llama", 2)
    zoo.recipe(RECIPE)
    ran = zoo.python(COUNTED, *args)
    assert (ran.rc, ran.err.split()) == (0, [])
    assert ran.out


def test_importing_loads_no_torch(zoo: Zoo) -> None:
    code = "import mowmerge, mowmerge.api, sys; print(mowmerge.merge, 'torch' in sys.modules)"
    ran = zoo.python(code)
    assert ran.out.startswith("<function merge ")
    assert ran.out.endswith(" False\n")


def test_the_public_names_are_functions(zoo: Zoo) -> None:
    code = "import mowmerge.api; from mowmerge import check, merge; print(check, merge)"
    assert zoo.python(code).out.count("<function") == 2


def test_help_costs_little_more_than_the_libraries_that_print_it(zoo: Zoo) -> None:
    def seconds(run: Callable[[], Ran]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run().rc == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    printing = "import typer, typer.rich_utils, rich.markdown"
    libraries = min(seconds(lambda: zoo.python(printing)) for _ in range(5))
    assert min(seconds(lambda: zoo.cli("--help")) for _ in range(5)) < 1.6 * libraries


# --- what is printed


def test_json_is_one_object_on_stdout(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    zoo.recipe(RECIPE | {"rules": [{"match": {"tensors": "nothing"}, "drop": True}]})
    dry = zoo.cli("merge", "recipe.yaml", "out", "--json", "--dry-run")
    real = zoo.cli("merge", "recipe.yaml", "out", "--json")
    assert (dry.rc, dry.err, real.rc, real.err) == (0, "", 0, "")
    plan, result = json.loads(dry.out), json.loads(real.out)
    assert [t["name"] for t in plan["tensors"]] == sorted(models["base"])
    assert Path(result["path"]) == zoo.folder / "out"
    assert len(result["warnings"]) == len(plan["warnings"]) == 1
    assert plan["fingerprint"] == result["fingerprint"]


def test_quiet_prints_nothing_and_talk_goes_to_stderr(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe(RECIPE | {"rules": [{"match": {"tensors": "nothing"}, "drop": True}]})
    quiet, loud = zoo.cli("merge", "recipe.yaml", "q", "-q"), zoo.here("merge", "recipe.yaml", "l")
    assert quiet == Ran(0, "", "")
    assert loud.rc == 0
    assert loud.out.startswith(f"{zoo.folder / 'l'}: 21 tensors merged, 0 copied, ")
    assert loud.err == "warning: recipe.yaml:4: this rule matches no tensor\n"


def test_what_lies_in_folders_of_the_base_is_sealed_too(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    for name in ("1_Pooling/config.json", "additional_chat_templates/tools.jinja"):
        (zoo.folder / "base" / name).parent.mkdir()
        (zoo.folder / "base" / name).write_text("{}")
    zoo.recipe(RECIPE)
    assert zoo.here("merge", "recipe.yaml", "out", "-q").rc == 0
    listed = (zoo.folder / "out" / "SHA256SUMS").read_text()
    assert "  1_Pooling/config.json\n" in listed
    assert "  additional_chat_templates/tools.jinja\n" in listed
    assert zoo.here("verify", "out").err == ""


def test_where_the_output_goes(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe(RECIPE, "plain")
    zoo.recipe(RECIPE | {"output": {"path": "./elsewhere/x"}}, "pathed")
    for args, out in (
        (["plain.yaml"], "merged/plain"), (["pathed.yaml"], "elsewhere/x"),
        (["pathed.yaml", "y"], "y"),
    ):  # fmt: skip
        assert zoo.here("merge", *args, "-q") == Ran(0, "", "")
        assert (zoo.folder / out / "model.safetensors").exists()


def test_a_recipe_from_stdin(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    text = "base: ./base\nmodels: {a: ./a, b: ./b}\nmethod: ties\n"
    assert zoo.here("merge", "-", "-q", "--set", "parameters.density=0.5", stdin=text).rc == 0
    written = (zoo.folder / "merged" / "recipe" / "recipe.yaml").read_text()
    assert "density: 0.5" in written
    assert set(load(zoo.folder / "merged" / "recipe")) == set(load(zoo.folder / "base"))


def test_what_was_written_can_be_merged_again_from_its_own_recipe(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe("base: ./base\nmodels: {a: ./a, b: ./b}  # two\nmethod: ties\n")
    assert zoo.here("merge", "recipe.yaml", "one", "-q").rc == 0
    assert zoo.here("merge", "one/recipe.yaml", "two", "-q").rc == 0
    first, second = (
        [
            line
            for line in (zoo.folder / name / "SHA256SUMS").read_text().splitlines()
            if not line.endswith("recipe.lock.yaml")  # it says where its recipe lay
        ]
        for name in ("one", "two")
    )
    assert first == second
    assert "# two" in (zoo.folder / "one" / "recipe.yaml").read_text()


# --- what is wrong


def fails(zoo: Zoo, rc: int, *words: str, args: tuple[Any, ...] = (), **kwargs: Any) -> Ran:
    """Merges, and asserts the exit code, every word on stderr, no traceback and no output."""
    ran = zoo.cli("merge", "recipe.yaml", *(args or ("out",)), **kwargs)
    assert ran.rc == rc, ran.err
    for word in words:
        assert word in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert not (zoo.folder / "out").exists()
    assert left(zoo.folder) == []
    return ran


ADVISED = "\n  -> "  # every message ends in what to do


def resave(zoo: Zoo, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load(zoo.folder / name)
    change(tensors)
    zoo.save(name, tensors)


def test_missing_extra_and_misshapen_tensors_all_at_once(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    zoo.recipe(RECIPE)
    resave(zoo, "a", lambda t: t.pop("model.norm.weight"))
    resave(zoo, "b", lambda t: t.update({"model.extra": torch.ones(2)}))
    resave(zoo, "c", lambda t: t.update({"lm_head.weight": torch.ones(25, 16)}))
    ran = fails(
        zoo, 4,
        "model 'a': tensor 'model.norm.weight' is missing", "missing: base",
        "model 'b': tensor 'model.extra' is in no other model", "drop: true",
        "model 'c': tensor 'lm_head.weight' has the shape [25, 16], but [24, 16] in the base",
    )  # fmt: skip
    assert ran.err.count(ADVISED) == 3


def test_another_kind_of_dtype(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe(RECIPE)
    resave(zoo, "b", lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int32)}))
    fails(zoo, 4, "model 'b'", "'model.norm.weight' has the kind of dtype integer", ADVISED)


@pytest.mark.parametrize("bad", ["nan", "-inf"])
def test_nan_or_inf_in_an_input(zoo: Zoo, bad: str) -> None:
    zoo.family("llama", 2)
    zoo.recipe(RECIPE)
    resave(zoo, "b", lambda t: t["model.norm.weight"].__setitem__(3, float(bad)))
    fails(zoo, 4, "model 'b': tensor 'model.norm.weight' holds NaN or Inf", ADVISED)


def broken(zoo: Zoo, how: str) -> None:
    """Damages model b's second shard, or its index."""
    shard = zoo.folder / "b" / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    if how == "truncated":
        shard.write_bytes(content[:-5])
    elif how == "corrupt":
        shard.write_bytes(content[:8] + b"#" * 40 + content[48:])
    elif how == "empty":
        shard.write_bytes(b"")
    elif how == "absent":
        shard.unlink()
    elif how == "garbage index":
        (zoo.folder / "b" / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(("how", "words"), [
    ("truncated", "the file is truncated"), ("corrupt", "the header is corrupt"),
    ("empty", "not a safetensors file, or a truncated one (0 bytes)"),
    ("absent", "the shard model-00002-of-00002.safetensors that the index names is not there"),
    ("garbage index", "the index cannot be read"),
])  # fmt: skip
def test_damaged_files(zoo: Zoo, how: str, words: str) -> None:
    zoo.family("llama", 2, shards=2)
    zoo.recipe(RECIPE)
    broken(zoo, how)
    fails(zoo, 4, "recipe.yaml:5: b", words, "download it again", ADVISED)


A_B = "models: {a: ./a, b: ./b}\n"


@pytest.mark.parametrize(("text", "line", "words"), [
    (A_B + "method: linear\nparameters: {weight: {a: 1, b: -1}}\n", 3, "sum to zero"),
    (A_B + "method: linear\nmethod: ties\n", 3, "method"),
    (A_B + "method: teis\n", 2, "did you mean 'ties'?"),
    (A_B + "method: linear\nparameters: {weight: {q: 1}}\n", 3, "'q'"),
    (A_B + "method: ties\n", 2, "base"),
    (A_B + "method: linear\nparametres: {}\n", 3, "did you mean 'parameters'?"),
    (A_B + "method: [linear\n", 3, "not YAML"),
    ("models: {a: ./a, b: ./nowhere}\nmethod: linear\n", 1, "there is no folder or file"),
    ("", 1, "empty"),
])  # fmt: skip
def test_recipes_that_are_wrong(zoo: Zoo, text: str, line: int, words: str) -> None:
    zoo.family("llama", 2)
    zoo.recipe(text)
    rc = 5 if "nowhere" in text else 3
    assert words in fails(zoo, rc, f"recipe.yaml:{line}: ").err


@pytest.mark.parametrize("text", [
    A_B + 'method: linear\noutput: {path: "x\\0y"}\n', 'models: {a: "x\\0.yaml"}\nmethod: linear\n',
])  # fmt: skip
def test_a_nul_in_a_recipe(zoo: Zoo, text: str) -> None:
    zoo.family("llama", 2)
    zoo.recipe(text)
    fails(zoo, 3, "recipe.yaml:", "holds a NUL character", args=())
    fails(zoo, 3, "holds a NUL character", args=("out", "--set", r'output.path="a\0b"'))


@pytest.mark.parametrize("verb", ["eval", "train-router"])
@pytest.mark.parametrize("more", [(), ("recipe.yaml",)])
def test_scoring_or_training_what_is_not_there(zoo: Zoo, verb: str, more: tuple[str, ...]) -> None:
    zoo.recipe(A_B + "method: linear\n")
    named = {"eval": "--tasks", "train-router": "--recipe"}[verb]
    for folder in ("nowhere", "recipe.yaml"):
        ran = zoo.here(verb, folder, *(word for each in more for word in (named, each)))
        assert ran.rc == 5
        assert f"there is no folder '{folder}'" in ran.err


def test_flags_have_no_negatives_and_fit_in_the_help(zoo: Zoo) -> None:
    text = zoo.here("eval", "--help").out + zoo.here("merge", "--help").out
    assert "--no-no-cache" not in text
    assert "--no-force" not in text
    assert "[default: no-" not in " ".join(text.split())


def test_ctrl_c_while_the_command_line_is_read(zoo: Zoo) -> None:
    code = "import sys, mowmerge.__main__ as m; sys.modules['mowmerge.cli'] = Stop(); m.main()"
    stop = "class Stop:\n def __getattr__(self, name): raise KeyboardInterrupt\n"
    assert zoo.python(stop + code) == Ran(130, "", "")


def test_a_closed_stderr(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe(RECIPE)
    shell = ["sh", "-c", f"exec {sys.executable} -m mowmerge merge recipe.yaml out 2>&-"]
    ran = subprocess.run(
        shell, cwd=zoo.folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0
    assert "21 tensors merged" in ran.stdout


def test_a_recipe_that_is_not_there(zoo: Zoo) -> None:
    zoo.recipe(A_B, "recipes")
    assert "did you mean 'recipes.yaml'?" in fails(zoo, 3, "there is no file 'recipe.yaml'").err


def test_usage(zoo: Zoo) -> None:
    for args in (("out", "--colour"), ("out", "--workers", "0"), ("out", "--max-memory", "much")):
        fails(zoo, 2, args[1], args=args)


def test_an_output_folder_that_is_not_empty(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe(RECIPE)
    taken = zoo.folder / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    fails(zoo, 6, "taken is not empty", "--force", ADVISED, args=("taken",))
    fails(zoo, 6, "does not look like one", ADVISED, args=("taken", "--force"))
    fails(zoo, 6, "holds one of the inputs", ADVISED, args=("a", "--force"))
    assert (taken / "thesis.txt").read_text() == "mine"
    assert zoo.here("merge", "recipe.yaml", "fine", "-q").rc == 0
    (zoo.folder / "fine" / "more.txt").write_text("")
    fails(zoo, 6, "fine is not empty", args=("fine",))
    assert zoo.here("merge", "recipe.yaml", "fine", "--force", "-q") == Ran(0, "", "")
    assert not (zoo.folder / "fine" / "more.txt").exists()


def test_too_little_memory(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe(RECIPE)
    fails(zoo, 6, "--max-memory 1,000 is too little", ADVISED, args=("out", "--max-memory", "1kB"))


def test_whatever_else_the_system_refuses(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "Input/output error")

    zoo.recipe("models: {a: ./a}\nmethod: linear\n")
    monkeypatch.setattr(api, "plan", fail)
    ran = zoo.here("merge", "recipe.yaml", "--dry-run")
    assert ran == Ran(6, "", "error: [Errno 5] Input/output error\n")


def test_a_device_that_is_not_there(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.recipe(RECIPE)
    fails(zoo, 6, "'warp'", ADVISED, args=("out", "--device", "warp"))


def test_a_hub_id_without_network(zoo: Zoo) -> None:
    zoo.recipe({"models": {"a": "org/name@v1", "b": "org/other"}, "method": "linear"})
    home = {"HF_HOME": str(zoo.folder / "hf")}
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        for args in (("out",), ("out", "--dry-run")):
            words = "recipe.yaml:3: 'org/name' at revision 'v1'"
            ran = fails(zoo, 5, words, args=args, env=home | env)
            assert "-> where there is a network: `hf download org/name --revision v1`" in ran.err
            assert "`hf download org/other`" in ran.err


as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may become another user"
)


NOBODY_RUNS = """
import contextlib, os, sys, tqdm, mowmerge.engine
import torch
from mowmerge.cli import main
wanted, sys.argv = sys.argv, ["mowmerge", "merge", "recipe.yaml", "--dry-run"]
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    try:
        main()  # loads what a merge needs: the other user may not be able to read the package
    except SystemExit:
        pass
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.argv = wanted
main()
"""


@pytest.fixture
def shared() -> Iterator[Zoo]:
    """A zoo that any user may enter."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        zoo = Zoo(Path(folder))
        zoo.family("llama", 2)
        zoo.recipe(RECIPE)
        for path in zoo.folder.rglob("*"):
            path.chmod(0o755)
        yield zoo


def as_nobody(zoo: Zoo, out: str) -> Ran:
    """Merges under a user id that owns nothing."""
    return zoo.python(NOBODY_RUNS, "merge", "recipe.yaml", out)


@as_root
def test_no_permission_to_write(shared: Zoo) -> None:
    ran = as_nobody(shared, "out")
    assert ran.rc == 6, ran.err
    assert "cannot write: Permission denied" in ran.err
    assert "-> write somewhere you may" in ran.err
    assert "Traceback" not in ran.err
    assert not (shared.folder / "out").exists()
    locked = shared.folder / "locked"
    locked.mkdir(mode=0o700)
    for out in ("locked", "locked/out"):
        ran = as_nobody(shared, out)
        assert (ran.rc, "Traceback" in ran.err, ADVISED in ran.err) == (6, False, True), ran.err
    assert list(locked.iterdir()) == []


@as_root
@pytest.mark.parametrize(("what", "mode", "rc"), [
    ("b/model.safetensors", 0o600, 5), ("b/config.json", 0o600, 5), ("b", 0o700, 5),
    ("recipe.yaml", 0o600, 3),
])  # fmt: skip
def test_no_permission_to_read(shared: Zoo, what: str, mode: int, rc: int) -> None:
    (shared.folder / what).chmod(mode)
    ran = as_nobody(shared, "out")
    assert ran.rc == rc, ran.err
    assert "ermission denied" in ran.err
    assert "Traceback" not in ran.err


@as_root
def test_a_tokenizer_or_an_output_that_may_not_be_read_is_named(shared: Zoo) -> None:
    shared.merge({"method": "linear"}, name="made", hashes=True)
    shared.folder.chmod(0o777)
    for path in (shared.folder / "out").iterdir():
        path.chmod(0o755)
    words, out = shared.folder / "base/tokenizer.json", shared.folder / "out"
    advice = "\n  -> let this user read it (`chmod -R a+rX {}`), or be one who may"
    words.chmod(0o600)
    ran = shared.python(NOBODY_RUNS, "merge", "recipe.yaml", "new")
    assert ran.rc == 6, ran.err
    name = words.relative_to(shared.folder)
    assert f"error: {name}: cannot be read: Permission denied{advice.format(name)}" in ran.err
    words.chmod(0o644)
    out.chmod(0o700)
    ran = shared.python(NOBODY_RUNS, "merge", "recipe.yaml", "out", "--force")
    assert ran.rc == 6, ran.err
    assert f"error: {out}: cannot be read: Permission denied{advice.format(out)}" in ran.err


@as_root
@pytest.mark.parametrize(("names", "rc"), [
    (("model.safetensors", "tokenizer.json"), 4), (("SHA256SUMS",), 6),
])  # fmt: skip
def test_what_verify_may_not_read_is_named_once(
    shared: Zoo, names: tuple[str, ...], rc: int
) -> None:
    shared.merge({"method": "linear"}, name="made", hashes=True)
    out = shared.folder / "out"
    out.chmod(0o755)
    for path in out.iterdir():
        path.chmod(0o600 if path.name in names else 0o644)
    ran = shared.python(NOBODY_RUNS, "verify", "out")
    assert (ran.rc, ran.err.count("error:"), "Errno" in ran.err) == (rc, len(names), False), ran.err
    for name in names:
        assert f"{name}: cannot be read: Permission denied\n  -> " in ran.err
