"""What an adapter will hold, and what making it takes: found from headers alone.

Whether a tensor differs is decided by its values. Where only adapters are joined the ranks are
known; what is decomposed has a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mowmerge.checkpoint import lowrank
from mowmerge.difference import STEP, Difference, bias_key, kept, placed, rest
from mowmerge.errors import ResourceError
from mowmerge.known import Cut
from mowmerge.memory import RUNTIME
from mowmerge.plan import Shard
from mowmerge.tensors import TensorSpec

LIBRARIES = 180 << 20  # bytes of transformers and the model's class, which names are asked of
Costs = Callable[[str], int]


@dataclass(frozen=True)
class Update:
    """One matrix of the base and what is written for it: A and B, of `rank`, or of at most that;
    `joined` from `joined` bytes of adapters' factors, else decomposed. A worker on it holds `held`
    bytes."""

    name: str
    module: str
    rank: int
    exact: bool
    joined: int
    parts: tuple[TensorSpec, TensorSpec]
    held: int

    @property
    def nbytes(self) -> int:
        """Bytes of A and B."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Outline:
    """An adapter before it is made.

    `whole` is what goes along as it is if it differs, by its name in the adapter; `lost` what would
    be lost then, by which rule.
    """

    updates: tuple[Update, ...]
    whole: Mapping[str, TensorSpec]
    lost: Mapping[str, str]
    workers: int
    peak_bytes: int

    @cached_property
    def exact(self) -> bool:
        """Whether all of it is known: nothing is left to the values but updates of zero."""
        return not self.whole and not self.lost and all(u.exact for u in self.updates)

    @cached_property
    def file(self) -> Shard:
        """adapter_model.safetensors, as large as it can be where it is not exact."""
        whole = [TensorSpec(key, spec.dtype, spec.shape) for key, spec in self.whole.items()]
        return placed([*(part for update in self.updates for part in update.parts), *whole])

    @property
    def nbytes(self) -> int:
        """Bytes of that."""
        return self.file.nbytes


def outline(
    difference: Difference, cut: Cut, workers: int, limit: int | None, reading: Costs
) -> Outline:
    """The adapter of a difference, made by as many of the workers as the limit allows for.

    `reading` says how many bytes a worker takes to read a tensor of the model.

    Raises:
        ResourceError: one worker with one tensor takes more than `limit`.
    """
    same = difference.known.same
    targets = set(difference.targets)
    wanted = [n for n in targets if not all(map(same, difference.beside(n)))]
    found = [_update(difference, n, cut, reading(n)) for n in difference.targets if n in wanted]
    saved, biases, lost = rest(difference, lambda name: not same(name))
    specs = {
        key: difference.held.get(n) or difference.extra[n] for n, key in kept(difference, saved)
    }
    memory, theirs = difference.memory, difference.base.specs
    specs |= {bias_key(memory[name]): theirs[name] for name in biases}
    others = [
        reading(n) + 24 * min(spec.numel, STEP)
        for n, spec in difference.base.specs.items()
        if n not in targets and not same(n)
    ]
    count, peak = _narrowed(found, sorted(others, reverse=True), workers, limit)
    return Outline(tuple(found), specs, lost, count, peak)


def _update(difference: Difference, name: str, cut: Cut, reading: int) -> Update:
    """What is known of one matrix's update."""
    shape, joint = difference.matrix(name), difference.known.joint(name)
    if difference.known.same(name):  # experts whose module has another update
        parts = difference.parts(name, 1)
        return Update(name, difference.path(name), 1, True, 0, parts, 0)
    exact = joint is not None and joint.exact
    stack, size = difference.stack(name), shape[0] * shape[1]
    if joint is not None:
        rank = joint.rank if exact else min(joint.rank, *shape)
        factors = stack * sum(shape) * joint.summed
        held = 4 * factors * (3 if exact else 6) + 32 * joint.summed**2
    else:
        rank = min(shape) if cut.rank is None else min(cut.rank, *shape)
        done = 2 * stack * sum(shape) * rank if stack > 1 else 0
        work = lowrank.workspace(shape, cut.rank) + (stack - 1) * size + done
        held = max(8 * stack * size + reading, 4 * work)
    parts = difference.parts(name, rank)
    return Update(
        name, difference.path(name), rank, exact, joint.nbytes if joint else 0, parts, held
    )


def _narrowed(
    updates: Sequence[Update], copying: Sequence[int], workers: int, limit: int | None
) -> tuple[int, int]:
    """How many workers there is memory for, and the peak with them."""
    held = sorted((update.held for update in updates), reverse=True)
    for count in range(min(workers, max(1, len(held))), 0, -1):
        peak = RUNTIME + LIBRARIES + max(sum(held[:count]), sum(copying[:count]))
        if limit is None or peak <= limit:
            return count, peak
    largest = max(updates, key=lambda update: update.held, default=None)
    raise ResourceError(
        f"--max-memory {limit:,} is too little: {peak:,} bytes are the least, with one worker",
        where=f"tensor '{largest.name}'" if largest else "",
        hint="allow more: a matrix is decomposed as a whole",
    )  # fmt: skip
