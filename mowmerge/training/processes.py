"""The processes that train together, as accelerate reports them, and the device of this one."""

from __future__ import annotations

import atexit
import os
import socket
import warnings
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from mowmerge.errors import ResourceError, SourceError
from mowmerge.ranks import heard
from mowmerge.tensors import Tensor, torch

INTERFACE = "GLOO_SOCKET_IFNAME"
TIMEOUT = 30.0  # minutes; where the user has no say, as torch's own


@dataclass(frozen=True)
class Processes:
    """This process's rank, how many there are, the device that it computes on; how many minutes it
    waits for the others, and what the user may do when one of them is gone."""

    rank: int
    count: int
    device: Any
    minutes: float = TIMEOUT
    again: str = "run it again"

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        mine = tensor.to(self.device)
        with self._heard():
            found: Tensor = reduce(mine, "sum")
        return found.to(tensor.device)

    def gathered(self, value: Any) -> list[Any]:
        """What each process holds, in the order of their ranks."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        with self._heard():
            found: list[Any] = gather_object([value])
        return found

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            with self._heard():
                PartialState().wait_for_everyone()

    def _heard(self) -> AbstractContextManager[None]:
        return heard(self.minutes, self.again)


def begin(
    device: str | None = None, verb: str = "train-router", minutes: float = TIMEOUT
) -> Processes:
    """Joins the processes that torchrun or accelerate started; gloo on CPUs.

    `device` is cpu, cuda or cuda:1; None is a GPU where there is one. They wait for each other that
    many minutes, to meet and then at each exchange.

    Raises:
        ResourceError: no such device; the processes do not meet in time, or are fewer than
            WORLD_SIZE says: each of them would believe that it is the only one.
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

    across = os.environ.get("LOCAL_WORLD_SIZE", str(told)) != str(told)
    if across and INTERFACE not in os.environ:
        _name_interface()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
            state = PartialState(
                cpu=device == "cpu" or not gpu, timeout=timedelta(minutes=minutes)
            )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise ResourceError(
            f"WORLD_SIZE says {told} processes, and they do not meet: {str(error).splitlines()[0]}",
            hint=f"name the network interface that the hosts share: {INTERFACE}=eth0" if across
            else hint,
        ) from error  # fmt: skip
    if state.num_processes > 1:
        atexit.register(_leave)
    if told != state.num_processes:
        raise ResourceError(
            f"WORLD_SIZE says {told} processes, and accelerate sees {state.num_processes}",
            hint=hint,
        )
    alone = state.num_processes == 1
    chosen = torch.device(device or ("cuda" if gpu else "cpu")) if alone else state.device
    again = "run it again" if verb == "eval" else "run it again with --resume"
    return Processes(state.process_index, state.num_processes, chosen, minutes, again)


def _name_interface() -> None:
    """Names the network interface by which rank 0 is reached, where gloo would take the loopback
    for it: it goes by the host's own name, which on many hosts stands for 127.0.1.1."""
    import psutil

    with suppress(OSError):
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return
    held = {
        at.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for at in addresses
        if at.family == socket.AF_INET and not at.address.startswith("127.")
    }
    reached = None
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))  # sends nothing
        reached = held.get(probe.getsockname()[0])
    if reached or len(held) == 1:
        os.environ[INTERFACE] = reached or next(iter(held.values()))


def _leave() -> None:
    """Ends the process group, whose threads would end the process with an abort."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
