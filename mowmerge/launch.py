"""What torchrun or accelerate started: the ranks of one piece of work, and what is each one's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from mowmerge import lock, ranks
from mowmerge.checkpoint.journal import changed
from mowmerge.planner import Options
from mowmerge.ranks import Ranks


@contextmanager
def joined(
    options: Options, timeout: float, verb: str = "merge"
) -> Iterator[tuple[Ranks, Options]]:
    """The ranks, of which one that says nothing for that many minutes is gone, and the options as
    they are for this one: its device, and its share of the processors. One process is one rank.

    Raises:
        ResourceError: they do not meet, or do not run the same versions.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks(), options
        return
    from mowmerge.training import processes

    one = processes.begin(options.device, verb, timeout)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))  # unknown: as on several hosts
    workers = options.workers or max(1, min(8, (os.cpu_count() or 1) // max(1, here)))
    device = options.device if options.device == "cpu" else str(one.device)
    with ranks.joined(one.rank, one.count, here, timeout) as found:
        found.alike(lock.versions, changed)
        yield found, replace(options, workers=workers, device=device)
