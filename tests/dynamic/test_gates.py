"""Where coefficients come from: prefix or last states, thresholds, tasks, tokens."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from making import TEXT, K, Made, apart, first, inputs, model, one, seeded, write

from mowmerge.dynamic.format import Gate, Router
from mowmerge.dynamic.linear import MixedLinear

torch.set_num_threads(1)


def _made(folder: Path, name: str = "llama", **router: Any) -> Made:
    kind = {"kind": "linear", "layer": 1} | router
    return write(folder, model(name), routers={"0": Router(width=32, outputs=K, **kind)})


def _wild(made: Made) -> Any:
    """The model, with a router that tells its inputs apart."""
    dynamic, draw = made.load(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in dynamic.mow_router["0"].parameters():
            if value.dim() > 1:
                value.normal_(generator=draw)
    return dynamic


@pytest.mark.parametrize(("name", "path"), [("llama", "model"), ("bert", ""), ("t5", "encoder")])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_features_are_the_anchors_hidden_states(
    name: str, path: str, layer: int, tmp_path: Path
) -> None:
    made, batch = _made(tmp_path, name, layer=layer), inputs(name)
    dynamic = _wild(made)
    with torch.no_grad():
        backbone = made.plain.get_submodule(path)
        alone = {k: v for k, v in batch.items() if "decoder" not in k}
        states = backbone(**alone, output_hidden_states=True)
        layers = backbone.layers if name == "llama" else (
            backbone.encoder.layer if name == "bert" else backbone.block)  # fmt: skip
        want = (
            states.last_hidden_state if not layer else _after(made.plain, layers[layer - 1], batch)
        )
        found = dynamic.features(layer, **batch)
        assert torch.allclose(found, want, atol=1e-6)
        mask = batch["attention_mask"].float()[..., None]
        raw = dynamic.mow_router["0"].last((want * mask).sum(1) / mask.sum(1))
        assert torch.allclose(dynamic(**batch).gates, raw.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "twin"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_statistics_of_a_padded_batch_are_those_of_singles(
    name: str, kind: str, tmp_path: Path
) -> None:
    made, batch = _made(tmp_path, name, kind=kind, pool="statistics"), inputs(name)
    dynamic = _wild(made)
    with torch.no_grad():
        tokens, mask = dynamic.features(1, **batch), batch.get("attention_mask")
        features = []
        for b in range(4):
            kept = tokens[b] if mask is None else tokens[b, mask[b].bool()]
            features.append(torch.cat([kept.mean(0), kept.std(0, correction=0)]))
        want = dynamic.mow_router["0"](torch.stack(features)).softmax(-1)
        found = dynamic(**batch).gates
        assert torch.allclose(found, want, atol=1e-5)
        singles = []
        for b in range(4):
            sample = one(batch, b)
            if name in ("llama", "t5"):  # whose positions are relative: without its padding
                kept = mask[b].bool()
                sample |= {k: sample[k][:, kept] for k in ("input_ids", "attention_mask")}
            singles.append(dynamic(**sample).gates)
        assert torch.allclose(found, torch.cat(singles), atol=1e-4)


def _after(plain: Any, layer: Any, batch: Any) -> torch.Tensor:
    found = []
    hook = layer.register_forward_hook(lambda m, i, o: found.append(o))
    plain(**batch)
    hook.remove()
    return found[0] if isinstance(found[0], torch.Tensor) else found[0][0]


def test_only_the_first_layers_run_for_a_prefix(tmp_path: Path) -> None:
    dynamic, ran = _wild(_made(tmp_path)), []
    for i, layer in enumerate(dynamic.model.layers):
        layer.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
    dynamic.features(1, **inputs("llama"))
    assert ran == [0]
    dynamic.route(**inputs("llama"))
    assert ran == [0, 0]


def test_features_come_from_the_anchor_whatever_ran_before(tmp_path: Path) -> None:
    dynamic, batch = _wild(_made(tmp_path)), inputs("llama")
    before = dynamic.features(0, **batch)
    with torch.no_grad():
        dynamic(**batch, task_ids=torch.tensor([0, 1, 2, 0]))
    assert torch.equal(dynamic.features(0, **batch), before)


def test_sure_gates_are_one_hot(tmp_path: Path) -> None:
    made, batch = _made(tmp_path, hard=0.34), inputs("llama")
    dynamic = _wild(made)
    with torch.no_grad():
        out = dynamic(**batch)
        chosen = out.gates.argmax(1)
        assert torch.equal(out.gates, torch.nn.functional.one_hot(chosen, K).float())
        want = torch.stack([made.expert(int(k), batch)[b] for b, k in enumerate(chosen)])
        assert apart(first(out), want, batch) < 2e-5


def test_a_task_is_what_a_router_gives_that_chose_it(tmp_path: Path) -> None:
    """1bit-Merging adds a share of the experts that were not chosen, also where one is told."""
    dynamic, batch = _wild(_made(tmp_path, top_k=1, rest=0.3)), inputs("llama")
    with torch.no_grad():
        out = dynamic(**batch)
        told = dynamic(**batch, task_ids=out.gates.argmax(1))
    assert sorted(out.gates[0].tolist()) == pytest.approx([0.3, 0.3, 1.0])
    assert torch.allclose(told.gates, out.gates)
    assert apart(first(told), first(out), batch) < 1e-6


def test_routers_see_what_routing_mask_shows(tmp_path: Path) -> None:
    dynamic, batch = _wild(_made(tmp_path)), inputs("llama")
    prompt = batch["attention_mask"].clone()
    prompt[:, 5:] = 0
    with torch.no_grad():
        short = {key: value[:, :5] for key, value in batch.items()}
        found = dynamic(**batch, routing_mask=prompt).gates
        assert torch.allclose(found, dynamic(**short).gates, atol=1e-5)
        assert not torch.allclose(found, dynamic(**batch).gates, atol=1e-3)
        assert torch.allclose(found, dynamic.route(**batch, routing_mask=prompt))


def test_twin_router_is_in_eval_mode_and_fp32(tmp_path: Path) -> None:
    made, batch = _made(tmp_path, kind="twin", hidden=64, layer=0), inputs("llama")
    dynamic = made.load(dtype=torch.bfloat16)
    router = dynamic.mow_router["0"]
    assert router.norm1.running_var.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(dynamic(**batch).gates, dynamic(**batch).gates)
        singles = [dynamic(**one(batch, b)).gates for b in range(4)]
    assert torch.allclose(dynamic.route(**batch), torch.cat(singles), atol=1e-2)


def test_without_a_router_the_caller_says_which(tmp_path: Path) -> None:
    made = write(tmp_path, model("llama"), gates={"0": Gate("task")}, routers={})
    dynamic, batch = made.load(), inputs("llama")
    with pytest.raises(ValueError, match="pass task_ids .*: a, b, c"):
        dynamic(**batch)
    with pytest.raises(ValueError, match=r"gates must be \[4, 3\], not \[4, 2\]"):
        dynamic(**batch, gates=torch.zeros(4, 2))
    with torch.no_grad():
        found = first(dynamic(**batch, task_ids=torch.tensor([1, 1, 1, 1])))
    assert apart(found, made.expert(1, batch), batch) < 2e-5


def test_a_cached_prompt_has_its_gates_already(tmp_path: Path) -> None:
    dynamic, batch = _wild(_made(tmp_path)), inputs("llama")
    with torch.no_grad():
        out = dynamic(**batch)
        key = "cache" if "cache" in out else "past_key_values"
        word = {"input_ids": batch["input_ids"][:, :1], key: out[key]}
        with pytest.raises(ValueError, match="pass them as gates"):
            dynamic(**word)
        dynamic(**word, gates=out.gates)


def test_smile_routes_by_token_and_obeys_task_ids(tmp_path: Path) -> None:
    def gated(code: Any, parts: Any) -> Any:
        if len(code.shape) < 2:
            return code, parts
        from dataclasses import replace

        code = replace(code, gate_rank=2)
        return code, {**parts, "gate": torch.randn(code.parts["gate"].shape)}

    def linear(name: str) -> bool:
        return "layer." in name and "LayerNorm" not in name

    made = write(
        tmp_path, model("bert"), codec=("low_rank", "full"), gates={"0": Gate("module", "0")},
        routers={"0": Router("projection", 32, K, top_k=1)}, pick=linear, more=gated,
    )  # fmt: skip
    dynamic, batch = made.load(), inputs("bert")
    with torch.no_grad():
        whole = first(dynamic(**batch))
        singles = torch.cat([first(dynamic(**one(batch, b))) for b in range(4)])
        assert apart(whole, singles, batch) < 1e-5
        forced = dynamic(**batch, task_ids=torch.tensor([2, 2, 2, 2]))
        assert apart(first(forced), made.expert(2, batch), batch) < 2e-5
        assert apart(first(forced), whole, batch) > 1e-3


def test_routers_alone_learn(tmp_path: Path) -> None:
    dynamic, batch = _wild(_made(tmp_path)), inputs("llama")
    out = dynamic(**batch, labels=batch["input_ids"])
    out.loss.backward()
    learned = {n for n, p in dynamic.named_parameters() if p.grad is not None}
    assert learned == {"mow_router.0.last.weight", "mow_router.0.last.bias"}
    assert dynamic.mow_router["0"].last.weight.grad.abs().sum() > 0


def _checkpointed(dynamic: Any) -> Any:
    """How a model's checkpoints are asked for, whatever the release calls it."""
    name = "activation_checkpointing_enable"
    return getattr(dynamic, name, None) or dynamic.gradient_checkpointing_enable


@pytest.mark.parametrize("scope", ["sample", "block"])
@pytest.mark.parametrize("name", ["llama", "vit", "bert", "t5", "gpt2"])
def test_gradients_are_the_same_with_layers_run_again(
    name: str, scope: str, tmp_path: Path
) -> None:
    """Two passes before their backwards, with other inputs: each layer finds its own pass."""
    layer = re.compile(r"(decoder)?\.?(?:layers?|block|h)\.(\d)\.")

    def gate_of(tensor: str) -> str:
        found = layer.search(tensor)
        return "".join(filter(None, found.groups())) if found and scope == "block" else "0"

    inside = {gate_of(n) for n in model(name).state_dict() if layer.search(n)}
    gates = {g: Gate(scope, "0", index=i) for i, g in enumerate(sorted(inside))}
    activation = "softmax" if scope == "sample" else "none"
    made = write(
        tmp_path, model(name), gates=gates, gate_of=gate_of,
        routers={"0": Router("linear", 32, K, layer=scope == "sample", activation=activation)},
        pick=lambda tensor: bool(layer.search(tensor)),
    )  # fmt: skip
    dynamic, whole = _wild(made).train().double(), inputs(name)
    whole = {k: v.double() if v.is_floating_point() else v for k, v in whole.items()}
    for module in dynamic.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    grads = []
    for again in (False, True):
        if again:
            _checkpointed(dynamic)()
            assert any(getattr(m, "gradient_checkpointing", False) for m in dynamic.modules())
        halves = [{k: v[some] for k, v in whole.items()} for some in (slice(2), slice(2, 4))]
        outs = [dynamic(**half) for half in halves]
        runs = count_layers(dynamic) if again else []
        told = [first_of(out).square().mean() for out in outs]
        grads.append(torch.autograd.grad(sum(told), [*dynamic.mow_router["0"].last.parameters()]))
        assert bool(runs) == again
    assert all(g.abs().max() > 1e-4 for g in grads[0])
    for one_, two in zip(*grads, strict=True):
        torch.testing.assert_close(one_, two, rtol=1e-5, atol=1e-7)


def count_layers(dynamic: Any) -> list[int]:
    """A list that grows with every run of a mixing layer from now on."""
    runs: list[int] = []
    for module in dynamic.modules():
        if isinstance(module, MixedLinear):
            module.register_forward_hook(lambda *a: runs.append(1))
    return runs


def first_of(out: Any) -> Any:
    return next(out[k] for k in ("logits", "last_hidden_state") if k in out)


def test_reentrant_checkpoints_are_refused(tmp_path: Path) -> None:
    dynamic = _made(tmp_path).load()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        _checkpointed(dynamic)({"use_reentrant": True})


STEP = """if True:
    import sys, torch
    sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests", sys.argv[1] + "/tests/dynamic"]
    import transformers
    from mowmerge.dynamic import modeling
    torch.set_num_threads(1)
    config = modeling.MowmergeConfig.from_pretrained(sys.argv[2])
    model = modeling.load(modeling.dynamic_class(transformers.BertModel), sys.argv[2], config)[0]
    model.train()
    if sys.argv[3] == "again":
        name = "activation_checkpointing_enable"
        (getattr(model, name, None) or model.gradient_checkpointing_enable)()
    ids = torch.randint(3, 50, (192, 64))
    model(input_ids=ids[:1]).last_hidden_state.mean().backward()
    held = lambda: dict(l.split(":") for l in open("/proc/self/status"))
    open("/proc/self/clear_refs", "w").write("5")  # the peak is from now on
    before = int(held()["VmRSS"].split()[0])
    model(input_ids=ids).last_hidden_state.mean().backward()
    assert model.mow_router["0"].last.weight.grad.abs().sum() > 0
    print(int(held()["VmHWM"].split()[0]) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_peak_of_a_step_shrinks_with_layers_run_again(tmp_path: Path) -> None:
    """Eight layers: their activations are never all there."""
    plain = seeded(hf.BertModel, hf.BertConfig(**{**TEXT, "num_hidden_layers": 8}))
    made = write(tmp_path, plain, codec="full", pick=lambda name: "layer." in name)
    root = Path(__file__).parents[2]
    peaks = []
    for how in ("once", "again"):
        argv = [sys.executable, "-c", STEP, str(root), str(made.folder), how]
        ran = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        peaks.append(int(ran.stdout))
    print(peaks)
    assert peaks[1] < 0.6 * peaks[0], peaks


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_a_choice_by_token_needs_the_gate_of_the_matrix(tmp_path: Path, leaf: str) -> None:
    """Without it nothing says, at the first forward, which expert a token is for."""
    made = write(
        tmp_path, model("bert"), codec=("full", "full"), gates={"0": Gate("module", "0")},
        routers={"0": Router("projection", 32, K, top_k=1)},
        pick=lambda name: name == f"encoder.layer.0.output.dense.{leaf}",
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"dense.{leaf}' has no gate of its matrix"):
        made.load()


def test_a_part_called_by_itself_is_refused(tmp_path: Path) -> None:
    made, batch = write(tmp_path, model("llama")), inputs("llama")
    loaded = made.load()
    with torch.no_grad():
        for part in (loaded.model, loaded.model.layers[0].mlp.up_proj, loaded.lm_head):
            given = batch if part is loaded.model else {}
            args = () if given else (torch.randn(2, 3, 32),)
            with pytest.raises(ValueError, match="called by itself"):
                part(*args, **given)
        with pytest.raises(ValueError, match="called by itself"):
            copy.deepcopy(loaded).model(**batch)
        states = loaded(**batch, output_hidden_states=True).hidden_states
        assert len(states) == 1 + len(loaded.model.layers)
