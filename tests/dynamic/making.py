"""Dynamic checkpoints made by hand over tiny models of many architectures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from mowmerge.dynamic import codecs, modeling, names
from mowmerge.dynamic.format import Code, Gate, Head, Manifest, Router
from mowmerge.dynamic.loading import locator
from mowmerge.dynamic.routers import RouterModule
from mowmerge.methods.ops.spectral import truncated

K = 3
CODECS = ("full_abs", "full", "low_rank", "sparse", "row_sparse", "mask", "one_bit", "one_bit0",
          "basis")  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 50, "pad_token_id": 0}  # fmt: skip
IMAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
CAUSAL = {**TEXT, **ENDS, "num_key_value_heads": 2}
CONFIGS: dict[str, tuple[Any, Any]] = {
    "llama": (
        hf.LlamaForCausalLM,
        lambda: hf.LlamaConfig(**CAUSAL, tie_word_embeddings=True),
    ),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**CAUSAL)),
    "mistral": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**CAUSAL)),
    "gemma": (hf.GemmaForCausalLM, lambda: hf.GemmaConfig(**CAUSAL, head_dim=8)),
    "gpt2": (
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=50, pad_token_id=0, **ENDS
        ),
    ),
    "bert": (hf.BertModel, lambda: hf.BertConfig(**TEXT, max_position_embeddings=64)),
    "t5": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        ),
    ),
    "vit": (hf.ViTModel, lambda: hf.ViTConfig(**IMAGE)),
    "clip": (
        hf.CLIPVisionModelWithProjection,
        lambda: hf.CLIPVisionConfig(**IMAGE, projection_dim=24),
    ),
}  # fmt: skip


def model(name: str) -> Any:
    """A tiny model with random weights, the same at every call."""
    made, config = CONFIGS[name]
    return seeded(made, config())


def seeded(made: Any, config: Any) -> Any:
    """A model of that class and config in eval mode, with every vector away from 0 and 1."""
    torch.manual_seed(0)
    found = made(config).eval()
    with torch.no_grad():
        for value in found.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return found


def inputs(name: str, batch: int = 4) -> dict[str, Tensor]:
    """A batch; the first text is padded on the left."""
    draw = torch.Generator().manual_seed(1)
    if name in ("vit", "clip"):
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=draw)}
    ids = torch.randint(3, 50, (batch, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = {"input_ids": ids * mask, "attention_mask": mask}
    if name == "t5":
        found["decoder_input_ids"] = torch.randint(3, 50, (batch, 4), generator=draw)
    return found


def one(batch: Mapping[str, Tensor], b: int) -> dict[str, Tensor]:
    """A sample alone."""
    return {key: value[b : b + 1] for key, value in batch.items()}


def first(output: Any) -> Tensor:
    """The logits, or what the class has for them."""
    for key in ("logits", "image_embeds", "last_hidden_state"):
        if key in output:
            found: Tensor = output[key].detach()
            return found
    raise AssertionError(output.keys())


def alike(one: Any, two: Any, batch: dict[str, Tensor]) -> bool:
    """Whether two models hold the same bits and answer a batch alike.

    The last bit of a matrix product may follow where in memory its rows lie, so the answers are
    compared within 1e-6.
    """
    held = two.state_dict()
    bits = all(torch.equal(value, held[name]) for name, value in one.state_dict().items())
    with torch.no_grad():
        answers = first(one(**batch)), first(two(**batch))
    return bits and torch.allclose(*answers, atol=1e-6, rtol=1e-6)


def apart(a: Tensor, b: Tensor, batch: Mapping[str, Tensor]) -> float:
    """The largest difference, over the tokens that count."""
    gap = (a - b).abs()
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == gap.shape[:2]:
        gap = gap[mask.bool()]
    return gap.max().item()


def coded(
    name: str, anchor: Tensor, codec: str, gate: str = "0", slots: int = K
) -> tuple[Code, dict[str, Tensor], Tensor]:
    """Random deltas of a kind that the codec holds exactly: code, parts, D [S,*shape]."""
    shape, zeros = tuple(anchor.shape), codec == "one_bit0"
    codec = "one_bit" if zeros else codec
    if len(shape) < 2 and codec in ("low_rank", "row_sparse", "basis"):
        codec = "full"
    delta, scale = 0.05 * torch.randn(slots, *shape), torch.tensor([0.05, 0.02, 0.03])[:slots]
    more: dict[str, Any] = {"zeros": zeros}
    rows, columns = Code(name, shape, "full", slots, gate).matrix
    tall = scale.view(-1, *[1] * len(shape))
    if codec == "low_rank":
        more["rank"] = rank = min(2, rows, columns)
        pair = torch.randn(slots, rows, rank) @ torch.randn(slots, rank, columns)
        delta = 0.03 * pair.view(delta.shape)
        parts = codecs.low_rank(truncated(delta.view(slots, rows, columns), rank)[0])
    elif codec == "basis":
        more["rank"], more["basis"] = rank, size = min(2, rows, columns), slots - 1
        pairs = [(0.2 * torch.randn(rows, rank), 0.2 * torch.randn(rank, columns))
                 for _ in range(slots)]  # fmt: skip
        delta = torch.stack([left @ right for left, right in pairs]).view(delta.shape)
        parts = codecs.basis(pairs, size)
    elif codec == "sparse":
        more["kept"] = kept = max(1, rows * columns // 5)
        order = delta.view(slots, -1).abs().argsort(1)
        delta = delta.view(slots, -1).scatter(1, order[:, : rows * columns - kept], 0)
        delta = delta.view(slots, *shape)
        parts = codecs.sparse(delta, delta != 0)
    elif codec == "row_sparse":
        for s in range(slots):
            delta[s, torch.arange(rows) % 4 != s] = 0
        parts = codecs.row_sparse(delta)
        more["kept"] = len(parts["rowidx"])
    elif codec == "mask":
        masks = torch.rand(slots, *shape) > 0.3
        parts = codecs.mask(delta[0], masks, scale * 20)
        delta = delta[0] * masks * tall * 20
    elif codec == "one_bit":
        sign = torch.randint(-1, 2, delta.shape).float()
        sign = sign if zeros else torch.where(sign == 0, 1.0, sign)
        parts, delta = codecs.one_bit(sign, scale, zeros=zeros), sign * tall
    elif codec == "full_abs":
        parts = {"abs": anchor + delta}
    else:
        parts = {"delta": delta}
    code = Code(name, shape, codec, slots, gate, **more)
    assert {n: tuple(p.shape) for n, p in parts.items()} == {
        n: part.shape for n, part in code.parts.items()
    }
    return code, {n: p.contiguous() for n, p in parts.items()}, delta


@dataclass(frozen=True)
class Made:
    """A dynamic checkpoint, the plain model of its anchor, and its experts' tensors in memory."""

    folder: Path
    plain: Any
    experts: list[dict[str, Tensor]]
    manifest: Manifest

    def load(self, **kwargs: Any) -> Any:
        """The dynamic model."""
        made = modeling.dynamic_class(type(self.plain))
        config = modeling.MowmergeConfig.from_pretrained(self.folder)
        return modeling.load(made, self.folder, config, **kwargs)[0]

    def expert(self, k: int, batch: Mapping[str, Tensor]) -> Tensor:
        """What an expert, as a plain model, answers."""
        with torch.no_grad():
            return first(
                torch.func.functional_call(self.plain, self.experts[k], kwargs=dict(batch))
            )


def movable(name: str, value: Tensor) -> bool:
    """Whether a tensor can differ from sample to sample."""
    return value.is_floating_point() and value.dim() > 0 and "attention_bias" not in name


def write(
    folder: Path, plain: Any, *, codec: str | Sequence[str] = CODECS,
    gate_of: Callable[[str], str] = lambda name: "0",
    pick: Callable[[str], bool] = lambda name: True,
    gates: Mapping[str, Gate] | None = None, routers: Mapping[str, Router] | None = None,
    heads: Sequence[tuple[Head, Mapping[str, Tensor]]] = (), head_class: str = "",
    seed: int = 2, order: Sequence[int] = range(K), drop: str = "", more: Any = None,
) -> Made:  # fmt: skip
    """A dynamic checkpoint over a plain model; codecs take turns over its tensors, experts come in
    `order`."""
    torch.manual_seed(seed)
    plain.save_pretrained(folder / "plain")
    base = load_file(folder / "plain" / "model.safetensors")
    base = {k: v for k, v in base.items() if not drop or drop not in k}
    located, turns = locator(plain), [codec] if isinstance(codec, str) else list(codec)
    codes, dynamic, deltas = [], {}, []
    chosen = [n for n, v in base.items() if movable(n, v) and pick(n)]
    for i, name in enumerate(chosen):
        code, parts, delta = coded(name, base[name], turns[i % len(turns)], gate_of(name))
        code, parts = more(code, parts) if more else (code, parts)
        if list(order) != list(range(K)):
            parts, delta = reordered(code, base[name], delta[list(order)])
        codes.append(code)
        dynamic |= {code.part_name(part): value for part, value in parts.items()}
        deltas.append((located(name), base[name], delta))
    experts = [{n: a + d[k] for n, a, d in deltas} for k in range(K)]
    known = tuple("abc"[k] for k in order)
    manifest = Manifest(
        "test", known, tuple(codes), gates or {"0": Gate("sample", "0")},
        {"0": Router("linear", 32, K, layer=1)} if routers is None else routers,
        tuple(head for head, _ in heads), head_class,
    )  # fmt: skip
    made = {k: RouterModule(r).fresh() for k, r in manifest.routers.items()}
    held = {f"mow_router.{k}.{n}": v for k, m in made.items() for n, v in m.state_dict().items()}
    for i, (_, tensors) in enumerate(heads):
        dynamic |= {names.head(known, i) + n: v for n, v in tensors.items()}
    files = {"model-00001-of-00001": base, "dynamic-00001-of-00001": dynamic, "router": held}
    config = json.loads((folder / "plain" / "config.json").read_text())
    return finish(folder / "dynamic", files, config, manifest, plain, experts)


def finish(
    out: Path, files: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any],
    manifest: Manifest, plain: Any, experts: list[dict[str, Tensor]],
) -> Made:  # fmt: skip
    """Writes the files of a dynamic checkpoint."""
    out.mkdir()
    where = {}
    for file, tensors in files.items():
        held = {n: v.contiguous() for n, v in tensors.items()}
        save_file(held, out / f"{file}.safetensors", {"format": "pt"})
        where |= dict.fromkeys(held, f"{file}.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    told = {"model_type": "mowmerge", "base_config": config, "mowmerge": manifest.to_json(),
            "dtype": "float32", "auto_map": modeling.auto_map()}  # fmt: skip
    (out / "config.json").write_text(json.dumps(told))
    modeling.bundle(out)
    return Made(out, plain, experts, manifest)


def reordered(code: Code, anchor: Tensor, delta: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same deltas in another order, whatever the codec: full or full_abs."""
    if code.codec == "full_abs":
        return {"abs": anchor + delta}, delta
    assert code.codec == "full"
    return {"delta": delta}, delta
