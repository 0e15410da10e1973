"""Several ranks and one merge: the bytes of one process, whoever fails, whatever is taken up.

Here ranks are threads that exchange what they send through a room; test_torchrun.py has processes.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import cut, folder
from zoo import Zoo, left

from mowmerge import api, engine, launch
from mowmerge.checkpoint.journal import Journal
from mowmerge.checkpoint.writer import ShardSink, Staging
from mowmerge.errors import CheckpointError, ResourceError
from mowmerge.methods import registry
from mowmerge.methods.contracts import seen, with_seen
from mowmerge.planner import Options
from mowmerge.ranks import Lost, Ranks
from mowmerge.sharing import run_of, share, spread

INNER = {"method": "ties", "base": "./base", "models": {"a": "./a", "b": "./b"}}
SMALL = {"output": {"shard_size": "3kB"}}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"method": "linear", **SMALL},
    "ties": {"method": "ties", **SMALL},
    "ties, sums of floats": {"method": "ties", "parameters": {"rescale": True}, **SMALL},
    "pcb_merging": {"method": "pcb_merging", **SMALL},
    "knots": {"method": "knots", "parameters": {"density": 0.4}, **SMALL},
    "opcm": {"method": "opcm", **SMALL},
    "nested": {"method": "linear", "models": {"n": {"source": INNER}, "c": "./c"}, **SMALL},
    "mow": {"method": "mow", **SMALL},
    "emr": {"method": "emr", **SMALL},
    "wemoe, heads": {"method": "wemoe", "heads": {"match": "lm_head*"}, **SMALL},
    "heads": {"method": "linear", "heads": {"match": "lm_head*"}, **SMALL},
}


class Room:
    """Where ranks that are threads meet: what one sends, all get."""

    def __init__(self, count: int, here: int) -> None:
        self.count, self.here, self._box = count, here, b""
        self._barrier = threading.Barrier(count, timeout=60)
        self.found: list[Any] = [None] * count

    def ranks(self, rank: int) -> Ranks:
        def send(value: Any, source: int) -> Any:
            try:
                if rank == source:
                    self._box = pickle.dumps(value)
                self._barrier.wait()
                got = pickle.loads(self._box)
                self._barrier.wait()
            except threading.BrokenBarrierError as error:
                raise Lost("the connection to another rank is gone") from error
            return got

        return Ranks(rank, self.count, self.here, send)

    def leave(self) -> None:
        """As if a rank were killed: the others do not meet it again."""
        self._barrier.abort()

    def run(self, work: Callable[[Ranks], Any]) -> list[Any]:
        """What each rank's work returns or raises."""

        def one(rank: int) -> None:
            try:
                self.found[rank] = work(self.ranks(rank))
            except BaseException as error:
                self.found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.found


@pytest.fixture
def several(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Merges with ranks that are threads; what each returns or raises."""
    mine = threading.local()

    @contextmanager
    def joined(options: Options, timeout: float, *verb: str) -> Iterator[tuple[Ranks, Options]]:
        yield getattr(mine, "ranks", Ranks()), options

    monkeypatch.setattr(launch, "joined", joined)
    for name, tensors in zoo.family("llama", 3).items():
        zoo.save(name, tensors, config={"model_type": "llama", "architectures": ["Some"]})

    def run(
        content: Mapping[str, Any], count: int = 2, out: str = "out", *, hosts: int = 1,
        change: Callable[[int], Mapping[str, Any]] = lambda rank: {},
        place: Callable[[int], str] = lambda rank: ".", **kwargs: Any,
    ) -> list[Any]:  # fmt: skip
        zoo.recipe(content)

        def work(ranks: Ranks) -> Any:
            mine.ranks = ranks
            recipe = zoo.recipe({**content, **change(ranks.rank)}, f"recipe-{ranks.rank}")
            options = Options(workers=1)
            return api.merge(
                recipe if change(ranks.rank) else zoo.folder / "recipe.yaml",
                zoo.folder / place(ranks.rank) / out, options=options, **kwargs,
            )  # fmt: skip

        rooms.append(Room(count, count // hosts))
        return rooms[-1].run(work)

    rooms: list[Room] = []
    vars(run)["rooms"] = rooms
    return run


def files(out: Path) -> dict[str, Any]:
    """Every file of an output, the report without the ranks that wrote it."""
    found = folder(out)
    adapter = (out / "adapter_config.json").exists()  # whose ranks are those of its updates
    found["report.json"].pop("processes" if adapter else "ranks", None)
    return found


def single(
    zoo: Zoo, content: Mapping[str, Any], out: str = "wanted", name: str = "recipe"
) -> dict[str, Any]:
    """What one process writes."""
    options = Options(workers=1)
    return files(api.merge(zoo.recipe(content, name), zoo.folder / out, options=options).path)


@pytest.mark.parametrize("hosts", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_write_the_bytes_of_one_process(
    zoo: Zoo, several: Callable[..., list[Any]], way: str, hosts: int
) -> None:
    wanted = single(zoo, WAYS[way])
    first, *rest = several(WAYS[way], 3, hosts=hosts)
    assert not isinstance(first, BaseException), first
    assert first.speaks and not any(other.speaks for other in rest)
    assert all(other.report == first.report for other in rest)
    told = first.report["ranks"]
    assert len(told) == 3 and all(one["tensors"] and one["bytes"] for one in told)
    made = sum(t["written_bytes"] for t in first.report["tensors"])
    assert sum(one["bytes"] for one in told) == made
    assert max(one["bytes"] for one in told) < 0.6 * made
    assert files(zoo.folder / "out") == wanted
    assert left(zoo.folder) == []


def test_no_rank_writes_to_a_file_of_another_host(
    zoo: Zoo, several: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[int, set[str]] = {}
    enter = ShardSink.__enter__

    def noted(self: ShardSink) -> ShardSink:
        found = enter(self)
        opened[threading.get_ident()] = set(self._fds)
        return found

    monkeypatch.setattr(ShardSink, "__enter__", noted)
    several(WAYS["emr"], 3, hosts=3)
    one, two, three = opened.values()
    assert one and two and three and not (one & two | two & three | one & three)
    opened.clear()
    several(WAYS["emr"], 3, "again")
    assert len({frozenset(each) for each in opened.values()}) == 1


@pytest.mark.parametrize(
    "content",
    [WAYS["ties, sums of floats"],
     {"method": "task_arithmetic", "parameters": {"coefficients": "metagpt"}}],
)  # fmt: skip
def test_sums_of_floats_are_added_in_the_order_of_one_process(
    zoo: Zoo, several: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch,
    content: Mapping[str, Any],
) -> None:  # fmt: skip
    """To the last bit, which the rounding of weights may hide."""
    shapes = {f"model.layers.{i}.w": (17 + i, 31) for i in range(24)}
    for name, tensors in zoo.family(shapes, 3).items():
        scaled = {n: value * 10 ** (i % 7 - 3) for i, (n, value) in enumerate(tensors.items())}
        zoo.save(name, scaled)
    states: list[str] = []
    reduced = engine.reduced

    def noted(*args: Any) -> Any:
        found = reduced(*args)
        states.append(repr(found))
        return found

    monkeypatch.setattr(engine, "reduced", noted)
    single(zoo, content)
    several(content, 3)
    assert len(states) == 4 and len(set(states)) == 1, states


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("way", ["ties", "emr", "mow"])
@pytest.mark.parametrize("then", [1, 3])
def test_a_merge_is_taken_up_by_any_number_of_ranks(
    zoo: Zoo, several: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, way: str,
    hosts: int, then: int,
) -> None:  # fmt: skip
    wanted = single(zoo, WAYS[way])
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
        found = several(WAYS[way], 2, hosts=hosts, resume=True)
    assert [type(one) for one in found] == [KeyboardInterrupt] * 2, found
    assert not (zoo.folder / "out").exists()
    stage = zoo.folder / ".out.partial"
    done = [file.read_text().count('{"tensor":') for file in sorted(stage.glob("journal-*"))]
    assert done == [4, 4]
    names: list[str] = []
    write = ShardSink.write

    def noted(self: ShardSink, name: str, start: int, data: memoryview) -> None:
        names.append(name)
        write(self, name, start, data)

    monkeypatch.setattr(ShardSink, "write", noted)
    found = several(WAYS[way], then, hosts=min(hosts, then), resume=True)
    assert not isinstance(found[0], BaseException), found
    assert files(zoo.folder / "out") == wanted
    jobs = api.survey(zoo.folder / "recipe.yaml").jobs
    again = {job.output.name for job in jobs} & set(names)
    assert (
        len(jobs) - 8 <= len(again) <= len(jobs) - 8 + 2 * (hosts - 1)
    )  # but for what two hosts write parts of
    assert left(zoo.folder) == []


def test_what_fails_on_one_rank_fails_on_all(zoo: Zoo, several: Callable[..., list[Any]]) -> None:
    models = zoo.family("llama", 3)
    models["b"]["model.norm.weight"][3] = math.nan
    zoo.save("b", models["b"])
    for content in (WAYS["linear"], WAYS["ties"]):
        found = several(content, 3)
        assert all(isinstance(error, CheckpointError) for error in found), found
        said = [str(error) for error in found]
        assert all("model 'b': " in one and "'model.norm.weight' holds NaN" in one for one in said)
        assert sum("rank " in one for one in said) == 2
        assert left(zoo.folder) == [] and not (zoo.folder / "out").exists()


def test_the_others_stop_when_one_has_failed(
    zoo: Zoo, several: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failed, after = engine.Engine._write, threading.Event(), []

    def failing(self: engine.Engine, job: Any, sink: Any) -> Any:
        if self.ranks.rank == 1:
            failed.set()
            raise ResourceError("no more")
        failed.wait(30)
        while self.ranks.sign.exists():
            pass
        after.append(job.output.name)
        return write(self, job, sink)

    monkeypatch.setattr(engine.Engine, "_write", failing)
    zero, one = several(WAYS["linear"])
    assert str(one) == "no more" and str(zero) == "rank 1: no more"
    assert len(after) <= 1


def test_a_fault_of_rank_0_reaches_all(zoo: Zoo, several: Callable[..., list[Any]]) -> None:
    (zoo.folder / "out").mkdir()
    (zoo.folder / "out/mine").touch()
    zero, one = several(WAYS["linear"])
    assert "is not empty" in str(zero) and "rank 0: the output folder" in str(one)
    assert [p.name for p in (zoo.folder / "out").iterdir()] == ["mine"]


def test_another_merge_is_not_disturbed_by_one_that_is_refused(
    zoo: Zoo, several: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        cut(patch, 3)
        several(WAYS["ties"], resume=True)
    stage = zoo.folder / ".out.partial"
    before = sorted(p.name for p in stage.iterdir())
    zero, one = several(WAYS["ties"])
    assert "was cut off when 3 tensor(s) were done" in str(zero) and "cut off" in str(one)
    assert sorted(p.name for p in stage.iterdir()) == before


def test_ranks_with_other_recipes_are_refused(zoo: Zoo, several: Callable[..., list[Any]]) -> None:
    found = several(
        WAYS["ties"], 3, change=lambda rank: {"parameters": {"density": 0.3}} if rank == 2 else {}
    )
    assert all("parameters.density was 0.2, is 0.3" in str(error) for error in found), found
    assert left(zoo.folder) == []


def test_a_rank_that_is_gone_leaves_the_stage_to_take_up(
    zoo: Zoo, several: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, finished = single(zoo, WAYS["ties"]), Journal.finished

    def gone(self: Journal, *args: Any) -> None:
        if self._file.name == "journal-1.jsonl" and len(self.done) == 3:
            several.rooms[-1].leave()
            raise KeyboardInterrupt
        finished(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finished", gone)
        zero, one = several(WAYS["ties"])
    assert isinstance(zero, Lost) and isinstance(one, KeyboardInterrupt)
    assert (zoo.folder / ".out.partial").is_dir() and not (zoo.folder / "out").exists()
    several(WAYS["ties"], resume=True)
    assert files(zoo.folder / "out") == wanted


def test_the_others_stop_when_one_is_gone(
    zoo: Zoo, several: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before they meet it."""
    write, after = engine.Engine._write, []

    def failing(self: engine.Engine, job: Any, sink: Any) -> Any:
        if self.ranks.rank == 1:
            several.rooms[-1].leave()
            raise KeyboardInterrupt
        while self.ranks.sign.exists():
            pass
        after.append(job.output.name)
        return write(self, job, sink)

    monkeypatch.setattr(engine.Engine, "_write", failing)
    zero, _ = several(WAYS["linear"])
    assert isinstance(zero, Lost) and len(after) <= 1


def test_a_rank_that_is_interrupted_says_so(
    zoo: Zoo, several: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = engine.Engine._write

    def interrupted(self: engine.Engine, job: Any, sink: Any) -> Any:
        if self.ranks.rank == 1:
            raise KeyboardInterrupt
        return write(self, job, sink)

    monkeypatch.setattr(engine.Engine, "_write", interrupted)
    zero, one = several(WAYS["linear"])
    assert str(zero).startswith("rank 1: interrupted") and isinstance(one, KeyboardInterrupt)
    assert left(zoo.folder) == [] and not (zoo.folder / "out").exists()


def test_a_rank_that_works_for_long_says_that_it_is_there() -> None:
    words: list[tuple[int, Any]] = []
    room, beats = Room(2, 2), threading.Event()

    def work(ranks: Ranks) -> Any:
        def send(value: Any, source: int) -> Any:
            if ranks.rank == source:
                words.append((source, value))
                if words[-3:] == [(1, None)] * 3:
                    beats.set()
            return ranks.send(value, source)

        def long() -> int:
            assert ranks.rank == 0 or beats.wait(60)
            return 7 + ranks.rank

        return replace(ranks, send=send, beat=0.01).together(long)

    assert room.run(work) == [7, 8]
    assert [source for source, value in words if value is not None] == [0, 1]


def test_a_rank_that_is_gone_when_all_is_written_leaves_a_whole_checkpoint(
    zoo: Zoo, several: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, commit = single(zoo, WAYS["ties"]), Staging.commit

    def alone(self: Staging) -> None:
        commit(self)
        several.rooms[-1].leave()

    monkeypatch.setattr(Staging, "commit", alone)
    zero, one = several(WAYS["ties"])
    assert zero.speaks and isinstance(one, Lost)
    assert files(zoo.folder / "out") == wanted and left(zoo.folder) == []


def test_a_host_that_does_not_share_the_folder_is_refused(
    zoo: Zoo, several: Callable[..., list[Any]]
) -> None:
    for name in ("host-0", "host-1"):
        (zoo.folder / name).mkdir()
    (zoo.folder / "host-1/.out.partial/checkpoint").mkdir(parents=True)  # of an earlier try
    zero, one = several(WAYS["linear"], hosts=2, place="host-{}".format)
    for error in (zero, one):
        assert isinstance(error, ResourceError)
        assert "this host does not see what rank 0 has made" in str(error)
        assert "/host-1/.out.partial" in str(error)
    assert str(zero).partition(": ")[2].startswith(f"rank 1 on {socket.gethostname()}: this host")
    assert left(zoo.folder / "host-0") == []


def test_a_folder_that_is_taken_away_is_an_error(
    zoo: Zoo, several: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = engine.Engine._write

    def away(self: engine.Engine, job: Any, sink: Any) -> Any:
        if self.ranks.rank == 1:
            self.ranks.sign.unlink(missing_ok=True)
        while self.ranks.sign.exists():
            pass
        return write(self, job, sink)

    monkeypatch.setattr(engine.Engine, "_write", away)
    for error in several(WAYS["linear"]):
        assert isinstance(error, ResourceError) and "is gone, though no rank has failed" in str(
            error
        )


def test_hosts_with_other_inputs_are_refused(zoo: Zoo, several: Callable[..., list[Any]]) -> None:
    """Of the same names, shapes and sizes; copies with other times are the same."""
    own = {**WAYS["linear"], "base": "./base", "models": {m: f"./{m}" for m in "abc"}}
    wanted = single(zoo, own)
    for name in ("base", "a", "b", "c"):
        shutil.copytree(zoo.folder / name, zoo.folder / "copies" / name)
        os.utime(zoo.folder / "copies" / name / "model.safetensors", (1, 1))
    copies = {m: f"./copies/{m}" for m in "abc"}
    changed = {**own, "base": "./copies/base", "models": copies}
    value = load_file(zoo.folder / "copies/b/model.safetensors")
    value["model.norm.weight"][5] += 1
    zoo.save("other", value)
    other = {**changed, "models": {**copies, "b": "./other"}}
    for content, same in ((changed, True), (other, False)):
        found = several(
            own, hosts=2, out=f"out-{same}",
            change=lambda rank, content=content: content if rank else {},
        )  # fmt: skip
        if same:
            assert files(zoo.folder / "out-True") == wanted
        else:
            told = "model 'b': model.safetensors is another file here"
            assert all(isinstance(e, ResourceError) and told in str(e) for e in found), found


REDUCING = [name for name in registry.names() if registry.get(name).reduce]


@pytest.mark.parametrize("name", REDUCING)
def test_every_fold_can_be_sent(name: str) -> None:
    """What a fold has seen survives being pickled, to the bit."""
    method = registry.get(name)
    from mowmerge.methods.contracts import Block, Draws, Extent

    values = torch.randn(3, 40, 50)
    given = {n: (v,) * 3 if method.parameters[n].per_model and not isinstance(v, tuple) else v
             for n, v in method.complete({}).items()}  # fmt: skip
    codec = "low_rank" if method.dynamic else ""

    def state(sent: bool) -> Any:
        rounds = method.reduce([Extent((40, 50), given, codec)])  # type: ignore[misc]
        fold = next(rounds, None)
        while fold is not None:
            fresh = fold.fresh()
            rows = method.scope(given) == "row"
            shaped = values if rows else values.reshape(3, -1)
            base = torch.ones(shaped.shape[1:]) if "base" in method.inputs else None
            fresh.observe(Block(shaped, given, Draws(0, "abc", "w", 0), 2000, base))
            if sent:
                assert isinstance(fold.exact, bool)
                fresh = with_seen(fold, pickle.loads(pickle.dumps(seen(fresh))))
            try:
                fold = rounds.send(fresh)
            except StopIteration as end:
                return end.value
        return None

    assert repr(state(True)) == repr(state(False))


def test_shares_are_even_and_disjoint() -> None:
    costs = [7, 1, 5, 3, 9, 2, 2, 8]
    for count in (1, 2, 3, 5):
        all_ranks = [Ranks(rank, count, count) for rank in range(count)]
        for way in (spread, run_of):
            parts = [way(range(8), costs, ranks) for ranks in all_ranks]
            assert sorted(i for part in parts for i in part) == list(range(8))
        runs = [run_of(range(8), costs, ranks) for ranks in all_ranks]
        assert [i for part in runs for i in part] == list(range(8))
    loads = [sum(costs[i] for i in spread(range(8), costs, Ranks(r, 2, 2))) for r in (0, 1)]
    assert loads == [19, 18]


def test_whole_files_are_spread_evenly_over_hosts(zoo: Zoo) -> None:
    zoo.family({f"model.layers.{i}.w": (100, 100) for i in range(48)}, 2)
    for method in ("linear", "emr"):
        plan = api.plan(zoo.recipe({"method": method, "output": {"shard_size": "80kB"}}))
        shares = [share(plan, (), Ranks(rank, 4, 1)) for rank in range(4)]
        owned = [one.files for one in shares]
        assert sum(len(each) for each in owned) == len(plan.files)
        jobs = [len(one.jobs) for one in shares]
        assert sum(jobs) <= 48 + 3 * 2 and max(jobs) <= 15, jobs


def test_more_hosts_than_files_leave_some_idle(zoo: Zoo, several: Callable[..., list[Any]]) -> None:
    content = {"method": "ties"}
    wanted = single(zoo, content)
    first = several(content, 2, hosts=2)[0]
    assert sorted(one["tensors"] for one in first.report["ranks"]) == [0, 21]
    assert files(zoo.folder / "out") == wanted
