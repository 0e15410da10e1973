"""Two hosts and one merge under torchrun, as docs/scale.md says: the bytes of one process, and a
clear end in bounded time whatever becomes of a host, of the link, or of what one of them sees.

Hosts are network namespaces with hostnames, processes and mounts of their own: see hosts.py.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.family import SMALL, write_family
from hosts import Host, hosts, lacking
from zoo import ROOT, Ran, Zoo, left

WHY = lacking()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY), reason=WHY)]
MERGE = ("merge", "recipe.yaml", "out", "--workers", "1", "--timeout", "0.2")
LIMIT = 100  # seconds in which all has ended, on a busy machine too
PAUSED = """
import os, pathlib, time
from mowmerge import merging
from mowmerge.checkpoint.journal import Journal

def pause():
    pathlib.Path("../at").touch()
    while not pathlib.Path("../go").exists():
        time.sleep(0.05)

def finished(self, *args, was=Journal.finished):
    was(self, *args)
    if os.environ["RANK"] == "1" and len(self.done) == 3:
        pause()

def seal(*args, was=merging._seal):
    if os.environ["RANK"] == "0":
        pause()
    return was(*args)

if os.environ["AT"] == "tensors":
    Journal.finished = finished
else:
    merging._seal = seal
from mowmerge.cli import main
main()
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A small llama in shards, a base and three experts; what one process makes of it in `one`."""
    zoo = Zoo(tmp_path_factory.mktemp("hosts") / "shared")
    zoo.folder.mkdir()
    write_family(zoo.folder, SMALL, 3)
    models = {name: f"./expert-{i}" for i, name in enumerate("abc", 1)}
    content = {"method": "ties", "base": "./base", "models": models}
    zoo.recipe({**content, "output": {"shard_size": "700kB"}})
    zoo.recipe({**content, "parameters": {"density": 0.3}}, "other")
    (zoo.folder / "paused.py").write_text(PAUSED)
    ran = zoo.cli("merge", "recipe.yaml", "one", "--workers", "1")
    assert ran.rc == 0, ran.err
    return zoo


@pytest.fixture
def pair(family: Zoo) -> Iterator[list[Host]]:
    for name in ("at", "go"):
        (family.folder.parent / name).unlink(missing_ok=True)
    with hosts(family.folder) as made:
        yield made
    for name in ("out", ".out.partial", "merged"):
        shutil.rmtree(family.folder / name, ignore_errors=True)


def torchrun(
    host: Host, rank: int, *words: str, each: int = 1, c10d: bool = False, pause: str = ""
) -> None:
    """One torchrun of two, as it is typed on a host."""
    meet = ["--node-rank", str(rank), "--master-addr", "10.77.0.1", "--master-port", "29500"]
    if c10d:
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "host-a:29400", "--rdzv_id", "merge"]
    what = ("paused.py",) if pause else ("-m", "mowmerge")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", str(each), *meet, *what, *words]
    host.start(*command, env={"AT": pause})


def both(pair: list[Host], *words: str, each: int = 1, c10d: bool = False) -> list[Ran]:
    """What torchrun left on each of the hosts."""
    for rank, host in enumerate(pair):
        torchrun(host, rank, *words, each=each, c10d=c10d)
    return [host.ended(LIMIT) for host in pair]


def paused(pair: list[Host], at: str) -> None:
    """Both torchruns begun, and come to where a rank waits."""
    for rank, host in enumerate(pair):
        torchrun(host, rank, *MERGE, pause=at)
    began = time.monotonic()
    while not (pair[0].folder.parent / "at").exists():
        assert time.monotonic() - began < LIMIT, [host.said() for host in pair]
        time.sleep(0.1)


def go(pair: list[Host]) -> None:
    (pair[0].folder.parent / "go").touch()


def sums(folder: Path) -> str:
    """The digests of all files."""
    return (folder / "SHA256SUMS").read_text()


def taken_up(family: Zoo, pair: list[Host]) -> None:
    """Nothing is under the final name; run again on the hosts that are left it is one's bytes."""
    assert not (family.folder / "out").exists() and left(family.folder) == [".out.partial"]
    again = family.cli("merge", "recipe.yaml", "out", "--resume", "--quiet", "--workers", "1")
    assert (again.rc, again.err) == (0, "")
    assert sums(family.folder / "out") == sums(family.folder / "one")
    assert left(family.folder) == []


@pytest.mark.parametrize(("each", "c10d"), [(1, False), (1, True), (2, False)])
def test_two_hosts_write_whole_files_and_the_bytes_of_one_process(
    family: Zoo, pair: list[Host], each: int, c10d: bool
) -> None:
    ran = both(pair, *MERGE, each=each, c10d=c10d)
    assert [one.rc for one in ran] == [0, 0], ran
    assert "20 tensors merged" in ran[0].out and ran[1].out == ""
    out = family.folder / "out"
    told = json.loads((out / "report.json").read_text())["ranks"]
    assert len(told) == 2 * each and all(one["bytes"] for one in told)
    files = [file.stat().st_size for file in out.glob("model-*")]
    assert len(files) >= 4 and sum(one["bytes"] for one in told) < sum(files)  # but for headers
    assert sums(out) == sums(family.folder / "one") and left(family.folder) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_leaves_work_to_take_up(
    family: Zoo, pair: list[Host], victim: int
) -> None:
    """Its processes are gone, and what they had open is closed."""
    paused(pair, "tensors")
    pair[victim].kill()
    go(pair)
    ran = pair[1 - victim].ended(LIMIT)
    assert ran.rc and "error: the connection to another rank is gone" in ran.err, ran.err
    taken_up(family, pair)


@pytest.mark.parametrize("dead", [False, True])
def test_a_link_that_goes_down_ends_both_hosts(family: Zoo, pair: list[Host], dead: bool) -> None:
    """Nothing says so, and the other is only silent; nor does a host without power."""
    paused(pair, "tensors")
    pair[1].unplug()
    if dead:
        pair[1].kill()
    go(pair)
    for host in pair[: 1 if dead else 2]:
        ran = host.ended(LIMIT)
        says = (
            "error: another rank has said nothing for 0.2 minutes\n  -> run it again with --resume"
        )
        assert ran.rc and says in ran.err, ran.err
    taken_up(family, pair)


def test_a_link_that_goes_down_when_all_is_written_leaves_a_whole_checkpoint(
    family: Zoo, pair: list[Host]
) -> None:
    """Rank 0 ends what it alone does. (Its torchrun then waits for the other for minutes.)"""
    paused(pair, "seal")
    pair[1].unplug()
    ran = pair[1].ended(LIMIT)
    assert ran.rc and "another rank has said nothing for 0.2 minutes" in ran.err, ran.err
    assert not (family.folder / "out").exists()
    go(pair)
    began = time.monotonic()
    while left(family.folder) and time.monotonic() - began < LIMIT:
        time.sleep(0.1)
    assert sums(family.folder / "out") == sums(family.folder / "one") and left(family.folder) == []


def refused(family: Zoo, pair: list[Host], says: str, *words: str) -> None:
    """Both hosts say it, the first of the other one; nothing is left."""
    one, two = both(pair, *(words or MERGE))
    assert one.rc and two.rc and says in two.err, two.err
    assert says in one.err.replace("rank 1 on host-b: ", "") and "rank 1 on host-b: " in one.err
    assert left(family.folder) == [] and not (family.folder / "out").exists()


def test_a_host_that_does_not_see_the_folder_is_refused(family: Zoo, pair: list[Host]) -> None:
    merged = family.folder / "merged"
    merged.mkdir()
    pair[1].hide(merged)
    says = "merged/.out.partial: this host does not see what rank 0 has made there"
    refused(family, pair, says, "merge", "recipe.yaml", "merged/out")
    assert list(merged.iterdir()) == []
    pair[1].hide(family.folder)
    refused(family, pair, "error: there is no file 'recipe.yaml'")


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ("recipe.yaml", "other.yaml", "parameters.density was 0.2, is 0.3"),
        ("expert-2", "expert-1", "model 'b': model-00001-of-00003.safetensors is another file"),
        (ROOT / "mowmerge/__init__.py", "version.py", 'mowmerge was "0.1.0", is "9.9"'),
    ],
)  # fmt: skip
def test_hosts_with_another_recipe_input_or_version_are_refused(
    family: Zoo, pair: list[Host], ours: str | Path, theirs: str, says: str
) -> None:
    text = (ROOT / "mowmerge/__init__.py").read_text()
    (family.folder / "version.py").write_text(text.replace('"0.1.0"', '"9.9"'))
    pair[1].do("mount", "--bind", str(family.folder / theirs), str(family.folder / ours))
    refused(family, pair, says)


@pytest.mark.parametrize("names", ["127.0.0.1 localhost\n127.0.1.1 {}\n", "127.0.0.1 localhost\n"])
def test_hosts_meet_whose_own_names_are_no_addresses(
    family: Zoo, pair: list[Host], names: str
) -> None:
    for host in pair:
        file = family.folder.parent / f"names-{host.name}"
        file.write_text(names.format(host.name))
        host.do("mount", "--bind", str(file), "/etc/hosts")
    assert [one.rc for one in both(pair, *MERGE)] == [0, 0]
    assert sums(family.folder / "out") == sums(family.folder / "one")


def test_accelerate_launch_on_two_hosts(family: Zoo, pair: list[Host]) -> None:
    """With --multi_gpu, without which version 1.15 starts a lone process on a host without GPUs."""
    words = ("--num_machines", "2", "--num_processes", "2", "--main_process_ip", "10.77.0.1",
             "--main_process_port", "29400", "-m", "mowmerge", *MERGE)  # fmt: skip
    start = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu")
    for rank, host in enumerate(pair):
        host.start(*start, "--machine_rank", str(rank), *words)
    assert [host.ended(LIMIT).rc for host in pair] == [0, 0]
    told = json.loads((family.folder / "out/report.json").read_text())["ranks"]
    assert len(told) == 2 and sums(family.folder / "out") == sums(family.folder / "one")
