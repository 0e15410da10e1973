"""The processes that train together, as accelerate reports them, and the device of this one."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mowmerge.errors import ResourceError, SourceError
from mowmerge.tensors import Tensor, torch


@dataclass(frozen=True)
class Processes:
    """This process's rank, how many there are, and the device that it computes on."""

    rank: int
    count: int
    device: Any

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        found: Tensor = reduce(tensor.to(self.device), "sum")
        return found.to(tensor.device)

    def gathered(self, value: Any) -> list[Any]:
        """What each process holds, in the order of their ranks."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([value])
        return found

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def begin(device: str | None = None, verb: str = "train-router") -> Processes:
    """Joins the processes that torchrun or accelerate started; gloo on CPUs.

    `device` is cpu, cuda or cuda:1; None is a GPU where there is one.

    Raises:
        ResourceError: no such device, or fewer processes in sight than WORLD_SIZE says: each of
            them would believe that it is the only one.
        SourceError: several processes, and accelerate is not installed.
    """
    gpu = torch.cuda.is_available()
    if device and device != "cpu" and not gpu:
        raise ResourceError(f"there is no device '{device}' here", hint="--device cpu")
    told = int(os.environ.get("WORLD_SIZE", "1"))
    hint = f"start them with `torchrun --nproc_per_node {told} -m mowmerge {verb} ...`"
    if told > 1 and "RANK" not in os.environ:
        raise ResourceError(
            f"WORLD_SIZE says {told} processes, and nothing says which of them this is", hint=hint
        )
    if not find_spec("accelerate"):
        if told == 1:
            return Processes(0, 1, torch.device(device or ("cuda" if gpu else "cpu")))
        raise SourceError(
            "several processes need accelerate, which is not installed",
            hint='pip install "mowmerge[train]"',
        )
    from accelerate import PartialState

    try:
        state = PartialState(cpu=device == "cpu" or not gpu)
    except (ValueError, RuntimeError) as error:
        raise ResourceError(
            f"WORLD_SIZE says {told} processes, and they do not meet: {str(error).splitlines()[0]}",
            hint=f"start them with `torchrun --nproc_per_node {told} -m mowmerge {verb} ...`",
        ) from error
    if state.num_processes > 1:
        atexit.register(_leave)
    if told != state.num_processes:
        raise ResourceError(
            f"WORLD_SIZE says {told} processes, and accelerate sees {state.num_processes}",
            hint=hint,
        )
    alone = state.num_processes == 1
    chosen = torch.device(device or ("cuda" if gpu else "cpu")) if alone else state.device
    return Processes(state.process_index, state.num_processes, chosen)


def _leave() -> None:
    """Ends the process group, whose threads would end the process with an abort."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
