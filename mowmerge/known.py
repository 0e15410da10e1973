"""What is known of a difference beforehand, and how far its updates are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mowmerge.checkpoint.lowrank import Factors


@dataclass(frozen=True)
class Cut:
    """How far low-rank updates are cut: to a rank, or to the rank that keeps a share of energy."""

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Joint:
    """Factors side by side, of the rank `summed` before they are cut, in `nbytes` of adapters."""

    summed: int
    nbytes: int
    cut: Cut

    @property
    def exact(self) -> bool:
        """Whether nothing is cut."""
        return self.cut.energy is None and self.rank == self.summed

    @property
    def rank(self) -> int:
        """The rank they are cut to; with an energy, the most it can be."""
        return self.summed if self.cut.rank is None else min(self.summed, self.cut.rank)


class Known(Protocol):
    """What is known of a difference before a tensor of the two models is read."""

    def joint(self, name: str) -> Joint | None:
        """The rank of the tensor's factors, from headers; None where `joined` gives none, or only
        finds their rank."""

    def joined(self, name: str) -> Factors | None:
        """The factors of the tensor's update, where it is known as such."""

    def same(self, name: str) -> bool:
        """Whether the model's tensor is the base's."""


class Unknown:
    """Of two checkpoints nothing is known beforehand."""

    def joint(self, name: str) -> None:
        """None."""

    def joined(self, name: str) -> None:
        """None."""

    def same(self, name: str) -> bool:
        """False."""
        return False
