"""What holds of every architecture, every tensor dynamic and the codecs taking turns."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from making import CONFIGS, K, Made, alike, apart, first, inputs, model, one, write
from torch import Tensor

from mowmerge.dynamic import modeling
from mowmerge.dynamic.format import Gate, Router

torch.set_num_threads(1)
IDS = torch.tensor([0, 2, 1, 2])
GATES = torch.softmax(torch.randn(4, K, generator=torch.Generator().manual_seed(4)), -1)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[tuple[Made, Any, Any]]:
    """A checkpoint, loaded, and inputs."""
    name = request.param
    made = write(tmp_path_factory.mktemp(name), model(name))
    with torch.no_grad():
        yield made, made.load(), inputs(name)


def test_gates_at_the_offsets_are_the_anchor_bit_for_bit(case: Any) -> None:
    made, dynamic, batch = case
    with torch.no_grad():
        assert torch.equal(
            first(dynamic(**batch, gates=torch.zeros(4, K))), first(made.plain(**batch))
        )


def test_one_hot_gate_is_the_expert(case: Any) -> None:
    made, dynamic, batch = case
    want = torch.stack([made.expert(k, batch)[b] for b, k in enumerate(IDS.tolist())])
    with torch.no_grad():
        assert apart(first(dynamic(**batch, task_ids=IDS)), want, batch) < 2e-5
        hot = torch.nn.functional.one_hot(IDS, K).float()
        assert apart(first(dynamic(**batch, gates=hot)), want, batch) < 2e-5
    assert apart(first(made.plain(**batch)), want, batch) > 1e-2


def test_mixed_batch_equals_singles(case: Any) -> None:
    _, dynamic, batch = case
    with torch.no_grad():
        routed = dynamic(**batch)
        for kwargs, whole in (({"gates": GATES}, dynamic(**batch, gates=GATES)), ({}, routed)):
            singles = [
                first(dynamic(**one(batch, b), **{k: v[b : b + 1] for k, v in kwargs.items()}))
                for b in range(4)
            ]
            assert apart(first(whole), torch.cat(singles), batch) < 1e-5
        assert routed.gates.shape == (4, K)
        assert torch.allclose(dynamic.route(**batch), routed.gates)
        assert torch.equal(first(dynamic(**batch, gates=routed.gates)), first(routed))


def test_saved_and_loaded_gives_the_same(case: Any, tmp_path: Path) -> None:
    _, dynamic, batch = case
    dynamic.save_pretrained(tmp_path / "again")
    config = modeling.MowmergeConfig.from_pretrained(tmp_path / "again")
    assert config.manifest == dynamic.config.manifest
    again, info = modeling.load(type(dynamic), tmp_path / "again", config)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert alike(again, dynamic, batch)


def test_copies_and_pickles_answer_alike(case: Any) -> None:
    _, dynamic, batch = case
    gates = dynamic.route(**batch)
    for copied in (deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):
        assert type(copied) is type(dynamic)
        assert copied._context is not dynamic._context
        assert alike(copied, dynamic, batch | {"gates": gates})
        some = next(m for m in copied.modules() if hasattr(m, "codes"))
        assert some.context is copied._context


# --- all blocks routed by their own tokens


def _block(name: str) -> str:
    """The number of a tensor's layer, with the stack it is in."""
    parts = name.split(".")
    number = next((p for p in parts if p.isdigit()), "")
    return ("d" if "decoder" in parts else "e") + number


def _inside(name: str) -> bool:
    return any(p.isdigit() for p in name.split(".")) and "embed" not in name


def _gates(name: str, **router: Any) -> tuple[dict[str, Gate], dict[str, Router]]:
    stacks = ("e", "d") if name == "t5" else ("e",)
    blocks = [f"{stack}{i}" for stack in stacks for i in range(2)]
    asked = {"kind": "mlp", "hidden": 32, "activation": "none", "init": 0.3, "code": 4, **router}
    gates = {b: Gate("block", "shared", 0.3, index=i) for i, b in enumerate(blocks)}
    return gates, {"shared": Router(width=32, outputs=K, **asked)}


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert", "t5", "vit", "clip"])
def routed(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Made, Any, Any]:
    """A checkpoint whose blocks have a shared router with layer codes."""
    name = request.param
    gates, routers = _gates(name)
    made = write(
        tmp_path_factory.mktemp(name), model(name), gates=gates, routers=routers, pick=_inside,
        gate_of=_block,
    )  # fmt: skip
    return name, made, made.load(), inputs(name)


def test_untrained_w2_of_0_is_the_anchor_whatever_the_input(routed: Any) -> None:
    """b_2 = lambda and an anchor of task arithmetic at lambda: WEMoE is that task arithmetic."""
    _, made, dynamic, batch = routed
    flat = deepcopy(dynamic)
    with torch.no_grad():
        flat.mow_router["shared"].last.weight.zero_()
        assert torch.equal(first(flat(**batch)), first(made.plain(**batch)))
        flat.mow_router["shared"].last.bias.copy_(torch.tensor([0.3, 1.3, 0.3]))
        want = made.expert(1, batch)
        assert apart(first(flat(**batch)), want, batch) < 2e-5


def test_blocks_route_each_sample_alone(routed: Any) -> None:
    name, _, dynamic, batch = routed
    wild = deepcopy(dynamic)
    with torch.no_grad():
        wild.mow_router["shared"].last.weight.normal_()
        whole = wild(**batch)
        singles = [wild(**one(batch, b)) for b in range(4)]
        assert apart(first(whole), torch.cat([first(s) for s in singles]), batch) < 2e-5
        gates = torch.cat([s.gates for s in singles])
        assert whole.gates.shape == (4, K * (4 if name == "t5" else 2))
        assert torch.allclose(whole.gates, gates, atol=1e-5)
        assert whole.gates.std() > 0.01
        again = wild(**batch, gates=whole.gates)
        assert apart(first(again), first(whole), batch) < 1e-6
        if "attention_mask" in batch:  # padding was left out of the mean
            alone = {
                k: v[:, 3:] if k != "decoder_input_ids" else v for k, v in one(batch, 0).items()
            }
            if name in ("llama", "t5"):  # positions are relative there
                assert torch.allclose(wild(**alone).gates, whole.gates[:1], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("scope", ["sample", "block"])
def test_experts_and_gates_permuted_together_change_nothing(
    name: str, scope: str, tmp_path: Path
) -> None:
    gates, routers = _gates(name, code=0) if scope == "block" else (None, None)
    pick = _inside if scope == "block" else lambda name: True
    order, found = [2, 0, 1], []
    for i, order in enumerate(([0, 1, 2], [2, 0, 1])):
        folder = tmp_path / str(i)
        folder.mkdir()
        made = write(
            folder, model(name), codec=("full", "full_abs"), gates=gates, routers=routers,
            order=order, pick=pick, gate_of=_block if scope == "block" else lambda name: "0",
        )  # fmt: skip
        dynamic, torch_rows = made.load(), torch.randn(K, 32, generator=_seeded())
        with torch.no_grad():
            for router in dynamic.mow_router.values():
                router.last.weight.copy_(torch_rows[order])
                router.last.bias.copy_(torch.tensor([0.1, 0.2, 0.3])[order])
            found.append((dynamic(**inputs(name)), order))
    (a, _), (b, order) = found
    assert apart(first(a), first(b), inputs(name)) < 2e-5
    back: Tensor = b.gates.view(4, -1, K)[..., torch.tensor(order).argsort()]
    assert torch.allclose(a.gates, back.flatten(1), atol=1e-5)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(9)
