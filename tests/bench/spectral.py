"""Times methods on singular vectors beside the SVD calls that their papers count; prints ratios.

    python -m tests.bench.spectral [--hidden 1024] [--experts 4] [--runs 3] [--device cpu] [--drawn]

A llama layer's matrices of random task vectors. For each method the calls are
`torch.linalg.svd(matrix, full_matrices=False)` of the shapes that its specification counts, in
fp32, one thread; they and the method take turns, and medians of the whole layer are taken: of CPU
seconds, or on a GPU of wall seconds.

With --drawn instead: leading triplets in a randomised basis beside those of the whole
decomposition, for spectra that fall and one that does not: the time, and what is lost of a matrix.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mowmerge.methods import registry
from mowmerge.methods.ops import settle
from mowmerge.methods.ops.spectral import few, leading_svd, svd
from mowmerge.scratch import Scratch

LIMIT = 1.3
Shape = tuple[int, int]


def tsv_m(m: int, k: int, n: int) -> list[Shape]:
    """One a model, and two polar factors of what is kept."""
    kept = n * max(1, min(m, k) // n)
    return [(m, k)] * n + [(m, kept), (kept, k)]


def iso_cts(m: int, k: int, n: int) -> list[Shape]:
    """The sum's, one a model, and two polar factors of r columns."""
    return [(m, k)] * (n + 1) + [(m, min(m, k)), (min(m, k), k)]


CASES: dict[str, tuple[str, dict[str, Any], Callable[[int, int, int], list[Shape]]]] = {
    "tsv_m": ("tsv_m", {}, tsv_m),
    "iso_c": ("iso_c", {}, lambda m, k, n: [(m, k)]),
    "iso_cts": ("iso_cts", {}, iso_cts),
    "star": ("star", {}, lambda m, k, n: [(m, k)] * n),
    "knots": ("knots", {}, lambda m, k, n: [(m, n * k)]),
    "knots, trim: global": ("knots", {"density": 0.3}, lambda m, k, n: [(m, n * k)]),
    "opcm": ("opcm", {}, lambda m, k, n: [(m, k)] * (n - 1)),
}


def layer(hidden: int) -> list[Shape]:
    """A llama layer's matrices."""
    wide, kv = hidden * 11 // 4, hidden // 4
    square, narrow = (hidden, hidden), (kv, hidden)
    return [square, narrow, narrow, square, (wide, hidden), (wide, hidden), (hidden, wide)]


def task_vectors(shape: Shape, n: int, device: str) -> Tensor:
    """A decaying spectrum with noise on it, as fine-tuning leaves."""
    draws = torch.Generator().manual_seed(0)
    rank = max(1, min(shape) // 8)
    left, right = (torch.randn(n, side, rank, generator=draws) for side in shape)
    decay = torch.linspace(1.0, 0.05, rank)
    found = (left * decay) @ right.mT + 0.3 * torch.randn(n, *shape, generator=draws)
    scaled: Tensor = found.to(device) / shape[1] ** 0.5
    return scaled


def merged(deltas: Tensor, name: str, given: dict[str, Any]) -> None:
    """The method on one matrix; where it takes statistics over the model, on this one alone, with
    what it keeps between the passes on the disk, as a merge has it."""
    spec, n = registry.get(name), len(deltas)
    if spec.scope(spec.complete(given)) == "model":
        each = {
            k: (v,) * n if spec.parameters[k].per_model else v
            for k, v in spec.complete(given).items()
        }
        with TemporaryDirectory() as folder, Scratch(Path(folder) / "scratch", 0) as scratch:
            once = scratch.once(0, name, deltas.device.type)
            state = settle(spec.reduce, deltas, each, matrix=True, once=once)
            spec.function(deltas, **given, state=state, once=once)
    else:
        spec.function(deltas, **given)


def seconds(work: Callable[[], object], device: str) -> float:
    """CPU seconds; wall seconds on a GPU, its queue emptied."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measured(hidden: int, n: int, runs: int, device: str) -> Iterator[tuple[str, float, float]]:
    """Each case: its name, seconds for the layer, seconds for the calls."""
    for case, (name, given, counted) in CASES.items():
        ours, theirs = [], []
        for _ in range(runs):
            ours.append(0.0)
            theirs.append(0.0)
            for shape in layer(hidden):
                deltas = task_vectors(shape, n, device)
                ours[-1] += seconds(partial(merged, deltas, name, given), device)
                for asked in counted(*shape, n):
                    matrix = task_vectors(asked, 1, device)[0]
                    call = partial(torch.linalg.svd, matrix, full_matrices=False)
                    theirs[-1] += seconds(call, device)
        yield case, median(ours), median(theirs)


def falling(shape: Shape, power: float) -> Tensor:
    """A matrix with the singular values j^-power."""
    draws, least = torch.Generator().manual_seed(0), min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, least, generator=draws)).Q for side in shape)
    found: Tensor = (left * torch.arange(1, least + 1).pow(-power)) @ right.T
    return found


SPECTRA: dict[str, Callable[[Shape], Tensor]] = {
    "1 / j": lambda shape: falling(shape, 1.0),
    "1 / sqrt(j)": lambda shape: falling(shape, 0.5),
    "low rank and noise": lambda shape: task_vectors(shape, 1, "cpu")[0],
    "noise alone": lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)),
}


def drawn(hidden: int, device: str) -> Iterator[tuple[str, int, float, float, float, float, float]]:
    """Each spectrum and rank: seconds for three matrices of a layer of the whole decomposition and
    of the drawn one, then of the worst matrix |D - D_q| / |D| of both, and |D_q - D_q'| / |D_q|.
    """
    for name, made in SPECTRA.items():
        shapes = dict.fromkeys(layer(hidden)[i] for i in (0, 4, 6))
        matrices = [made(shape).to(device) for shape in shapes]
        whole = [svd(matrix) for matrix in matrices]
        theirs = sum(seconds(partial(svd, matrix), device) for matrix in matrices)
        for rank in (r for r in (16, 32, 128) if few(r, (hidden, hidden))):
            ours, rows = 0.0, []
            for matrix, found in zip(matrices, whole, strict=True):
                ours += seconds(partial(leading_svd, matrix, rank), device)
                best, other = found.cut(rank).matrix, leading_svd(matrix, rank).matrix
                size = matrix.norm()
                lost = [float((matrix - one).norm() / size) for one in (best, other)]
                rows.append((*lost, float((best - other).norm() / best.norm())))
            yield name, rank, theirs, ours, *max(rows, key=lambda row: row[1] / row[0])


def show_drawn(hidden: int, device: str) -> None:
    """The table of it."""
    print("| values | rank | whole, s | drawn, s | lost, whole | lost, drawn | more | apart |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, rank, theirs, ours, best, lost, apart in drawn(hidden, device):
        print(
            f"| {name} | {rank} | {theirs:.2f} | {ours:.2f} | {best:.4f} | {lost:.4f} |"
            f" {lost / best - 1:.2%} | {apart:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the methods on singular vectors.")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--drawn", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.drawn:
        show_drawn(asked.hidden, asked.device)
        raise SystemExit
    print("| method | ours, s | the calls, s | ratio | at most 1.3 |")
    print("| --- | ---: | ---: | ---: | --- |")
    for case, ours, calls in measured(asked.hidden, asked.experts, asked.runs, asked.device):
        held = "yes" if ours <= LIMIT * calls else "no"
        print(f"| {case} | {ours:.2f} | {calls:.2f} | {ours / calls:.2f} | {held} |", flush=True)
