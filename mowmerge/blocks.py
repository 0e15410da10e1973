"""How many elements of a tensor are worked on at a time."""

from __future__ import annotations

from mowmerge.plan import TensorJob, run_length

WHOLE = ("low_rank", "basis")  # codecs that need the whole tensor at once


def block_length(block: int, job: TensorJob, *, whole: bool) -> int:
    """Elements worked on at a time: the plan's block, whole rows, or for a method that reads the
    whole tensor at once (`whole`: scope tensor without a reduction) all of them. What a method on
    matrices makes is given in blocks."""
    numel, shape = job.output.numel, job.output.shape
    if job.method and job.scope == "tensor" and whole and not job.matrix:
        return max(numel, 1)
    if job.code is not None and job.scope != "row":
        rows = 1 if job.code.codec in WHOLE or len(shape) < 2 else shape[0]
        row = max(1, numel // max(1, rows))
        return max(1, block // row) * row
    if job.method and job.scope == "row":
        run = run_length(numel // shape[0] if len(shape) > 1 and shape[0] else numel)
        return max(1, block // run) * run
    return max(1, min(block, numel))
