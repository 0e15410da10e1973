"""Measures dynamic forwards and router training beside the plain model's; prints ratios.

    python -m tests.bench.forward [--runs 5] [--batch 32] [--device cpu|cuda] [--layers 12]

A ViT-B/32-sized model with random weights; the MLPs of all layers are WEMoE's, over 8 experts, each
layer with a router of its own (two layers, as wide as the model), each sample with its own gates.
Cases take turns in each of the runs, on two cores; ratios are taken inside a turn, of wall and of
CPU time, and medians of them are told (on a machine that others use as well, CPU time is fairer).
Peak is what a forward holds beyond the plain one's, by the allocator's own count.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from mowmerge.dynamic.format import Code, Gate, Manifest, Router
from mowmerge.dynamic.modeling import MowmergeConfig, dynamic_class

Taken = dict[str, list[tuple[float, float]]]
K, RANK, MB = 8, 32, 1e6
SIZE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32}  # fmt: skip


def dynamic(plain: Any, codec: str) -> Any:
    """The model whose MLPs have 8 experts and a router a layer."""
    found = {n: p for n, p in plain.named_parameters() if ".mlp." in n}
    codes = []
    for name, value in found.items():
        kind = codec if value.dim() > 1 else "full"
        rank = RANK if kind == "low_rank" else 0
        codes.append(Code(name, tuple(value.shape), kind, K, name.split(".")[1], rank=rank))
    layers = sorted({code.gate for code in codes}, key=int)
    gates = {layer: Gate("block", layer, 0.3) for layer in layers}
    router = Router("mlp", 768, K, hidden=768, activation="none", init=0.3)
    manifest = Manifest(
        "wemoe", tuple("abcdefgh"), tuple(codes), gates, dict.fromkeys(gates, router)
    )
    config = MowmergeConfig(base_config=plain.config.to_dict(), mowmerge=manifest.to_json())
    model = dynamic_class(ViTModel)(config, add_pooling_layer=False)
    draw = torch.Generator().manual_seed(0)
    state = dict(plain.state_dict())
    for code in codes:
        delta = 1e-3 * torch.randn(K, *code.shape, generator=draw)
        parts = {"delta": delta}
        if code.codec == "low_rank":  # random factors: what they are does not matter here
            shapes = {n: part.shape for n, part in code.parts.items()}
            parts = {n: 1e-2 * torch.randn(shapes[n], generator=draw) for n in ("u", "v")}
            parts["slot"] = torch.arange(K, dtype=torch.int32).repeat_interleave(RANK)
        state |= {code.part_name(n): v for n, v in parts.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("mow_router") for name in missing)
    with torch.no_grad():  # gates that differ from sample to sample
        for value in model.mow_router.parameters():
            if value.dim() > 1:
                value.normal_(0, 0.05, generator=draw)
    return model.eval()


def one_at_a_time(plain: Any, model: Any, x: Tensor, gates: Tensor) -> None:
    """What per-sample merging costs without this: merge the MLPs for a sample, forward it, next."""
    modules = dict(model.named_modules())
    held = {n: p for n, p in plain.named_parameters() if ".mlp." in n}
    layers = list(model._manifest.gates)
    for b in range(len(x)):
        own = {}
        for name, anchor in held.items():
            path, _, leaf = name.rpartition(".")
            module, s = modules[path], layers.index(name.split(".")[1]) * K
            c, parts = gates[b, s : s + K] - 0.3, module.parts(leaf)
            if "u" in parts:
                each = parts["u"] * c.repeat_interleave(RANK)
                own[name] = torch.addmm(anchor, each, parts["v"])
            else:
                delta = parts["delta"].view(K, -1)
                own[name] = torch.addmv(anchor.view(-1), delta.T, c).view_as(anchor)
        torch.func.functional_call(plain, own, (x[b : b + 1],))


def entropy(states: Tensor) -> Tensor:
    """A loss as of entropy training, over 100 classes."""
    p = states[:, 0, :100].softmax(-1)
    return -(p * (p + 1e-8).log()).sum(-1).mean()


def step(model: Any, x: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    entropy(model(x).last_hidden_state).backward()


def seconds(do: Callable[[], Any], device: str) -> tuple[float, float]:
    """How long it takes, once: wall and CPU time."""
    if device == "cuda":
        torch.cuda.synchronize()
    began, busy = time.perf_counter(), time.process_time()
    do()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - busy


def extra(do: Callable[[], Any], base: Callable[[], Any], device: str) -> float:
    """Bytes that the one holds at its peak beyond what the other holds."""
    return peak(do, device) - peak(base, device)


def peak(do: Callable[[], Any], device: str) -> float:
    """Bytes allocated at the peak, beyond those before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        do()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as trace:
        do()
    held = highest = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def measure(asked: argparse.Namespace) -> tuple[Taken, dict[str, float]]:
    """Each case's seconds, turn by turn, and each codec's extra bytes."""
    torch.manual_seed(0)
    config = ViTConfig(**SIZE, num_hidden_layers=asked.layers)
    plain = ViTModel(config, add_pooling_layer=False).eval().to(asked.device)
    x = torch.randn(asked.batch, 3, 224, 224, device=asked.device)
    models = {c: dynamic(plain, c).to(asked.device) for c in ("full", "low_rank")}

    def quiet(do: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(do)

    cases: dict[str, Callable[[], Any]] = {"plain": quiet(lambda: plain(x))}
    for codec, model in models.items():
        gates = model.route(x)
        cases[codec] = quiet(lambda model=model: model(x))
        cases[f"{codec}, one at a time"] = quiet(
            lambda model=model, gates=gates: one_at_a_time(plain, model, x, gates)
        )
        cases[f"{codec}, step"] = lambda model=model: step(model, x)
    plain.requires_grad_(True)
    cases["plain, step"] = lambda: step(plain, x)
    taken: Taken = {name: [] for name in cases}
    for turn in range(-1, asked.runs):  # the first one warms up
        for name, do in cases.items():
            found = seconds(do, asked.device)
            plain.zero_grad(set_to_none=True)
            if turn >= 0:
                taken[name].append(found)
        print(f"[{turn + 1}/{asked.runs}]", file=sys.stderr, flush=True)
    memory = {}
    for codec, model in models.items():
        model._context._scratch.clear()
        memory[codec] = extra(cases[codec], cases["plain"], asked.device)
    return taken, memory


def ratio(taken: Taken, a: str, b: str) -> list[float]:
    """Medians over the turns of one case's time over another's: wall and CPU."""
    pairs = list(zip(taken[a], taken[b], strict=True))
    return [median(x[i] / y[i] for x, y in pairs) for i in (0, 1)]


def targets(taken: Taken, memory: Mapping[str, float]) -> Any:
    """What is wanted: what, the figures by wall and CPU, the limit, and whether more is better."""
    for codec, most, least in (("full", 2.5, 2.0), ("low_rank", 1.5, 2.5)):
        alone, learning = f"{codec}, one at a time", f"{codec}, step"
        yield f"{codec}: forward over the plain one", ratio(taken, codec, "plain"), most, False
        yield f"{codec}: one sample at a time over ours", ratio(taken, alone, codec), least, True
        yield f"{codec}: step over the plain one", ratio(taken, learning, "plain, step"), 3, False
        yield f"{codec}: peak beside the plain one's, MB", [memory[codec] / MB], 32, False


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure dynamic forwards; print ratios.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    if asked.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        torch.set_num_threads(2)
    taken, memory = measure(asked)
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "two cores"
    print(f"ViT-B/32 size, {asked.layers} layers, batch {asked.batch}, {K} experts, {name},")
    print(f"medians of {asked.runs} runs.\n\n| case | wall, s | CPU, s |\n| --- | ---: | ---: |")
    for case, each in taken.items():
        wall, busy = (median(times) for times in zip(*each, strict=True))
        print(f"| {case} | {wall:.2f} | {busy:.2f} |")
    print("\n| target | by wall | by CPU | wanted | holds |\n| --- | ---: | ---: | ---: | ---: |")
    for what, values, limit, more in targets(taken, memory):
        holds = values[0] >= limit if more else values[0] <= limit
        wanted = f"{'at least' if more else 'at most'} {limit}"
        cells = [f"{value:.2f}" for value in (*values, *values)[:2]]
        print(f"| {what} | {' | '.join(cells)} | {wanted} | {'yes' if holds else 'no'} |")


if __name__ == "__main__":
    main()
