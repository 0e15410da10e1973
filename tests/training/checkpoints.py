"""Dynamic checkpoints made by hand, and tasks whose samples tell their task apart."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as T
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mowmerge.checkpoint.writer import sha256
from mowmerge.dynamic import names
from mowmerge.dynamic.format import Code, Gate, Head, Manifest, Router
from mowmerge.dynamic.routers import RouterModule

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
WIDTH, EXPERTS = 16, ("a", "b", "c")
COLOURS = {"a": (220, 40, 40), "b": (40, 220, 40), "c": (40, 40, 220)}
CLASSES = {"a": 3, "b": 4, "c": 5}
WORDS = {"a": "red rose ruby", "b": "green grass leaf", "c": "blue sea sky"}
SPLITS = {"router": "train", "select": "validation", "eval": "test"}


@dataclass
class Made:
    """A dynamic checkpoint and the recipe with its tasks."""

    out: Path
    recipe: Path
    experts: list[dict[str, torch.Tensor]]

    def tasks(self, **changes: Any) -> Path:
        """The recipe with every task changed."""
        content = json.loads(self.recipe.read_text())
        for task in content["tasks"].values():
            task |= changes
        file = self.recipe.with_name("changed.yaml")
        file.write_text(json.dumps(content))
        return file

    def bytes(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted(self.out.iterdir())}


def base(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "vit":
        config = T.ViTConfig(**SIZES, image_size=8, patch_size=4)
        return T.ViTModel(config, add_pooling_layer=False)
    if kind == "bert":
        config = T.BertConfig(**SIZES, vocab_size=32, max_position_embeddings=16)
        return T.BertModel(config)
    made = T.LlamaForCausalLM(
        T.LlamaConfig(
            **SIZES, num_key_value_heads=2, vocab_size=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, max_position_embeddings=32,
        )
    )  # fmt: skip
    made.model.embed_tokens.weight.data.mul_(50)  # hidden states of the size of a trained model's
    return made


def checkpoint(
    root: Path, kind: str, router: Router | None, *, scope: str = "sample", spread: float = 0.1,
    heads: bool = True,
) -> Made:  # fmt: skip
    """A checkpoint of three experts, every matrix of whose blocks differs, in codec full_abs.

    Scope block gives each layer's matrices a gate of their own, codec full and the anchor of task
    arithmetic with 0.3.
    """
    root.mkdir(parents=True, exist_ok=True)
    base(kind).save_pretrained(root / "base")
    anchor = load_file(root / "base" / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    experts = [
        {n: t + spread * torch.randn(t.shape, generator=draw) for n, t in anchor.items()}
        for _ in EXPERTS
    ]
    mixed = [n for n in anchor if _block(n) is not None and anchor[n].dim() == 2]
    if kind == "llama":
        mixed = list(anchor)
    gates: dict[str, Gate] = {}
    codes, parts, merged = [], {}, dict(anchor)
    for name in mixed:
        layer = _block(name) or 0
        gate = f"{layer}" if scope == "block" else "0"
        named = f"r{gate}" if router and router.code == 0 else "r0"
        blocks = scope == "block"
        offset, codec, part = (0.3, "full", "delta") if blocks else (0.0, "full_abs", "abs")
        gates[gate] = Gate(scope, named if router else "", offset=offset, index=layer)
        code = Code(name, tuple(anchor[name].shape), codec, len(EXPERTS), gate)
        codes.append(code)
        each = torch.stack([e[name] for e in experts])
        parts[code.part_name(part)] = each - anchor[name] if blocks else each
        if blocks:
            merged[name] = anchor[name] + offset * (each - anchor[name]).sum(0)
    routers = {g.router: router for g in gates.values() if router}
    config = json.loads((root / "base" / "config.json").read_text())
    made = _heads(kind, config) if heads and kind != "llama" else {}
    if kind == "vit":
        for name, expert in zip(EXPERTS, experts, strict=True):
            static = {n: anchor[n] for n in anchor if n not in mixed}
            shutil.copytree(root / "base", root / name)
            save_file(expert | static, root / name / "model.safetensors", {"format": "pt"})
            made[name][1].update(_fitted(name, root / name))
    parts |= {
        names.head(EXPERTS, i) + n: v
        for i, (_, tensors) in enumerate(made.values())
        for n, v in tensors.items()
    }
    classes = {"vit": "ViTForImageClassification", "bert": "BertForSequenceClassification"}
    manifest = Manifest(
        "mow", EXPERTS, tuple(codes), gates, routers,  # type: ignore[arg-type]
        tuple(Head(name, held) for name, (held, _) in made.items()),
        classes.get(kind, "") if made else "",
    )  # fmt: skip
    out = root / "out"
    _write(out, manifest, merged, parts, config)
    _tool(out, kind)
    recipe = _tasks(root, kind)
    (out / "recipe.yaml").write_text(recipe.read_text().replace('"./', '"../'))
    return Made(out, recipe, experts)


def _block(name: str) -> int | None:
    words = name.split(".")
    return next((int(w) for w in words if w.isdigit()), None)


def _heads(
    kind: str, config: Mapping[str, Any]
) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    draw = torch.Generator().manual_seed(2)
    found = {}
    for name, n in CLASSES.items():
        labels = {str(i): f"{name}{i}" for i in range(n)}
        held = dict(config) | {
            "id2label": labels,
            "label2id": {v: int(k) for k, v in labels.items()},
        }
        weight = torch.randn(n, WIDTH, generator=draw)
        found[name] = held, {"weight": weight, "bias": torch.zeros(n)}
    return found


def _fitted(name: str, expert: Path) -> dict[str, torch.Tensor]:
    """A head that knows the classes of a task by the expert's features: the nearest mean."""
    model = T.ViTModel.from_pretrained(expert, add_pooling_layer=False).eval()
    processor = T.ViTImageProcessorPil(size={"height": 8, "width": 8})
    means, chance = [], random.Random(7)
    for label in range(CLASSES[name]):
        given = processor([_picture(name, chance, label) for _ in range(16)], return_tensors="pt")
        with torch.no_grad():
            means.append(model(**given).last_hidden_state[:, 0].mean(0))
    mean = torch.stack(means)
    sharp = 6 / float((mean - mean.mean(0)).square().sum(1).mean())
    return {"weight": 2 * sharp * mean, "bias": -sharp * mean.square().sum(1)}


def _write(
    out: Path, manifest: Manifest, anchor: Mapping[str, torch.Tensor],
    parts: Mapping[str, torch.Tensor], config: Mapping[str, Any],
) -> None:  # fmt: skip
    out.mkdir()
    routers = {
        f"mow_router.{name}.{k}": v.contiguous()
        for name, router in manifest.routers.items()
        for k, v in RouterModule(router).fresh().state_dict().items()
    }
    files = {
        "model-00001-of-00001.safetensors": anchor,
        "dynamic-00001-of-00001.safetensors": parts,
        "router.safetensors": routers,
    }
    for file, tensors in files.items():
        told = {"format": "pt"} | ({"trained": "false"} if file == "router.safetensors" else {})
        save_file({k: v.contiguous() for k, v in tensors.items()}, out / file, metadata=told)
    held = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {}, "weight_map": held}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    described = {
        "model_type": "mowmerge", "base_config": config, "mowmerge": manifest.to_json(),
        "dtype": "float32",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(described))
    (out / "report.json").write_text(json.dumps({"version": 1, "recipe": "r", "tensors": []}))
    names = sorted([*files, "config.json", "model.safetensors.index.json"])
    sums = "".join(f"{sha256(out / name)}  {name}\n" for name in names)
    (out / "SHA256SUMS").write_text(sums)


def _tool(out: Path, kind: str) -> None:
    if kind == "vit":
        T.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(out)
        return
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *" ".join(WORDS.values()).split()]
    words += [f"w{i}" for i in range(32 - len(words))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    T.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(out)  # fmt: skip


def _tasks(root: Path, kind: str) -> Path:
    types = {"vit": "image-classification", "bert": "text-classification", "llama": "causal-lm"}
    tasks = {}
    for i, name in enumerate(EXPERTS):
        files = {}
        for j, (split, n) in enumerate((("train", 24), ("validation", 16), ("test", 8))):
            chance = random.Random(100 * i + j)
            if kind == "vit":
                labels = [i % CLASSES[name] for i in range(n)]
                rows = [{"image": _picture(name, chance, k), "label": k} for k in labels]
                data = Dataset.from_list(
                    rows, features=Features({"image": Image(), "label": Value("int64")})
                )
            else:
                data = Dataset.from_list([{"text": _text(name, chance)} for _ in range(n)])
            file = root / f"{name}-{split}.parquet"
            data.to_parquet(str(file))
            files[split] = f"./{file.name}"
        tasks[f"t{name}"] = {
            "expert": name, "type": types[kind], "splits": SPLITS,
            "data": {"path": "parquet", "data_files": files},
        }  # fmt: skip
    recipe = root / "recipe.yaml"
    content = {
        "version": 1, "models": {n: f"./{n}" for n in EXPERTS}, "method": "linear", "tasks": tasks,
    }  # fmt: skip
    recipe.write_text(json.dumps(content))
    return recipe


def _picture(name: str, chance: random.Random, label: int) -> Picture.Image:
    """The task's colour, in class 1 to 4 darker in one quarter, and some noise."""
    noise = []
    for place in range(64):
        quarter = 1 + place // 32 * 2 + place % 8 // 4
        dark = 0.3 if quarter == label else 1.0
        for channel in COLOURS[name]:
            noise.append(max(0, min(255, int(channel * dark) + chance.randrange(-12, 13))))
    return Picture.frombytes("RGB", (8, 8), bytes(noise))


def _text(name: str, chance: random.Random) -> str:
    """Words of the task, and a few that make the text one of a kind."""
    own = [chance.choice(WORDS[name].split()) for _ in range(8)]
    rest = [f"w{chance.randrange(18)}" for _ in range(4)]
    return " ".join([*own[:2], *rest, *own[2:]])


def routers(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "router.safetensors")


def verified(out: Path) -> Sequence[str]:
    """The files that SHA256SUMS names; AssertionError where one of them is another."""
    lines = [line.split("  ") for line in (out / "SHA256SUMS").read_text().splitlines()]
    assert all(sha256(out / name) == digest for digest, name in lines)
    return [name for _, name in lines]
