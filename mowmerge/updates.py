"""The difference between a model and its base, written as a LoRA adapter that peft loads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from typing import Any

from mowmerge.checkpoint import heads, lowrank, parts
from mowmerge.checkpoint.adapter_config import PREFIX
from mowmerge.checkpoint.lowrank import Factors
from mowmerge.checkpoint.parts import Part
from mowmerge.checkpoint.writer import ShardSink, Staging
from mowmerge.difference import FUSED, Difference, bias_key, kept, placed, rest, shown, within
from mowmerge.errors import CheckpointError, refused
from mowmerge.known import Cut
from mowmerge.sharing import spread
from mowmerge.tensors import TensorSpec, torch

NO_TARGETS = "dummy-target-modules"  # peft's word for an adapter of saved modules alone
Entry = Mapping[str, Any]
"""What the journal has of a tensor of the two models: its line in the report, and what waits of it,
in which part and from which byte on."""
Pieces = Iterable[memoryview]
Made = tuple[Any, Sequence[tuple[TensorSpec, Pieces]]]
"""A line, and tensors of the adapter."""


def write(
    difference: Difference,
    staging: Staging,
    cut: Cut,
    workers: int,
    advance: Callable[[int], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes adapter_model.safetensors; what adapter_config.json says, and the report of it.

    How large an update is only its values tell. So what ranks make, a share each, waits in parts,
    in their journals, until all is there; then everything has its place, and is put there.
    """
    ranks, journal = staging.ranks, staging.journal
    saved, biases, lost = _rest(difference, staging)

    def moved(names: Iterable[str]) -> None:
        advance(sum(difference.base.specs[name].nbytes for name in names))

    targets = [n for n in difference.targets if not within(difference.module(n), saved)]
    before = lengths(journal.done).get(staging.part.name, 0)
    with ranks.together(lambda: Part(staging.part, before)) as part:
        share = partial(_shared, staging, part, workers)
        costs = {name: _cost(difference, name) for name in targets}
        updates, work = share(costs, partial(_update, difference, cut=cut), moved)
        found = {n: updates[n]["line"] for n in targets if updates[n]["line"]}
        beside = {n for each in found for n in difference.beside(each)}
        names = [n for n in targets if n in found or n in beside]
        zeros = {n: f"{n}, zero" for n in names if n not in found}
        makers = {key: partial(_zero, difference, n) for n, key in zeros.items()}
        whole = kept(difference, saved)
        own = [(n, _own_bias(difference, n, found)) for n in biases]
        makers |= {key: partial(_whole, difference, n, key, "modules_to_save") for n, key in whole}
        makers |= {key: partial(_whole, difference, n, key, "bias") for n, key in own}
        costs = dict.fromkeys(zeros.values(), 0)
        costs |= {key: _held(difference, n).nbytes for n, key in (*whole, *own)}
        others, more = share(costs, lambda key: makers[key](), lambda keys: None)
    if not found and not others:
        raise CheckpointError(
            "nothing differs from the base" if not lost else "all that differs would be lost",
            where=difference.origin.origin, hint="an adapter would be empty",
        )  # fmt: skip
    updates |= {n: others[key] for n, key in zeros.items()}
    found = {n: updates[n]["line"] for n in names}
    entries = [others[key] for _, key in (*whole, *own)]
    _place(staging, [*(updates[n] for n in names), *entries])
    lines = [entry["line"] for entry in entries]
    lines += [{"name": n, "action": "lost", "kept": 0.0, "rule": why} for n, why in lost.items()]
    config = _config(difference, found, saved, bool(biases))
    told = _report([*found.values(), *lines])
    if ranks.count > 1:
        told["processes"] = [_work([*one, *two]) for one, two in zip(work, more, strict=True)]
    return config, told


def lengths(done: Mapping[str, Entry]) -> dict[str, int]:
    """How long each part is in which that waits, by its name."""
    found: dict[str, int] = {}
    for entry in done.values():
        end = entry["at"] + sum(spec.nbytes for spec in _specs(entry))
        found[entry["part"]] = max(end, found.get(entry["part"], 0))
    return found


def _shared(
    staging: Staging,
    part: Part,
    workers: int,
    costs: Mapping[str, int],
    make: Callable[[str], Made],
    moved: Callable[[Iterable[str]], None],
) -> tuple[dict[str, Entry], list[list[Entry]]]:
    """The entries of all that has a cost, and those of each rank: what the journal has is not made
    again, of the rest each rank makes a share, the largest first."""
    ranks, journal = staging.ranks, staging.journal
    found = {key: journal.done[key] for key in costs if key in journal.done}
    left = [key for key in costs if key not in found]
    mine = spread(left, [costs[key] for key in left], ranks)
    moved(found)

    def one(key: str) -> None:
        ranks.check()
        line, tensors = make(key)
        specs = [spec for spec, _ in tensors]
        nbytes = sum(spec.nbytes for spec in specs)
        at = part.append(nbytes, (piece for _, pieces in tensors for piece in pieces))
        told = {"line": line, "specs": [asdict(spec) for spec in specs]}
        journal.finished(key, {**told, "part": staging.part.name, "at": at}, nbytes)
        moved([key])

    def made() -> dict[str, Entry]:
        pool = ThreadPoolExecutor(workers)
        try:
            for done in as_completed([pool.submit(one, k) for k in sorted(mine, key=largest)]):
                done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return {key: journal.done[key] for key in mine}

    def largest(key: str) -> int:
        return -costs[key]

    work = list(ranks.each(made))
    for each in work:
        found |= each
    moved(set(left) - set(mine))
    return found, [list(each.values()) for each in work]


def _work(entries: Sequence[Entry]) -> dict[str, int]:
    """What a rank has made: tensors of the models, and bytes of the adapter."""
    nbytes = sum(spec.nbytes for entry in entries for spec in _specs(entry))
    return {"tensors": len(entries), "bytes": nbytes}


def _cost(difference: Difference, name: str) -> int:
    """Bytes of a matrix, by which ranks share them; none where nothing is to be done."""
    return 0 if difference.known.same(name) else difference.base.specs[name].nbytes


def _place(staging: Staging, entries: Sequence[Entry]) -> None:
    """Puts what waits into adapter_model.safetensors, in this order. On one host each rank a share
    of it; across hosts the first alone, since it is one file."""
    ranks, waiting = staging.ranks, [one for entry in entries for one in _waiting(entry)]
    file = placed([spec for spec, _, _ in waiting])
    ranks.from_first(lambda: staging.create([file]))
    mine = spread(waiting, [spec.nbytes for spec, _, _ in waiting], ranks)
    if ranks.across:
        mine = waiting if ranks.first else []

    def put() -> None:
        with refused(staging.path), ShardSink(staging.path, [file], lambda nbytes: None) as sink:
            for spec, name, at in mine:
                for start, data in parts.pieces(staging.stage / name, at, spec.nbytes):
                    sink.write(spec.name, start, data)

    ranks.together(put)


def _waiting(entry: Entry) -> Iterator[tuple[TensorSpec, str, int]]:
    """The tensors of an entry, each with its part and its first byte in that."""
    at = entry["at"]
    for spec in _specs(entry):
        yield spec, entry["part"], at
        at += spec.nbytes


def _specs(entry: Entry) -> list[TensorSpec]:
    return [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in entry["specs"]]


def _rest(difference: Difference, staging: Staging) -> tuple[set[str], list[str], dict[str, str]]:
    """What differs and is no matrix: each rank reads a share; kept in the journal."""
    ranks, facts = staging.ranks, staging.journal.facts
    if "rest" not in facts:
        specs, targets = difference.base.specs, set(difference.targets)
        names = [name for name in specs if name not in targets]
        mine = spread(names, [specs[name].nbytes for name in names], ranks)
        told = ranks.each(lambda: {name: difference.differs(name) for name in mine})
        differs = {name: it for each in told for name, it in each.items()}
        saved, biases, lost = rest(difference, lambda name: differs[name])
        staging.journal.keep("rest", [sorted(saved), biases, lost])
    saved, biases, lost = facts["rest"]
    if fused := [name for name, rule in lost.items() if rule == FUSED]:
        raise CheckpointError(
            f"'{fused[0]}' and {len(fused) - 1} more differ: {FUSED}",
            where=difference.origin.origin, hint="merge to a checkpoint, or leave experts alone",
        )  # fmt: skip
    return set(saved), biases, lost


def _update(difference: Difference, name: str, cut: Cut) -> Made:
    """A and B of a matrix; nothing where its update is zero."""
    factors = _factors(difference, name, cut)
    return (None, []) if factors is None else _low_rank(difference, name, factors)


def _zero(difference: Difference, name: str) -> Made:
    """An update of zero, of rank 1, for experts whose module has another."""
    stack, (rows, columns) = difference.stack(name), difference.matrix(name)
    b, a = torch.zeros(stack, rows, 1), torch.zeros(stack, 1, columns)
    return _low_rank(difference, name, Factors(b, a, 0.0, 0.0, "zero"))


def _whole(difference: Difference, name: str, key: str, action: str) -> Made:
    """A tensor that goes along as it is, under its name in the adapter."""
    spec = _held(difference, name)
    pieces = (data for _, data in heads.pieces(difference.model, spec.name))
    line = {"name": name, "action": action, "kept": 1.0}
    return line, [(TensorSpec(key, spec.dtype, spec.shape), pieces)]


def _held(difference: Difference, name: str) -> TensorSpec:
    """The model's tensor under that name of the base, or of its own."""
    return difference.held.get(name) or difference.extra[name]


def _factors(difference: Difference, name: str, cut: Cut) -> Factors | None:
    """The update of one matrix; None where it is zero."""
    factors = difference.known.joined(name)
    if factors is not None or difference.known.same(name):
        return factors if factors is None or factors.total else None
    delta = difference.delta(name)
    low, high = (float(end) for end in delta.aminmax()) if delta.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise difference.not_finite(name)
    if not (low or high):
        return None
    matrices = delta if delta.dim() == 3 else [delta]
    each = [lowrank.factor(matrix, cut.rank, cut.energy) for matrix in matrices]
    return each[0] if delta.dim() == 2 else lowrank.stacked(each)


def _own_bias(difference: Difference, name: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    updated = {difference.module(n) for n in found}
    memory = difference.memory[name]
    return bias_key(memory) if difference.module(name) in updated else f"{PREFIX}{memory}"


def _low_rank(difference: Difference, name: str, factors: Factors) -> Made:
    """A and B as the adapter has them."""
    a, b = factors.a, factors.b
    if b.dim() == 3:  # peft has A expert by expert, and of B the experts side by side
        b = b.permute(1, 2, 0)
    each = (part.contiguous().view(-1).view(torch.uint8).numpy().data for part in (a, b))
    specs = difference.parts(name, factors.rank)
    line = {
        "name": name, "action": "low rank", "module": difference.path(name),
        "rank": factors.rank, "kept": factors.energy, "error": factors.error,
        "norm": factors.total**0.5, "how": factors.how,
    }  # fmt: skip
    return line, [(spec, [data]) for spec, data in zip(specs, each, strict=True)]


def _config(
    difference: Difference, found: Mapping[str, Mapping[str, Any]], saved: set[str], biased: bool
) -> dict[str, Any]:
    """adapter_config.json: full paths as targets, alpha equal to r so that the scale is one."""
    ranks = {line["module"]: line["rank"] for line in found.values()}
    counted = list(ranks.values())
    r = max(set(counted), key=lambda rank: (counted.count(rank), rank)) if counted else 1
    pattern = {path: rank for path, rank in ranks.items() if rank != r}
    kinds = {difference.kind(name) for name in found}
    targets = [difference.path(name) for name in found if difference.kind(name) != "experts"]
    stacks = [difference.path(name) for name in found if difference.kind(name) == "experts"]
    ties = difference.modules.ties
    tied = any(f"{path}.weight" in (*ties, *ties.values()) for path in saved)
    return {
        "peft_type": "LORA", "base_model_name_or_path": shown(difference.origin),
        "revision": difference.origin.revision, "task_type": None, "inference_mode": True,
        "r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": pattern,
        "target_modules": targets if ranks else NO_TARGETS,
        "target_parameters": stacks or None,
        "modules_to_save": sorted(_named(difference, path) for path in saved) or None,
        "bias": "all" if biased else "none", "fan_in_fan_out": "conv1d" in kinds,
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
        "ensure_weight_tying": tied,
    }  # fmt: skip


def _named(difference: Difference, path: str) -> str:
    """A module to save as peft finds it: it takes every one whose path in `base_model` ends so."""
    others = (other for other in difference.modules.kinds if other != path)
    return f"model.{path}" if any(other.endswith(path) for other in others) else path


def _report(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The lines, and the energy that all low-rank updates keep together."""
    low = [line for line in lines if line["action"] == "low rank"]
    total = sum(line["norm"] ** 2 for line in low)
    kept = sum(line["norm"] ** 2 * line["kept"] for line in low)
    return {
        "kept_energy": kept / total if total else 1.0,
        "ranks": sorted({line["rank"] for line in low}),
        "lost": [line["name"] for line in lines if line["action"] == "lost"],
        "tensors": list(lines),
    }
