"""The difference between a model and its base, written as a LoRA adapter that peft loads."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mowmerge import __version__
from mowmerge.checkpoint import appender, heads, lowrank
from mowmerge.checkpoint.appender import Appender
from mowmerge.checkpoint.journal import Journal
from mowmerge.checkpoint.lowrank import Factors
from mowmerge.checkpoint.peft import CONFIG, PREFIX, WEIGHTS
from mowmerge.difference import FUSED, Difference, bias_key, kept, rest, shown, within
from mowmerge.errors import CheckpointError, denied
from mowmerge.known import Cut
from mowmerge.tensors import TensorSpec, torch

NO_TARGETS = "dummy-target-modules"  # peft's word for an adapter of saved modules alone
Done = Mapping[str, Mapping[str, Any]]
Pieces = Iterable[memoryview]


def write(
    difference: Difference,
    folder: Path,
    cut: Cut,
    workers: int,
    advance: Callable[[int], None],
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Writes adapter_model.safetensors and adapter_config.json; what the report says of them.

    Tensors are appended in one order, so what a journal says is done is the first part of the file:
    it stays, and what is added is told to the journal.
    """
    specs, done = difference.base.specs, dict(journal.done) if journal else {}
    found: dict[str, Mapping[str, Any]] = {}
    lines: list[dict[str, Any]] = []
    saved, biases, lost = _rest(difference, journal)
    if fused := [name for name, rule in lost.items() if rule == FUSED]:
        raise CheckpointError(
            f"'{fused[0]}' and {len(fused) - 1} more differ: {FUSED}",
            where=difference.origin.origin, hint="merge to a checkpoint, or leave experts alone",
        )  # fmt: skip
    metadata = {"format": "pt", "mowmerge": __version__}
    with Appender(folder / WEIGHTS, difference.keys(), metadata, _specs(done)) as out:

        def put(key: str, line: Any, tensors: Sequence[tuple[TensorSpec, Pieces]]) -> None:
            for spec, pieces in tensors:
                out.append(spec, pieces)
            if journal:
                entry = {"line": line, "specs": [asdict(spec) for spec, _ in tensors]}
                journal.finished(key, entry, sum(spec.nbytes for spec, _ in tensors))

        targets = [n for n in difference.targets if not within(difference.module(n), saved)]
        found |= {n: done[n]["line"] for n in targets if n in done and done[n]["line"]}
        advance(sum(specs[n].nbytes for n in targets if n in done))
        left = [n for n in targets if n not in done]
        for name, factors in _in_order(partial(_factors, difference, cut=cut), left, workers):
            if factors is None:
                put(name, None, [])
            else:
                found[name] = _line(difference, name, factors)
                put(name, found[name], _tensors(difference, name, factors))
            advance(specs[name].nbytes)
        for name in [n for each in found for n in difference.beside(each) if n not in found]:
            factors = _nothing(difference, name)
            found[name] = _line(difference, name, factors)
            if (key := f"{name}, zero") not in done:
                put(key, found[name], _tensors(difference, name, factors))
        whole = kept(difference, saved)
        whole += [(n, _own_bias(difference, n, found)) for n in biases]
        held = {n: difference.held.get(n) or difference.extra[n] for n, _ in whole}
        for name, key in sorted(whole, key=lambda pair: -held[pair[0]].itemsize):
            action = "bias" if name in biases else "modules_to_save"
            lines.append({"name": name, "action": action, "kept": 1.0})
            if key not in done:
                spec = held[name]
                pieces = (data for _, data in heads.pieces(difference.model, spec.name))
                put(key, lines[-1], [(TensorSpec(key, spec.dtype, spec.shape), pieces)])
    for name, why in lost.items():
        lines.append({"name": name, "action": "lost", "kept": 0.0, "rule": why})
    if not found and not whole:
        raise CheckpointError(
            "nothing differs from the base" if not lost else "all that differs would be lost",
            where=difference.origin.origin, hint="an adapter would be empty",
        )  # fmt: skip
    config = _config(difference, found, saved, bool(biases))
    try:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise denied(error, folder / CONFIG) from error
    return _report([*found.values(), *lines])


def length(difference: Difference, done: Done) -> int:
    """Bytes of the file in which that is done; 0 where it need not be there."""
    specs = _specs(done)
    return 8 + appender.room(difference.keys()) + sum(s.nbytes for s in specs) if specs else 0


def _specs(done: Done) -> list[TensorSpec]:
    """The tensors of what is done, in the order in which they lie."""
    given = [spec for entry in done.values() for spec in entry["specs"]]
    return [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in given]


def _rest(
    difference: Difference, journal: Journal | None
) -> tuple[set[str], list[str], dict[str, str]]:
    """What differs and is no matrix: found by reading, and kept in the journal."""
    if journal and "rest" in journal.facts:
        saved, biases, lost = journal.facts["rest"]
        return set(saved), biases, lost
    found = rest(difference, difference.differs)
    if journal:
        journal.keep("rest", [sorted(found[0]), *found[1:]])
    return found


def _factors(difference: Difference, name: str, cut: Cut) -> Factors | None:
    """The update of one matrix; None where it is zero."""
    factors = difference.known.joined(name)
    if factors is not None or difference.known.same(name):
        return factors if factors is None or factors.total else None
    delta = difference.delta(name)
    low, high = (float(end) for end in delta.aminmax()) if delta.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(f"'{name}' holds NaN or Inf", where=difference.origin.origin)
    if not (low or high):
        return None
    matrices = delta if delta.dim() == 3 else [delta]
    each = [lowrank.factor(matrix, cut.rank, cut.energy) for matrix in matrices]
    return each[0] if delta.dim() == 2 else lowrank.stacked(each)


def _nothing(difference: Difference, name: str) -> Factors:
    """An update of zero, of rank 1, for experts whose module has another."""
    stack, (rows, columns) = difference.stack(name), difference.matrix(name)
    b, a = torch.zeros(stack, rows, 1), torch.zeros(stack, 1, columns)
    return Factors(b, a, 0.0, 0.0, "zero")


def _own_bias(difference: Difference, name: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    updated = {difference.module(n) for n in found}
    memory = difference.memory[name]
    return bias_key(memory) if difference.module(name) in updated else f"{PREFIX}{memory}"


def _tensors(
    difference: Difference, name: str, factors: Factors
) -> list[tuple[TensorSpec, Pieces]]:
    """A and B as the adapter has them."""
    a, b = factors.a, factors.b
    if b.dim() == 3:  # peft has A expert by expert, and of B the experts side by side
        b = b.permute(1, 2, 0)
    each = (part.contiguous().view(-1).view(torch.uint8).numpy().data for part in (a, b))
    parts = difference.parts(name, factors.rank)
    return [(spec, [data]) for spec, data in zip(parts, each, strict=True)]


def _line(difference: Difference, name: str, factors: Factors) -> dict[str, Any]:
    return {
        "name": name, "action": "low rank", "module": difference.path(name),
        "rank": factors.rank, "kept": factors.energy, "error": factors.error,
        "norm": factors.total**0.5, "how": factors.how,
    }  # fmt: skip


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


def _in_order(
    function: Callable[[str], Factors | None], names: Sequence[str], workers: int
) -> Iterator[tuple[str, Factors | None]]:
    """Each name with what the function gives for it, a few ahead of time."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[str, Future[Factors | None]]] = deque()
        for name in names:
            waiting.append((name, pool.submit(function, name)))
            if len(waiting) > workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for name, future in waiting:
            yield name, future.result()
