"""Each kind of module mixes its tensors as the equation says, for every codec, and learns so."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from making import CODECS, K, coded
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from mowmerge.dynamic import codecs, linear
from mowmerge.dynamic.context import Context
from mowmerge.dynamic.embedding import MixedEmbedding
from mowmerge.dynamic.format import Code, Gate, Manifest, Router
from mowmerge.dynamic.layers import install
from mowmerge.dynamic.names import part_in_memory
from mowmerge.dynamic.routers import RouterModule

B, D, OUT = 4, 6, 10
ONE_HOT = torch.eye(K)[[0, 2, 1, 2]]
LEAN = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 0]])
SOFT = torch.randn(B, K, generator=torch.Generator().manual_seed(3))


class Bare(nn.Module):
    """A class token and a vector that multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.scales = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x * self.scales], 1)


def _scaled(norm: Any) -> Any:
    norm.weight.data.normal_()
    return norm


MODULES = {
    "linear": (lambda: nn.Linear(D, OUT), (B, 5, D)),
    "linear, no bias": (lambda: nn.Linear(D, OUT, bias=False), (B, 5, D)),
    "linear, vectors": (lambda: nn.Linear(D, OUT), (B, D)),
    "conv1d": (lambda: Conv1D(OUT, D), (B, 5, D)),
    "patches": (lambda: nn.Conv2d(3, OUT, 2, 2), (B, 3, 6, 4)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (B, 4, 5, 5)),
    "sounds": (lambda: nn.Conv1d(3, OUT, 3, 2, padding=1), (B, 3, 9)),
    "volume": (lambda: nn.Conv3d(2, 4, 2, 2, bias=False), (B, 2, 4, 4, 2)),
    "layer norm": (lambda: _scaled(nn.LayerNorm(D)), (B, 5, D)),
    "llama norm": (lambda: _scaled(LlamaRMSNorm(D)), (B, 5, D)),
    "gemma norm": (lambda: _scaled(GemmaRMSNorm(D)), (B, 5, D)),
    "head norm": (lambda: _scaled(LlamaRMSNorm(D)), (B * 5, 2, D)),
    "bare": (Bare, (B, 5, D)),
}


def installed(
    plain: nn.Module, codec: str, scope: str = "task", router: Router | None = None
) -> tuple[nn.Sequential, Context, list[dict[str, Tensor]]]:
    """A module mixed in all its tensors, its context, and each slot's deltas."""
    model, codes, deltas = nn.Sequential(deepcopy(plain)), [], [{} for _ in range(K)]
    held = {}
    for name, value in plain.named_parameters():
        code, parts, delta = coded(f"0.{name}", value.detach(), codec, "g")
        codes.append(code)
        held |= {part_in_memory(code.name, part): v for part, v in parts.items()}
        for s in range(K):
            deltas[s][name] = delta[s]
    routers = {"r": router} if router else {}
    gates = {"g": Gate(scope, "r" if router else "")}
    manifest = Manifest("test", tuple("abc"), tuple(codes), gates, routers)
    context = Context(gates, {"g": K}, {n: RouterModule(r).fresh() for n, r in routers.items()})
    install(model, manifest, context, lambda name: name)
    missing, unexpected = model.load_state_dict(held, strict=False)
    assert not unexpected
    assert not any("dyn_" in name for name in missing)
    for value in model.parameters():
        value.requires_grad_(False)
    return model, context, deltas


def naive(
    plain: nn.Module, deltas: list[dict[str, Tensor]], c: Tensor, x: Tensor, times: int = 1
) -> Tensor:
    """Sample by sample, with the module's own forward and weights built by hand."""
    rows = []
    for b in range(len(c)):
        own = {
            name: value.detach() + sum(c[b, s] * deltas[s][name] for s in range(K))
            for name, value in plain.named_parameters()
        }
        rows.append(functional_call(plain, own, (x[b * times : (b + 1) * times],)))
    return torch.cat(rows)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", MODULES)
def test_output_is_the_equations(kind: str, codec: str) -> None:
    torch.manual_seed(0)
    made, shape = MODULES[kind]
    plain, x = made(), torch.randn(shape)
    model, context, deltas = installed(plain, codec)
    for c in (SOFT, ONE_HOT, SOFT[:1].expand(B, -1), SOFT[[0, 1, 1, 1]]):
        context.begin(B)
        context.set("g", c)
        want = naive(plain, deltas, c, x, len(x) // B)
        assert torch.allclose(model(x), want, atol=2e-5), c
    for c in (ONE_HOT[[1, 1, 2, 1]], SOFT * torch.tensor([1.0, 0, 1]), LEAN):  # slots not used
        context.begin(B)
        context.set("g", c)
        want = naive(plain, deltas, c, x, len(x) // B)
        assert torch.allclose(model(x), want, atol=2e-5), c
    context.begin(B)
    context.set("g", torch.zeros(B, K))
    assert torch.equal(model(x), plain(x))
    context.begin(B, active=False)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", MODULES)
def test_gradients_are_those_of_a_naive_construction(kind: str, codec: str) -> None:
    torch.manual_seed(0)
    made, shape = MODULES[kind]
    plain, x = made(), torch.randn(shape, requires_grad=True)
    model, context, deltas = installed(plain, codec)
    c = SOFT.clone().requires_grad_()
    context.begin(B)
    context.set("g", c)
    y = model(x)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, c), g)
    want = torch.autograd.grad(naive(plain, deltas, c, x, len(x) // B), (x, c), g)
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b, atol=1e-4), (a - b).abs().max()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_gradients_are_those_of_finite_differences(
    codec: str, transposed: bool, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "BUDGET", budget)  # 1: a row at a time
    torch.manual_seed(0)
    anchor = torch.randn(3, 5)
    code, parts, _ = coded("t.weight", anchor, codec)
    wide = {n: p.double() if p.is_floating_point() else p for n, p in parts.items()}
    context = Context({}, {})
    held = linear.Held(anchor.double(), code, wide, transposed, context)
    x = torch.randn(2, 2, 3 if transposed else 5, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    product = linear.MixedProduct.apply
    assert torch.autograd.gradcheck(lambda x, c: product(x, c, None, held), (x, c))
    if codec == "one_bit":
        factor = torch.rand(K, dtype=torch.float64).add_(0.5).requires_grad_()
        held = replace(held, code=replace(code, fitted=True), parts={**wide, "factor": factor})
        assert torch.autograd.gradcheck(lambda *given: product(*given, held), (x, c, factor))


@pytest.mark.parametrize("codec", CODECS)
def test_table_gives_each_sample_its_own_rows(codec: str) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(12, D)
    model, context, deltas = installed(plain, codec)
    ids = torch.randint(0, 12, (B, 5))
    for given, each in ((ids, ids), (ids[:1], ids[:1].expand(B, -1)), (ids[0], ids[:1])):
        c = SOFT.clone().requires_grad_()
        context.begin(B)
        context.set("g", c)
        y, want = model(given), naive(plain, deltas, c, each.expand(B, -1))
        assert torch.allclose(y, want, atol=1e-5)
        g = torch.randn_like(y)
        found, right = torch.autograd.grad(y, c, g), torch.autograd.grad(want, c, g)
        assert torch.allclose(found[0], right[0], atol=1e-5)
    context.begin(B)
    context.set("g", SOFT)
    with pytest.raises(ValueError, match="2 rows for 4 samples"):
        model(ids[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_table_gives_the_expert_bit_for_bit_with_full_abs(dtype: torch.dtype) -> None:
    """Near the anchor, A + (W_s - A) is not W_s."""
    torch.manual_seed(0)
    plain = nn.Embedding(12, D, dtype=dtype)
    experts = (plain.weight.detach() + 0.3 * torch.randn(K, 12, D)).to(dtype)
    code = Code("m.weight", (12, D), "full_abs", K, "g")
    context = Context({"g": Gate("sample", "r")}, {"g": K})
    model = MixedEmbedding(plain, {"weight": code}, context)
    model.dyn_abs = experts
    ids = torch.randint(0, 12, (B, 5))
    context.begin(B)
    context.set("g", ONE_HOT)
    want = torch.stack([experts[k][row] for k, row in zip(ONE_HOT.argmax(1), ids, strict=True)])
    assert torch.equal(model(ids), want)


# --- scope module


@pytest.mark.parametrize("codec", ["full", "full_abs", "low_rank", "sparse"])
@pytest.mark.parametrize("top", [1, 2, 0])
def test_each_token_chooses_in_each_module(codec: str, top: int) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(D, OUT), torch.randn(B, 5, D)
    model, context, deltas = _by_token(plain, codec, top, D)
    context.begin(B)
    gate = model[0].dyn_gate
    score = torch.stack([(x @ gate[2 * s : 2 * s + 2].T).norm(dim=-1) for s in range(K)], -1)
    c = torch.softmax(score, -1)
    kept = c * (c >= c.topk(top or K, -1).values[..., -1:])
    kept = kept / kept.sum(-1, keepdim=True)
    each = torch.stack([functional_call(plain, _plus(plain, deltas[s]), (x,)) for s in range(K)])
    want = torch.einsum("bts,sbto->bto", kept, each)
    assert torch.allclose(model(x), want, atol=1e-5)
    context.begin(B)
    context.forced = ONE_HOT
    want = each[ONE_HOT.argmax(1), torch.arange(B)]
    assert torch.allclose(model(x), want, atol=1e-5)


def test_tokens_choose_by_the_inputs_of_a_transposed_weight() -> None:
    torch.manual_seed(0)
    plain, x = Conv1D(OUT, D), torch.randn(B, 5, D)
    model, context, deltas = _by_token(plain, "low_rank", 1, D)
    context.begin(B)
    score = [(x @ model[0].dyn_gate[2 * s : 2 * s + 2].T).norm(dim=-1) for s in range(K)]
    chosen = torch.stack(score, -1).argmax(-1)
    each = torch.stack([functional_call(plain, _plus(plain, d), (x,)) for d in deltas], 2)
    want = each.take_along_dim(chosen[..., None, None], 2).squeeze(2)
    assert torch.allclose(model(x), want, atol=1e-5)


def _plus(plain: nn.Module, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + delta[name] for name, value in plain.named_parameters()}


def _by_token(
    plain: nn.Module, codec: str, top: int, width: int
) -> tuple[nn.Sequential, Context, list[dict[str, Tensor]]]:
    """`installed`, with gates of rank 2 that score tokens."""
    held, codes, deltas = {}, [], [{} for _ in range(K)]
    for name, value in plain.named_parameters():
        code, parts, delta = coded(f"0.{name}", value.detach(), codec, "g")
        if name == "weight":
            code = Code(**{**code.__dict__, "gate_rank": 2, "gate_width": width})
            parts["gate"] = torch.randn(code.parts["gate"].shape)
        codes.append(code)
        held |= {part_in_memory(code.name, part): v for part, v in parts.items()}
        for s in range(K):
            deltas[s][name] = delta[s]
    routers = {"r": Router("projection", width, K, top_k=top)}
    gates, model = {"g": Gate("module", "r")}, nn.Sequential(deepcopy(plain))
    context = Context(gates, {"g": K}, {n: RouterModule(r).fresh() for n, r in routers.items()})
    manifest = Manifest("test", tuple("abc"), tuple(codes), gates, routers)
    install(model, manifest, context, lambda name: name)
    assert not model.load_state_dict(held, strict=False).unexpected_keys
    return model.requires_grad_(False), context, deltas


# --- what is refused


@pytest.mark.parametrize(
    ("plain", "scope", "says"),
    [
        (nn.GroupNorm(2, D), "task", "no layer could mix a tensor of GroupNorm"),
        (nn.Conv2d(3, 4, 2, padding=1, padding_mode="circular"), "task", "of Conv2d"),
        (nn.LayerNorm(D), "module", "only linear layers choose token by token"),
        (nn.Embedding(4, D), "block", "it has none before it"),
        (Bare(), "block", "it has none before it"),
    ],
)
def test_what_no_layer_mixes_is_refused_by_name(plain: nn.Module, scope: str, says: str) -> None:
    router = None if scope == "task" else Router("linear", D, K)
    with pytest.raises(ValueError, match=rf"'0\.\w+' cannot differ.*{says}"):
        installed(plain, "full", scope, router)


def test_rows_that_do_not_divide_into_samples_are_refused() -> None:
    model, context, _ = installed(nn.Linear(D, OUT), "full")
    context.begin(3)
    context.set("g", SOFT[:3])
    with pytest.raises(ValueError, match="4 rows for 3 samples"):
        model(torch.randn(4, 5, D))


@pytest.mark.parametrize("codec", ["sparse", "row_sparse", "mask", "one_bit", "one_bit0"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "patches", "convolution", "layer norm"])
@pytest.mark.parametrize("rows", [[2], [2, 0]])
def test_only_the_chosen_slots_are_decoded(
    kind: str, codec: str, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once for a tensor, and never one that no sample chose."""
    torch.manual_seed(0)
    made, shape = MODULES[kind]
    model, context, _ = installed(made(), codec)
    decoded: list[tuple[str, int]] = []
    slot = codecs.slot

    def counted(code: Code, parts: Any, s: int, anchor: Tensor) -> Tensor:
        decoded.append((code.name, code.slots))
        return slot(code, parts, s, anchor)

    monkeypatch.setattr(codecs, "slot", counted)
    context.begin(B)
    context.set("g", torch.eye(K)[rows * (B // len(rows))])
    model(torch.randn(shape))
    tensors = {name for name, _ in decoded}
    packed = {"0.weight"} if codec == "row_sparse" else {"0.weight", "0.bias"}  # a vector is whole
    held = {name for name, _ in model.named_parameters()} & packed
    assert tensors == (held if "norm" not in kind or codec != "row_sparse" else set())
    assert len(decoded) == len(rows) * len(tensors)


# --- memory


@pytest.mark.parametrize("codec", ["full", "full_abs", "mask", "one_bit", "sparse", "low_rank"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "patches"])
def test_backward_keeps_no_mixed_weights(kind: str, codec: str) -> None:
    """What is saved for backward is activations: less than one sample's weight of 256 x 256."""
    torch.manual_seed(0)
    made = {"linear": nn.Linear(256, 256), "conv1d": Conv1D(256, 256),
            "patches": nn.Conv2d(4, 256, 8, 8)}  # fmt: skip
    plain = made[kind]
    x = torch.randn(8, 4, 32, 8) if kind == "patches" else torch.randn(8, 4, 256)
    model, context, _ = installed(plain, codec)
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        where = value.untyped_storage()
        if where.data_ptr() not in held:
            saved[where.data_ptr()] = where.nbytes()
        return value

    context.begin(8)
    context.set("g", torch.randn(8, K, requires_grad=True))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        y = model(x.requires_grad_())
    assert sum(saved.values()) < 256 * 256 * 4
    y.sum().backward()
    kept = sum(t.nbytes for t in context._scratch.values())
    assert kept <= linear.BUDGET


@pytest.mark.parametrize("codec", ["full", "full_abs", "low_rank", "mask"])
@pytest.mark.parametrize("learning", [False, True])
def test_autocast_multiplies_in_half_precision(codec: str, learning: bool) -> None:
    torch.manual_seed(0)
    model, context, _ = installed(nn.Linear(D, OUT), codec)
    x, c = torch.randn(B, 5, D), SOFT.clone().requires_grad_(learning)

    def run() -> Tensor:
        context.begin(B)
        context.set("g", c)
        y: Tensor = model(x)
        return y

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), want, atol=0.05)
    if learning:
        half, full = torch.autograd.grad(found.float().sum(), c), torch.autograd.grad(want.sum(), c)
        assert torch.allclose(half[0], full[0], atol=0.3)
