"""A merge's updates as factors: sums of its adapters' products, or what a method makes of those."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mowmerge.checkpoint import lowrank
from mowmerge.checkpoint.adapter import AdaptedReader
from mowmerge.checkpoint.lowrank import Factors
from mowmerge.engine import Engine
from mowmerge.known import Cut, Joint
from mowmerge.methods import registry
from mowmerge.plan import Adapted, Input, Patch, TensorJob
from mowmerge.tensors import Tensor, TensorSpec, torch


@dataclass(frozen=True)
class Sums:
    """What is known of a merge into an adapter before any tensor is read; see `difference.Known`.

    A sum it is where the method is linear, and each model is the base with adapters that only add
    products. A method on matrices may make a product of such: of a rank that only it finds.
    """

    engine: Engine
    cut: Cut

    def joint(self, name: str) -> Joint | None:
        """The ranks that the models with a share bring; None where the method is not linear for
        this tensor, or a model is not the base with low-rank updates on it."""
        job = self._jobs.get(name)
        shared = None if job is None or job.matrix else self._shared(name)
        if not shared or not all(self._adds(given) for given, _ in shared):
            return None
        parts = [part for given, share in shared if share for part in self._factors(given)]
        summed = sum(a.shape[0] // stack for a, _, stack in parts)
        nbytes = sum(a.nbytes + b.nbytes for a, b, _ in parts)
        return Joint(summed, nbytes, self.cut) if summed else None

    def joined(self, name: str) -> Factors | None:
        """The factors of the merged update, where it is such a sum, or a product."""
        job = self._jobs.get(name)
        if job is not None and job.matrix:
            return self._product(job)
        if self.joint(name) is None:
            return None
        shared = self._shared(name) or []
        pairs = [(share, b, a) for given, share in shared if share for b, a in self._updates(given)]
        each = [
            lowrank.joined([(c, b[i], a[i]) for c, b, a in pairs], self.cut.rank, self.cut.energy)
            for i in range(len(pairs[0][1]))
        ]
        return each[0] if len(each) == 1 else lowrank.stacked(each)

    def _product(self, job: TensorJob) -> Factors | None:
        """What a method on matrices makes of products, where it keeps them so."""
        with self.engine.open(job) as opened:
            if opened.factors is None:
                return None
            self.engine.settle(opened)
            found = opened.product()
        if found is None:
            return None
        b, a = (part.float().cpu() for part in found)
        readers = [(self.engine.readers[i.model], i.spec.name) for i in job.models]
        if any(isinstance(r, AdaptedReader) and r.across(name) for r, name in readers):
            b, a = a.T, b.T
        cut = self.cut if len(a) else Cut()
        return lowrank.joined([(1.0, b, a)], cut.rank, cut.energy)

    def same(self, name: str) -> bool:
        """Whether no model changes the tensor, so that the merge does not either."""
        job = self._jobs.get(name)
        if job is None:
            return False
        kept = job.method is None or _keeps(job)
        return kept and all(self._patches(given) == () for given in job.models)

    @cached_property
    def _jobs(self) -> dict[str, TensorJob]:
        return {job.output.name: job for job in self.engine.plan.jobs}

    def _shared(self, name: str) -> list[tuple[Input, float]] | None:
        """Each model's tensor with its c_k; None where the method is no sum."""
        job = self._jobs.get(name)
        shares = _shares(job) if job else None
        return list(zip(job.models, shares, strict=True)) if job and shares is not None else None

    def _patches(self, given: Input) -> tuple[Patch, ...] | None:
        """What adapters do to the base's tensor; None where the model is not the base with them."""
        sources = self.engine.plan.sources
        origin = sources[given.model]
        if origin == sources["base"]:
            return ()
        if not isinstance(origin, Adapted) or origin.model != sources["base"]:
            return None
        return origin.patches.get(given.spec.name, ())

    def _adds(self, given: Input) -> bool:
        """Whether what adapters do to it is no more than to add products."""
        patches = self._patches(given)
        return patches is not None and all(p.parts.keys() == {"a", "b"} for p in patches)

    def _factors(self, given: Input) -> list[tuple[TensorSpec, TensorSpec, int]]:
        """A and B of each adapter on it, as they are stored, and for how many matrices."""
        origin = self.engine.plan.sources[given.model]
        if not isinstance(origin, Adapted):
            return []
        patches = origin.patches.get(given.spec.name, ())
        held = [(origin.adapters[p.adapter].specs, p.parts, p.stack) for p in patches]
        return [(specs[parts["a"]], specs[parts["b"]], stack) for specs, parts, stack in held]

    def _updates(self, given: Input) -> list[tuple[Tensor, Tensor]]:
        """The products that a model adds to the base's tensor."""
        reader = self.engine.readers[given.model]
        found = reader.updates(given.spec.name) if isinstance(reader, AdaptedReader) else []
        return found or []


def _keeps(job: TensorJob) -> bool:
    """Whether the method gives the base where every model is the base."""
    spec = registry.get(str(job.method))
    return spec.values == "deltas" or spec.holds("idempotent", job.parameters)


def _shares(job: TensorJob) -> list[float] | None:
    """The c_k of a method that is sum_k c_k D_k, found and checked on unit and random deltas."""
    if job.method is None or job.scope != "element":
        return None
    spec, n = registry.get(job.method), len(job.models)
    if spec.inputs & {"rng", "base", "role"}:
        return None
    draws = torch.Generator().manual_seed(0)
    probes = torch.cat([torch.eye(n), torch.randn(n, 64, generator=draws)], dim=1)
    result = spec.function(probes, **job.parameters)
    shares = result[:n]
    if not torch.allclose(result, shares @ probes, rtol=1e-4, atol=1e-5):
        return None
    exact = spec.function(torch.eye(n, dtype=torch.float64), **job.parameters).tolist()
    whole = spec.values == "deltas" or abs(sum(exact) - 1) < 1e-9
    return [float(share) for share in exact] if whole else None
