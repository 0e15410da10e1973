"""What other implementations compute in WEMoE, SMILE and MoW, from the same tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mowmerge.dynamic import codecs
from mowmerge.dynamic.context import Context
from mowmerge.dynamic.format import Code, Gate, Manifest, Router
from mowmerge.dynamic.layers import install
from mowmerge.dynamic.names import part_in_memory
from mowmerge.dynamic.routers import RouterModule, projections
from mowmerge.methods.ops.spectral import truncated

torch.set_num_threads(1)
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {c["id"]: c for c in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}


def _held(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    folder = GOLDEN / "cases" / case
    return load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")


def _near(found: Tensor, want: Tensor, case: str) -> None:
    tolerance = CASES[case]["tolerance"]
    assert torch.allclose(found, want, atol=tolerance["atol"], rtol=tolerance["rtol"])


def _context(
    model: nn.Module, codes: Sequence[Code], state: dict[str, Tensor], scope: str, router: Router
) -> Context:
    """The context of a model `m.*` into which codes were put, and their parts."""
    slots = codes[0].slots
    gates, wrapped = {"g": Gate(scope, "r")}, nn.ModuleDict({"m": model})
    context = Context(gates, {"g": slots}, {"r": RouterModule(router).fresh()})
    manifest = Manifest("golden", ("",) * slots, tuple(codes), gates, {"r": router})
    install(wrapped, manifest, context, lambda name: name)
    wrapped.load_state_dict(state)
    return context


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, held: dict[str, Tensor]) -> None:
        super().__init__()
        wide, d = held["base.fc1.weight"].shape
        self.fc1, self.fc2 = nn.Linear(d, wide), nn.Linear(wide, d)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return y


@pytest.mark.parametrize("case", ["wemoe_d1_seqfirst", "wemoe_d2"])
def test_wemoe_is_fusion_benchs_sample_by_sample(case: str) -> None:
    held, want = _held(case)
    asked = CASES[case]["parameters"]
    x = held["x"] if asked["batch_first"] else held["x"].transpose(0, 1)
    kind, k, d = ("linear", "mlp")[asked["router_hidden_layers"] - 1], asked["K"], x.shape[-1]
    first = next((v for n, v in held.items() if n.startswith("gate") and v.dim() > 1), x)
    router = Router(kind, d, k, hidden=len(first) if kind == "mlp" else 0, activation="none")
    model, codes, state = Mlp(held), [], {}
    for name, value in model.named_parameters():
        codes.append(Code(f"m.{name}", tuple(value.shape), "full", k, "g"))
        experts = torch.stack([held[f"expert{i}.{name}"] for i in range(k)])
        state[part_in_memory(codes[-1].name, "delta")] = experts - held[f"base.{name}"]
        state[f"m.{name}"] = held[f"base.{name}"]
    context = _context(model, codes, state, "block", router)
    layers = [n.removesuffix(".weight") for n in sorted(held) if n.startswith("gate.")
              and n.endswith("weight")]  # fmt: skip
    for layer, ours in zip(layers, ("first", "last") if kind == "mlp" else ("last",), strict=True):
        own = {p: held[f"{layer}.{p}"] for p in ("weight", "bias")}
        context.routers["r"].get_submodule(ours).load_state_dict(own)

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        context.begin(len(rows))
        with torch.no_grad():
            y = model(rows)
        return (y if asked["batch_first"] else y.transpose(0, 1)), context.raw["g"]

    y, gate = run(x)
    _near(gate, want["gate"], case)
    _near(y, want["y"], case)
    for b in range(len(x)):
        _near(run(x[b : b + 1])[0], want[f"y_single_{b}"], case)


@pytest.mark.parametrize("case", ["smile_top1", "smile_top2_full"])
def test_smile_is_fusion_benchs(case: str) -> None:
    held, want = _held(case)
    asked, x, base = CASES[case]["parameters"], held["x"], held["base.weight"]
    k = sum(n.startswith("expert") and n.endswith("weight") for n in held)
    deltas = torch.stack([held[f"expert{i}.weight"] - base for i in range(k)])
    rank, top = asked["gate_k"], asked["top_k"]
    gate = torch.linalg.svd(deltas, full_matrices=False)[2][:, :rank].reshape(-1, base.shape[1])
    score = projections(x, gate, k).flatten(0, 1)
    _near(score, want["router_logits"], case)
    _near(score.softmax(-1), want["probs"], case)
    model = nn.Linear(base.shape[1], base.shape[0], bias="base.bias" in held)
    names = {"weight": ("low_rank" if asked["k"] > 0 else "full"), "bias": "full"}
    codes, state = [], {}
    for name, value in model.named_parameters():
        codec, shape = names[name], tuple(value.shape)
        own = {"rank": asked["k"]} if codec == "low_rank" else {}
        own |= {"gate_rank": rank} if name == "weight" else {}
        code = Code(f"m.{name}", shape, codec, k, "g", **own)
        delta = torch.stack([held[f"expert{i}.{name}"] - held[f"base.{name}"] for i in range(k)])
        parts = {"delta": delta}
        if codec == "low_rank":
            parts = codecs.low_rank(truncated(delta, asked["k"])[0])
        parts |= {"gate": gate} if name == "weight" else {}
        state |= {part_in_memory(code.name, p): v for p, v in parts.items()}
        state[code.name] = held[f"base.{name}"]
        codes.append(code)
    router = Router("projection", base.shape[1], k, top_k=top)
    inside = nn.Sequential(model)  # the layer itself is replaced
    moved = [replace(code, name=code.name.replace("m.", "m.0.")) for code in codes]
    state = {name.replace("m.", "m.0."): value for name, value in state.items()}
    context = _context(inside, moved, state, "module", router)
    context.begin(len(x))
    with torch.no_grad():
        _near(inside(x), want["y"], case)


@pytest.mark.parametrize("codec", ["full_abs", "full"])
def test_mow_mixes_experts_sample_by_sample(codec: str) -> None:
    """Over a static mean of experts, as anchor; the released code's batch mean is not ours."""
    case = "mow_merge_gate"
    want = load_file(GOLDEN / "cases" / case / "expected.safetensors")
    names = json.loads((GOLDEN / "cases" / case / "extra.json").read_text())["dynamic"]
    folders = [GOLDEN / folder for folder in CASES[case]["inputs"]]
    experts = [load_file(folder / "model.safetensors") for folder in folders]
    gate = torch.tensor(CASES[case]["parameters"]["gate"])
    for name in names:
        each = torch.stack([expert[name] for expert in experts])
        anchor = each.mean(0)
        code = Code(name, tuple(anchor.shape), codec, len(each), "0")
        parts = {"abs": each} if codec == "full_abs" else {"delta": each - anchor}
        found = codecs.mixed(code, parts, anchor, gate)
        for b in range(len(gate)):
            _near(found[b], want[f"{b}/{name}"], case)
        if codec == "full_abs":
            assert torch.equal(found[1], experts[1][name])
