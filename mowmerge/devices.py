"""Which devices a merge computes on: those a user names, and whose turn a worker is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from threading import local

from mowmerge.errors import ResourceError
from mowmerge.plan import Plan
from mowmerge.tensors import torch

PROCESSOR = "cpu"
_worker = local()


def named(text: str) -> tuple[str, ...]:
    """The devices that a text names: cpu, cuda (every GPU that is visible), cuda:1, or several of
    a kind with commas between them. Torch is loaded for `cuda` alone.

    Raises:
        ResourceError: devices of several kinds, which would not give the same bytes.
    """
    found: list[str] = []
    for each in map(str.strip, text.split(",")):
        count = torch.cuda.device_count() if each == "cuda" else 0
        found += [f"cuda:{i}" for i in range(count)] or [each]
    if len({kind(each) for each in found}) > 1:
        raise ResourceError(
            f"the devices '{text}' are of several kinds", hint="name GPUs, or the cpu, not both"
        )
    return tuple(found)


def kind(device: str) -> str:
    """cpu, cuda ..."""
    return device.partition(":")[0]


def check(devices: Sequence[str]) -> None:
    """ResourceError where torch cannot use one of the devices."""
    for device in devices:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ResourceError(
                f"the device '{device}' cannot be used: {str(error).splitlines()[0]}",
                hint="use --device cpu, or install a torch build for that device",
            ) from error


def in_turn(devices: Sequence[str]) -> Callable[[], None]:
    """What each new worker of a pool calls: it takes the next of the devices for its own."""
    turns = cycle(devices)

    def begin() -> None:
        _worker.device = next(turns)

    return begin


def own() -> str | None:
    """The device of this thread where it is a worker."""
    return getattr(_worker, "device", None)


def on_own(plan: Plan) -> Plan:
    """The plan as it is for this thread: with one device, the worker's or the first."""
    if len(plan.devices) == 1:
        return plan
    mine = own()
    return replace(plan, devices=(mine if mine in plan.devices else plan.devices[0],))
