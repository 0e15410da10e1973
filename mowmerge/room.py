"""What is done where a device has no room: shorter blocks, and at last the processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from mowmerge.devices import PROCESSOR, on_own
from mowmerge.plan import RUN, Plan
from mowmerge.tensors import torch

T = TypeVar("T")


def fitting(plan: Plan, work: Callable[[Plan], T]) -> tuple[T, Plan]:
    """What the work returns under the first plan that has room for it, and that plan: of several
    devices it has the one that is this thread's.

    Work that runs out of a device's memory is begun again; its result does not depend on the
    length of blocks. On the processor there is one try, and what it raises is raised.
    """
    *narrower, last = _plans(on_own(plan))
    for each in narrower:
        try:
            return work(each), each
        except torch.OutOfMemoryError:  # the error holds the tensors of the attempt: let it go
            pass
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return work(last), last


def _plans(plan: Plan) -> Iterator[Plan]:
    """The plan, with blocks half as long until they are the shortest, and on the processor."""
    yield plan
    if plan.device == PROCESSOR:
        return
    block = plan.block
    while block > RUN:
        block = max(RUN, block // 2 // RUN * RUN)
        yield replace(plan, block=block)
    yield replace(plan, devices=(PROCESSOR,))
