"""Adapters applied on read, against peft's own merge_and_unload on tiny models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import adapt, merged, quiet, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo import Zoo, rewrite

from mowmerge import api
from mowmerge.checkpoint import adapter as reading
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.errors import MowmergeError
from mowmerge.planner import Options

transformers = pytest.importorskip("transformers")


def ours(
    zoo: Zoo, base: Path, adapter: Any, out: str = "ours", **options: Any
) -> dict[str, Tensor]:
    """The same model as the only one of a merge."""
    recipe = {"models": {"m": {"source": str(base), "adapter": adapter}}, "method": "passthrough"}
    return zoo.merge(recipe, out, **options)[0]


def step(value: Tensor) -> Tensor:
    """The distance between bf16 numbers of this size."""
    return torch.exp2(value.double().abs().clamp_min(2.0**-100).log2().floor() - 7)


def assert_equal(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    before: Mapping[str, Tensor] | None = None,
) -> None:
    """To 1e-6 in fp32, to one step in bf16: at the result, or with `before` at what is added."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        if value.dtype == torch.bfloat16:
            size = torch.maximum(value.abs(), got[name].abs())
            if before is not None and name in before:
                size = torch.maximum(size, (value.double() - before[name].double()).abs())
                size = torch.maximum(size, before[name].abs())
            far = (got[name].double() - value.double()).abs() > step(size)
            assert not far.any(), (name, int(far.sum()))
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=name)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "every linear layer": ("llama", {"target_modules": "all-linear"}),
    "patterns": ("llama", {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 5, "k_proj": 2},
        "alpha_pattern": {"down_proj": 9, "layers.0.self_attn.q_proj": 1},
    }),
    "rslora": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 5}}),
    "dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "modules to save": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "layers": ("llama", {"layers_to_transform": [1], "exclude_modules": ["k_proj"],
                         "target_modules": ["q_proj", "k_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d, dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "conv1d, tied": ("gpt2", {"target_modules": ["c_proj", "wte"]}),
    "conv1d beside linear": ("gpt2", {"target_modules": ["c_proj", "lm_head"]}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "own biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "names in memory": ("vit", {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}),
    "convolution": ("vit", {"target_modules": ["projection"]}),
    "convolution, dora": ("vit", {"target_modules": ["projection"], "use_dora": True}),
    "experts": ("gpt_oss", {"target_modules": [], "target_parameters": [
        "mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}),
    "experts and a layer": ("gpt_oss", {"target_parameters": ["mlp.experts.gate_up_proj"]}),
}  # fmt: skip


ROUNDED = ("embedding", "conv1d, tied", "experts", "experts and a layer")  # B A itself, to bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_is_what_merge_and_unload_makes(zoo: Zoo, case: str, dtype: torch.dtype) -> None:
    kind, settings = CASES[case]
    base = save(zoo.folder / "base", kind, dtype)
    adapter = adapt(base, zoo.folder / "adapter", **settings)
    want = merged(base, [adapter], zoo.folder / "theirs")
    got = ours(zoo, base, str(adapter))
    before = load_file(base / "model.safetensors")
    assert_equal(got, want, before if case in ROUNDED else None)
    changed = {name for name, value in got.items() if not torch.equal(value, before[name])}
    touched = {name for name, value in want.items() if not torch.equal(value, before[name])}
    assert changed == touched
    assert changed


def test_adds_scale_b_a(zoo: Zoo) -> None:
    """By hand: alpha / r = 2, B A = [[3, 4], [6, 8]]."""
    base = zoo.save("base", {"x.q_proj.weight": torch.ones(2, 2), "norm": torch.ones(3)})
    adapter = write(
        zoo.folder / "a",
        {"x.q_proj.lora_A.weight": [[3.0, 4.0]], "x.q_proj.lora_B.weight": [[1.0], [2.0]]},
        r=1, lora_alpha=2,
    )  # fmt: skip
    got = ours(zoo, base, str(adapter))
    assert got["x.q_proj.weight"].tolist() == [[7, 9], [13, 17]]
    assert got["norm"].tolist() == [1, 1, 1]
    half = ours(zoo, base, {"source": str(adapter), "weight": -0.5}, "half")
    assert half["x.q_proj.weight"].tolist() == [[-2, -3], [-5, -7]]


def write(folder: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """An adapter of these tensors, as peft lays it out."""
    folder.mkdir()
    named = {
        f"base_model.model.{name}": torch.as_tensor(value).float()
        for name, value in tensors.items()
    }
    save_file(named, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def low_rank(
    module: str = "x.q_proj", rows: int = 4, columns: int = 4, r: int = 1
) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(3)
    return {
        f"{module}.lora_A.weight": torch.randn(r, columns, generator=draws),
        f"{module}.lora_B.weight": torch.randn(rows, r, generator=draws),
    }


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_several_adapters_are_applied_in_turn(zoo: Zoo, dora: bool) -> None:
    base = save(zoo.folder / "base", "llama")
    adapters = [
        adapt(base, zoo.folder / f"a{i}", seed=i, use_dora=dora, r=2 + i,
              target_modules=["q_proj", "down_proj"][: 2 - i])
        for i in range(2)
    ]  # fmt: skip
    got = ours(zoo, base, [str(a) for a in adapters])
    assert_equal(got, merged(base, adapters, zoo.folder / "theirs"))


def test_weights_are_those_of_what_each_adds(zoo: Zoo) -> None:
    base = save(zoo.folder / "base", "llama")
    before = load_file(base / "model.safetensors")
    adapters = [
        adapt(base, zoo.folder / f"a{i}", seed=i, use_dora=i == 1, modules_to_save=saved)
        for i, saved in enumerate([["norm"], None])
    ]  # fmt: skip
    deltas = []
    for i, adapter in enumerate(adapters):
        alone = ours(zoo, base, str(adapter), f"alone{i}")
        deltas.append({name: value - before[name] for name, value in alone.items()})
    got = ours(zoo, base, [{"source": str(adapters[0]), "weight": 0.25}])
    for name, value in got.items():
        torch.testing.assert_close(value, before[name] + 0.25 * deltas[0][name])
    got = ours(zoo, base, [{"source": str(adapters[1]), "weight": -2}], "second")
    for name, value in got.items():
        torch.testing.assert_close(value, before[name] - 2 * deltas[1][name])


def test_tied_embeddings_stay_tied(zoo: Zoo) -> None:
    """An adapter on the head of a model that ties it changes both, as merge_and_unload does."""
    base = save(zoo.folder / "base", "llama", tie_word_embeddings=True)
    for i, module in enumerate(["embed_tokens", "lm_head"]):
        adapter = adapt(base, zoo.folder / f"a{i}", target_modules=[module, "q_proj"])
        got = ours(zoo, base, str(adapter), f"ours{i}")
        assert "lm_head.weight" not in got
        assert_equal(got, merged(base, [adapter], zoo.folder / f"theirs{i}"))
    told = plan_of(zoo, base, adapter).warnings
    assert "ties to 'model.embed_tokens.weight': both change" in told[0]


def test_a_magnitude_on_both_ends_of_a_tie_is_refused(zoo: Zoo) -> None:
    """peft stretches the one after the other, by norms of what the first has left."""
    base = save(zoo.folder / "base", "llama", tie_word_embeddings=True)
    both = ["embed_tokens", "lm_head"]
    adapter = adapt(base, zoo.folder / "a", target_modules=both, use_dora=True)
    with pytest.raises(MowmergeError, match="use_dora is set for .* and what it is tied to"):
        plan_of(zoo, base, adapter)
    plain = adapt(base, zoo.folder / "b", target_modules=both)
    want = merged(base, [plain], zoo.folder / "theirs")
    assert_equal(ours(zoo, base, str(plain)), want)


@pytest.mark.parametrize("kind", ["bloom", "falcon"])
def test_a_head_that_is_tied_to_embeddings_of_another_name(zoo: Zoo, kind: str) -> None:
    base = save(zoo.folder / "base", kind)
    adapter = adapt(base, zoo.folder / "a", target_modules=["lm_head", "dense"])
    want = merged(base, [adapter], zoo.folder / "theirs")
    assert_equal(ours(zoo, base, str(adapter)), want)


def plan_of(zoo: Zoo, base: Path, adapter: Any, **options: Any) -> Any:
    model = {"source": str(base), "adapter": str(adapter)}
    recipe = zoo.recipe({"models": {"m": model}, "method": "passthrough"})
    return api.plan(recipe, options=Options(**options))


def test_a_saved_half_of_a_tie_is_refused(zoo: Zoo) -> None:
    base = save(zoo.folder / "base", "llama", tie_word_embeddings=True)
    adapter = adapt(base, zoo.folder / "a", modules_to_save=["lm_head"])
    with pytest.raises(
        MowmergeError, match="saves 'lm_head.weight', which the model ties"
    ) as found:
        plan_of(zoo, base, adapter)
    assert "untie" in found.value.problems[0].hint


def test_a_head_that_only_the_adapter_has_is_added(zoo: Zoo) -> None:
    base = zoo.save("base", {"x.q_proj.weight": torch.zeros(4, 4)})
    tensors = {**low_rank(), "score.weight": torch.arange(6.0).view(2, 3)}
    adapter = write(zoo.folder / "a", tensors, modules_to_save=["classifier", "score"])
    got = ours(zoo, base, str(adapter))
    assert got["score.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert "'score.weight' is only in the adapter" in plan_of(zoo, base, adapter).warnings[0]


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({}, {"peft_type": "IA3"}, "this is a IA3 adapter, not LoRA"),
        ({}, {"peft_type": "LOHA"}, "this is a LOHA adapter"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changes the base"),
        ({}, {"lora_bias": True}, "lora_bias: true is not understood"),
        ({}, {"layer_replication": [[0, 2]]}, "layer_replication"),
        ({}, {"use_qalora": True}, "use_qalora"),
        ({}, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({}, {"trainable_token_indices": [1]}, "names rows of the embedding, and the file has"),
        ({}, {"trainable_token_indices": {"x": [1]}}, "names rows of x, and the file has none"),
        ({}, {"lora_alpha": None}, "lora_alpha: null is nothing that peft writes"),
        ({}, {"lora_alpha": "much"}, 'lora_alpha: "much" is nothing'),
        ({}, {"lora_alpha": float("nan")}, "lora_alpha: NaN is nothing"),
        ({}, {"r": True}, "r: true is nothing"),
        ({}, {"rank_pattern": ["q_proj"]}, "rank_pattern: .* is nothing"),
        ({}, {"rank_pattern": {"*q_proj": 3}}, "rank_pattern: .* is nothing"),
        ({}, {"alpha_pattern": {"q_proj": None}}, "alpha_pattern: .* is nothing"),
        ({}, {"modules_to_save": "lm_head"}, "modules_to_save: .* is nothing"),
        ({}, {"target_parameters": 3}, "target_parameters: 3 is nothing"),
        ({}, {"trainable_token_indices": {"x": 3}}, "trainable_token_indices: .* is nothing"),
        ({}, {"a_field_of_next_year": 3}, "a_field_of_next_year: 3 is not understood"),
        ({"x.q_proj.lora_B.bias": torch.ones(4)}, {}, "x.q_proj.lora_B.bias' is not understood"),
        ({"x.hada_w1_a": torch.ones(4)}, {}, "hada_w1_a' is not understood"),
        ({"x.token_adapter.trainable_tokens": torch.ones(4)}, {}, "is not understood"),
        ({"x.token_adapter.trainable_tokens_delta": torch.ones(4)}, {}, "no tensor 'x.weight'"),
        (low_rank("y.k_proj"), {}, "the model has no tensor 'y.k_proj.weight'"),
        (low_rank("x.o_proj", 5, 6), {}, r"'x.o_proj.weight' is \[5, 6\] in the adapter"),
        (low_rank("x.o_proj", r=2), {}, "has the rank 2, and adapter_config.json says 1"),
        (low_rank("x.o_proj"), {"use_dora": True}, "use_dora is set, and .* no magnitude"),
        ({"x.o_proj.lora_A.weight": torch.ones(1, 4)}, {}, "has only one of lora_A and lora_B"),
        ({"x.other": torch.ones(4)}, {}, "the model has no tensor 'x.other'"),
        ({"norm": torch.ones(5)}, {}, r"'norm' is \[5\] in the adapter, and \[4\] in the model"),
        (
            {**low_rank("x.pair"), **low_rank("x.pair.base_layer")},
            {"target_parameters": ["pair.left", "pair.right"]},
            "which belongs to which of x.pair.left, x.pair.right cannot be told",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    zoo: Zoo, tensors: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    names = ("x.q_proj.weight", "x.o_proj.weight", "x.pair.left", "x.pair.right")
    square = {name: torch.zeros(4, 4) for name in names}
    base = zoo.save("base", {**square, "norm": torch.zeros(4)})
    held = tensors if "use_dora" in config else {**low_rank(), **tensors}
    adapter = write(zoo.folder / "a", held, **config)
    with pytest.raises(MowmergeError, match=words) as found:
        plan_of(zoo, base, adapter)
    assert found.value.problems[0].hint
    assert "recipe.yaml" in found.value.problems[0].where


def test_two_adapters_cannot_replace_one_tensor(zoo: Zoo) -> None:
    base = zoo.save("base", {"x.q_proj.weight": torch.zeros(4, 4), "norm": torch.zeros(4)})
    paths = [
        str(write(zoo.folder / f"a{i}", {**low_rank(), "norm": torch.full((4,), float(i))}))
        for i in range(2)
    ]
    with pytest.raises(MowmergeError, match="'norm' is replaced by this adapter and by"):
        ours(zoo, base, paths)


@pytest.mark.parametrize("saved_first", [False, True])
def test_a_saved_embedding_and_an_update_on_its_tied_head_are_refused(
    zoo: Zoo, saved_first: bool
) -> None:
    """peft trains them apart; untied, they are read as it merges them."""
    base = save(zoo.folder / "base", "llama", tie_word_embeddings=True)
    adapter = adapt(
        base, zoo.folder / "a", target_modules=["lm_head"], modules_to_save=["embed_tokens"]
    )
    at = "base_model.model."
    keys = f"{at}lm_head.base_layer.weight", f"{at}model.embed_tokens.weight"

    def swap(header: dict[str, Any]) -> None:
        header[keys[0]], header[keys[1]] = header[keys[1]], header[keys[0]]

    if saved_first:  # as they lie where the embedding's name comes first
        rewrite(adapter / "adapter_model.safetensors", swap)
    words = (
        "it has 'model.embed_tokens.weight' and 'lm_head.weight' of its own, which the model ties"
    )
    with pytest.raises(MowmergeError, match=words) as found:
        plan_of(zoo, base, adapter)
    assert "'model.embed_tokens.weight' and 'lm_head.weight' of its own" in str(found.value)
    assert "untie them in the base" in found.value.problems[0].hint
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    config = json.loads((base / "config.json").read_text())
    untied = zoo.save("untied", held, config={**config, "tie_word_embeddings": False})
    want = merged(untied, [adapter], zoo.folder / "theirs")
    assert_equal(ours(zoo, untied, str(adapter)), want)


def test_updates_on_fused_experts_of_a_model_that_stores_them_apart(zoo: Zoo) -> None:
    """As peft 0.21 makes all-linear of Mixtral."""
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight" for i in range(2)]
    base = zoo.save("base", {"x.q_proj.weight": torch.zeros(4, 4), names[0]: torch.zeros(4, 4),
                             names[1]: torch.zeros(4, 4)})  # fmt: skip
    module = "model.layers.0.mlp.experts"
    tensors = {**low_rank(module), **low_rank(f"{module}.base_layer")}
    targets = ["gate.weight", "gate_up_proj", "down_proj"]
    adapter = write(zoo.folder / "a", tensors, target_parameters=targets)
    with pytest.raises(MowmergeError, match="which the model does not store") as found:
        plan_of(zoo, base, adapter)
    told = found.value.problems[0]
    assert told.message == (
        f"its updates are on '{module}.gate_up_proj' and '{module}.down_proj', which the model does"
        f" not store: there each expert has its own, such as '{names[0]}'"
    )
    assert "merge_and_unload" in told.hint


def test_what_is_no_adapter_is_said(zoo: Zoo) -> None:
    base = zoo.save("base", {"x.q_proj.weight": torch.zeros(4, 4)})
    with pytest.raises(MowmergeError, match="adapter_config.json is not there"):
        ours(zoo, base, str(base))
    with pytest.raises(MowmergeError, match="there is no folder"):
        ours(zoo, base, str(zoo.folder / "nothing"))
    adapter = write(zoo.folder / "a", low_rank())
    with pytest.raises(MowmergeError, match="this is an adapter") as found:
        zoo.merge({"models": {"m": str(adapter)}, "method": "passthrough"})
    assert "adapter: THIS" in found.value.problems[0].hint


def test_a_pickled_adapter_needs_permission(zoo: Zoo) -> None:
    base = zoo.save("base", {"x.q_proj.weight": torch.zeros(4, 4)})
    adapter = write(zoo.folder / "a", low_rank())
    want = ours(zoo, base, str(adapter))
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    with pytest.raises(MowmergeError) as found:
        ours(zoo, base, str(adapter), "other")
    assert "--allow-pickle" in found.value.problems[0].hint
    got = ours(zoo, base, str(adapter), "other", allow_pickle=True)
    assert torch.equal(got["x.q_proj.weight"], want["x.q_proj.weight"])


@pytest.mark.parametrize("kind", ["plain", "dora", "across"])
def test_bytes_do_not_depend_on_blocks_and_workers(
    zoo: Zoo, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of odd lengths, over several runs and blocks that cut through them."""
    from mowmerge import planner

    rows, columns, r = 1531, 517, 5
    draws = torch.Generator().manual_seed(0)
    shape = (columns, rows) if kind == "across" else (rows, columns)
    config: dict[str, Any] = {"r": r, "use_dora": kind != "plain"}
    tensors = low_rank("h.c_attn", rows, columns, r)
    if config["use_dora"]:
        tensors["h.c_attn.lora_magnitude_vector"] = torch.rand(rows, generator=draws)
    base = zoo.save("base", {"h.c_attn.weight": torch.randn(shape, generator=draws).bfloat16()})
    adapter = str(write(zoo.folder / "a", tensors, **config))
    found = []
    for i, block in enumerate([65_536, 4 * 65_536, 16 * 65_536]):
        monkeypatch.setattr(planner, "BLOCK", block)
        recipe = {
            "base": str(base), "method": "task_arithmetic", "parameters": {"scale": 1.7},
            "models": {"m": {"source": "base", "adapter": adapter}}, "output": {"dtype": "float32"},
        }  # fmt: skip
        found.append(zoo.merge(recipe, f"out{i}", workers=1 + i % 2)[0]["h.c_attn.weight"])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], load_file(base / "model.safetensors")["h.c_attn.weight"])


def test_runs_of_rows_are_the_same_wherever_reading_starts(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product's rounding may depend on its shape, so that shape must not depend on the reader."""
    rows, columns = 1531, 517
    base = zoo.save("base", {"x.q_proj.weight": torch.randn(rows, columns)})
    adapter = write(zoo.folder / "a", low_rank(rows=rows, columns=columns))
    (source,) = plan_of(zoo, base, adapter).sources.values()
    seen: set[tuple[int, int]] = set()
    real = reading._AdaptedHandle._original

    def spied(self: Any, matrix: int, first: int, last: int) -> Tensor:
        seen.add((first, last))
        return real(self, matrix, first, last)

    monkeypatch.setattr(reading._AdaptedHandle, "_original", spied)
    reader = reading.AdaptedReader(StoredReader(source.model), source)
    whole = torch.empty(rows * columns)
    total = rows * columns
    with closing(reader.open("x.q_proj.weight")) as handle:
        handle.read(0, total, whole.view(torch.uint8).numpy().data)
    runs = set(seen)
    assert len(runs) > 3
    for start, stop in ((1, 2), (200_001, 500_000), (total - 1, total), (131_000, 133_000)):
        part = torch.empty(stop - start)
        with closing(reader.open("x.q_proj.weight")) as handle:
            handle.read(start, stop, part.view(torch.uint8).numpy().data)
        assert torch.equal(part, whole[start:stop])
    assert seen == runs


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    ("case", "recipe"),
    [
        ("mergekit_lora_linear", {"method": "linear", "models": {
            "lora": {"source": "models/base", "adapter": "models/lora_a", "weight": 0.6},
            "other": {"source": "models/e2", "weight": 0.4}}}),
        ("mergekit_lora_ta", {"method": "task_arithmetic", "base": "models/base", "models": {
            "lora": {"source": "base", "adapter": "models/lora_a", "weight": 0.8},
            "other": {"source": "models/e1", "weight": 0.3}}}),
    ],
)  # fmt: skip
def test_golden(zoo: Zoo, case: str, recipe: dict[str, Any]) -> None:
    (zoo.folder / "models").symlink_to(GOLDEN / "models")
    got, _ = zoo.merge(recipe)
    want = load_file(GOLDEN / "cases" / case / "expected.safetensors")
    assert want.keys() <= got.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)


@pytest.fixture
def family(zoo: Zoo) -> Zoo:
    """base; adapters a, b, c on it, and as full-a, full-b, full-c what each makes of it."""
    base = save(zoo.folder / "base", "llama")
    for i, name in enumerate("abc"):
        adapter = adapt(base, zoo.folder / name, seed=i, target_modules=["q_proj", "down_proj"])
        recipe = {"models": {"m": {"source": str(base), "adapter": str(adapter)}},
                  "method": "passthrough"}  # fmt: skip
        zoo.merge(recipe, f"full-{name}")
    return zoo


def both(zoo: Zoo, recipe: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The merge of the adapters, and of the full checkpoints."""
    adapters = {n: {"source": "base", "adapter": f"./{n}"} for n in "abc"}
    full = {n: f"./full-{n}" for n in "abc"}
    one = zoo.merge({"base": "./base", **recipe, "models": adapters}, "one")[0]
    two = zoo.merge({"base": "./base", **recipe, "models": full}, "two")[0]
    return one, two


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "linear"},
        {"method": "ties", "parameters": {"density": 0.3, "trim": "global"}},
        {"method": "dare", "parameters": {"density": 0.5}, "output": {"dtype": "bfloat16"}},
        {"method": "model_stock"},
        {"method": "linear", "rules": [{"match": {"role": "mlp"}, "method": "task_arithmetic"}]},
        {"method": "twin_merging"},
        {"method": "mow", "parameters": {"blocks": 1}},
        {"method": "emr"},
    ],
    ids=lambda recipe: recipe["method"],
)
def test_every_merge_is_that_of_the_full_checkpoints(family: Zoo, recipe: dict[str, Any]) -> None:
    one, two = both(family, recipe)
    assert one.keys() == two.keys()
    for name, value in two.items():
        assert torch.equal(one[name], value), name


def test_a_nested_recipe_carries_adapters_and_takes_them(family: Zoo) -> None:
    inner = {"base": "./base", "method": "task_arithmetic",
             "models": {"a": {"source": "base", "adapter": "./a"}}}  # fmt: skip
    one, _ = family.merge(
        {"models": {"x": {"source": inner}, "y": "./full-b"}, "method": "linear"}, "one"
    )
    two, _ = family.merge({"models": {"x": "./full-a", "y": "./full-b"}, "method": "linear"}, "two")
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-7)
    on_top = {"models": {"x": {"source": inner, "adapter": "./b"}}, "method": "passthrough"}
    got, _ = family.merge(on_top, "three")
    direct = {"models": {"x": {"source": "./base", "adapter": ["./a", "./b"]}},
              "method": "passthrough"}  # fmt: skip
    want, _ = family.merge(direct, "four")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)


def test_the_output_is_whole(family: Zoo) -> None:
    recipe = {"models": {"m": {"source": "./base", "adapter": "./a"}}, "method": "passthrough"}
    planned = plan_of(family, family.folder / "base", family.folder / "a")
    _, report = family.merge(recipe, "out", hashes=True)
    out = family.folder / "out"
    listed = (out / "SHA256SUMS").read_text()
    assert "model.safetensors" in listed
    assert "adapter_config.json" not in {p.name for p in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "m+: not stated" in card
    held = max(given.held for job in planned.jobs for given in job.inputs)
    assert held > 4 * 3 * (16 + 24)
    assert report["planned_peak_bytes"] == planned.peak_bytes
    with quiet():
        transformers.LlamaForCausalLM.from_pretrained(out)


def test_a_plan_loads_no_torch(family: Zoo) -> None:
    recipe = family.recipe(
        {"models": {"m": {"source": "./base", "adapter": "./a"}}, "method": "passthrough"}
    )
    ran = family.python(
        "import sys; from mowmerge import api; api.plan(sys.argv[1]);"
        " print('torch' in sys.modules)",
        recipe,
    )
    assert (ran.rc, ran.out) == (0, "False\n"), ran.err
