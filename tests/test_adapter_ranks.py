"""Several ranks and one adapter: each makes a share of the updates, and the bytes are those of one
process, whoever fails, whatever is taken up. Ranks are threads, as in test_ranks.py."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import test_ranks
from peft_models import adapt, save
from test_ranks import Room, files, single
from zoo import Zoo, left

from mowmerge import api, engine, lora, updates
from mowmerge.checkpoint.journal import Journal
from mowmerge.checkpoint.peft import WEIGHTS
from mowmerge.checkpoint.writer import ShardSink
from mowmerge.errors import CheckpointError, ResourceError
from mowmerge.ranks import Lost

several = test_ranks.several
Several = Callable[..., list[Any]]
TIES = {"method": "ties", "output": {"format": "adapter", "rank": 8}}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "ties": TIES,
    "by energy": {"method": "dare", "output": {"format": "adapter", "energy": 0.9}},
}
MATRICES = 16  # of 21 tensors: two layers of seven, the embedding, the head


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The matrices that are decomposed."""
    names: list[str] = []
    true = updates._factors

    def factors(difference: Any, name: str, cut: Any) -> Any:
        names.append(name)
        return true(difference, name, cut)

    monkeypatch.setattr(updates, "_factors", factors)
    return names


@pytest.mark.parametrize("hosts", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_write_the_bytes_of_one_process(
    zoo: Zoo, several: Several, way: str, hosts: int, made: list[str]
) -> None:
    wanted = single(zoo, WAYS[way])
    assert sorted(made) == sorted(set(made)) and len(made) == MATRICES
    made.clear()
    first, *rest = several(WAYS[way], 3, hosts=hosts)
    assert not isinstance(first, BaseException), first
    assert len(made) == len(set(made)) == MATRICES
    assert first.speaks and not any(other.speaks for other in rest)
    assert all(other.report == first.report for other in rest)
    told = first.report["processes"]
    assert sum(one["tensors"] for one in told) == 21
    assert len(told) == 3 and all(one["tensors"] and one["bytes"] for one in told)
    content = (zoo.folder / "out" / WEIGHTS).read_bytes()
    data = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert sum(one["bytes"] for one in told) == data
    assert max(one["bytes"] for one in told) < 0.6 * data
    assert files(zoo.folder / "out") == wanted
    assert left(zoo.folder) == []


def test_ranks_join_adapters_to_the_bytes_of_one_process(zoo: Zoo, several: Several) -> None:
    """Modules that no adapter is on cost nothing, and are not counted as a rank's share."""
    base = save(zoo.folder / "base", "llama")
    adapt(base, zoo.folder / "x", r=3, target_modules=["q_proj", "o_proj"])
    adapt(base, zoo.folder / "y", seed=2, r=2, target_modules=["q_proj"])
    models = {name: {"source": "base", "adapter": f"./{name}"} for name in "xy"}
    content = {"base": "./base", "models": models, "method": "linear",
               "output": {"format": "adapter"}}  # fmt: skip
    wanted = single(zoo, content)
    told = several(content, 2)[0].report["processes"]
    assert all(one["bytes"] > 0.3 * sum(each["bytes"] for each in told) for one in told)
    assert files(zoo.folder / "out") == wanted


@pytest.mark.parametrize("hosts", [1, 3])
def test_who_writes_to_the_one_file(
    zoo: Zoo, several: Several, monkeypatch: pytest.MonkeyPatch, hosts: int
) -> None:
    """All on one host; across hosts the first, since two may overwrite each other's pages."""
    writing: dict[int, int] = {}
    write = ShardSink.write

    def noted(self: ShardSink, name: str, start: int, data: memoryview) -> None:
        who = threading.get_ident()
        writing[who] = writing.get(who, 0) + len(data)
        write(self, name, start, data)

    monkeypatch.setattr(ShardSink, "write", noted)
    several(TIES, 3, hosts=hosts)
    assert len(writing) == (1 if hosts == 3 else 3)
    assert max(writing.values()) < 0.6 * sum(writing.values()) or hosts == 3


def test_what_is_read_is_shared(
    zoo: Zoo, several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistic of ties over the model, and which norms differ."""
    counts: list[int] = []
    compared: list[str] = []
    reduced, differs = engine.reduced, lora.Difference.differs

    def noted(*args: Any) -> Any:
        counts.append(args[4].count)
        return reduced(*args)

    def comparing(self: Any, name: str) -> bool:
        compared.append(name)
        return differs(self, name)

    monkeypatch.setattr(engine, "reduced", noted)
    monkeypatch.setattr(lora.Difference, "differs", comparing)
    several(TIES, 3)
    assert counts == [3, 3, 3]
    assert len(compared) == len(set(compared)) == 21 - MATRICES


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("then", [1, 3])
def test_an_adapter_is_taken_up_by_any_number_of_ranks(
    zoo: Zoo, several: Several, monkeypatch: pytest.MonkeyPatch, hosts: int, then: int,
    made: list[str],
) -> None:  # fmt: skip
    wanted = single(zoo, TIES)
    both, finished, counts = threading.Barrier(2, timeout=60), Journal.finished, [0, 0]

    def killed(self: Journal, *args: Any) -> None:
        rank = int(self._file.stem[-1])
        counts[rank] += 1
        if counts[rank] == 5:
            both.wait()
        if counts[rank] >= 5:
            raise KeyboardInterrupt
        finished(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finished", killed)
        found = several(TIES, 2, hosts=hosts, resume=True)
    assert [type(one) for one in found] == [KeyboardInterrupt] * 2, found
    assert not (zoo.folder / "out").exists()
    stage = zoo.folder / ".out.partial"
    done = [file.read_text().count('{"tensor":') for file in sorted(stage.glob("journal-*"))]
    assert done == [4, 4]
    made.clear()
    found = several(TIES, then, hosts=min(hosts, then), resume=True)
    assert not isinstance(found[0], BaseException), found
    assert len(made) == len(set(made)) == MATRICES - 8
    assert files(zoo.folder / "out") == wanted
    assert left(zoo.folder) == []


def test_a_rank_that_is_gone_leaves_the_stage_to_take_up(
    zoo: Zoo, several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, finished = single(zoo, TIES), Journal.finished

    def gone(self: Journal, *args: Any) -> None:
        if self._file.name == "journal-1.jsonl" and len(self.done) == 3:
            several.rooms[-1].leave()
            raise KeyboardInterrupt
        finished(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finished", gone)
        zero, one = several(TIES)
    assert isinstance(zero, Lost) and isinstance(one, KeyboardInterrupt)
    assert (zoo.folder / ".out.partial").is_dir() and not (zoo.folder / "out").exists()
    several(TIES, resume=True)
    assert files(zoo.folder / "out") == wanted


def test_what_fails_on_one_rank_fails_on_all(zoo: Zoo, several: Several) -> None:
    models = zoo.family("llama", 3)
    models["b"]["lm_head.weight"][3, 2] = math.nan
    zoo.save("b", models["b"])
    found = several({"method": "linear", "output": {"format": "adapter", "rank": 4}}, 3)
    assert all(isinstance(error, CheckpointError) for error in found), found
    said = [str(error) for error in found]
    assert all("'lm_head.weight' holds NaN" in one for one in said), said
    assert sum("rank " in one for one in said) == 2
    assert left(zoo.folder) == [] and not (zoo.folder / "out").exists()


def test_ranks_with_another_cut_are_refused(zoo: Zoo, several: Several) -> None:
    other = {"output": {"format": "adapter", "rank": 7}}
    found = several(TIES, 3, change=lambda rank: other if rank == 2 else {})
    assert all("output.rank was 8, is 7" in str(error) for error in found), found
    assert left(zoo.folder) == []


def test_ranks_share_an_extraction(zoo: Zoo, made: list[str]) -> None:
    zoo.family("llama", 1)
    where = [str(zoo.folder / name) for name in ("a", "base")]
    asked = {"rank": 4, "workers": 1}
    api.extract_lora(*where, zoo.folder / "wanted", **asked)
    made.clear()

    def run(ranks: Any) -> Any:
        return lora.extract(*where, zoo.folder / "out", ranks=ranks, **asked)

    found = Room(3, 3).run(run)
    assert not any(isinstance(one, BaseException) for one in found), found
    assert len(made) == len(set(made)) == MATRICES
    assert all(one["bytes"] for one in found[0][1]["processes"])
    assert files(zoo.folder / "out") == files(zoo.folder / "wanted")

    def other(ranks: Any) -> Any:
        return lora.extract(*where, zoo.folder / "again", ranks=ranks, rank=4 + ranks.rank)

    found = Room(2, 2).run(other)
    assert all(isinstance(error, ResourceError) for error in found), found
    assert all("rank was 4, is 5" in str(error) for error in found)
