"""A device that is not there: its tensors lie in the processor's memory, and know it not.

They say that they are on `meta`, are computed with by the processor, and refuse what a GPU refuses:
an operation with a tensor of another device, numpy, an address. So a method that runs here gives
the processor's bytes, and runs on a GPU as far as devices go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "meta"
MOVES = ("copy_", "_to_copy", "_copy_from")


class There(Tensor):
    """A tensor on the device; `held` is what it is made of."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        made.held = inner
        return made

    def __repr__(self, **kwargs: Any) -> str:
        return f"There({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Inside, tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of torch's, done by the processor, its result where it is said to be."""
    given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    there = [each for each in given if isinstance(each, There)]
    name = func.overloadpacket.__name__
    if there and name not in MOVES:
        here = [each for each in given if not isinstance(each, There) and each.dim()]
        if here:
            raise RuntimeError(f"{name}: tensors are expected on one device, and one is on the cpu")
    asked = kwargs.get("device")
    target = torch.device(asked).type if asked is not None else DEVICE if there else "cpu"
    if name == "copy_":
        target = DEVICE if isinstance(args[0], There) else "cpu"
    inside = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    if asked is not None:
        inside["device"] = torch.device("cpu")
    found = func(*tree_map(_held, args), **tree_map(_held, inside))
    if target == DEVICE:
        found = tree_map(lambda one: There(one) if isinstance(one, Tensor) else one, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if there else found


def _held(value: Any) -> Any:
    return value.held if isinstance(value, There) else value


_tensor = torch.tensor


def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which asks no mode where it makes a tensor."""
    made = _tensor(data, **kwargs)
    return made if device is None else made.to(device)


def in_turn(true: Callable[[Any], Callable[[], None]]) -> Callable[[Any], Callable[[], None]]:
    """`devices.in_turn`, whose workers find the device."""

    def patched(devices: Any) -> Callable[[], None]:
        begin = true(devices)

        def begun() -> None:
            begin()
            Elsewhere().__enter__()

        return begun

    return patched
