"""Finding a checkpoint: folders, shards, files, the Hub's cache, a Hub; and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from zoo import Tensors, Zoo, raw, rewrite

from mowmerge.checkpoint import source
from mowmerge.errors import CheckpointError, MowmergeError, SourceError

TENSORS: Tensors = {
    "model.embed_tokens.weight": torch.arange(12.0).reshape(3, 4),
    "model.layers.0.mlp.up_proj.weight": torch.ones(5, 4),
    "model.layers.1.mlp.up_proj.weight": torch.zeros(5, 4, dtype=torch.bfloat16),
    "model.norm.weight": torch.ones(4),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
}


def refused(
    where: Path | str, *words: str, kind: type[MowmergeError] = CheckpointError, **options: bool
) -> None:
    """Asserts that the source is refused with these words and with advice."""
    with pytest.raises(kind) as caught:
        source.find(str(where), **options)
    (problem,) = caught.value.problems
    for word in words:
        assert word in str(problem)
    assert problem.hint
    assert problem.where or kind is SourceError


# --- what is found


@pytest.mark.parametrize(("shards", "index"), [(1, True), (2, True), (3, True), (3, False)])
def test_every_layout_gives_the_same_tensors(zoo: Zoo, shards: int, index: bool) -> None:
    folder = zoo.save("m", TENSORS, shards=shards, index=index)
    found = source.find(str(folder))
    assert found.specs.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        spec = found.specs[name]
        assert (spec.shape, spec.nbytes, spec.dtype == "BF16") == (
            tuple(value.shape), value.nbytes, value.dtype == torch.bfloat16
        )  # fmt: skip
        location = found.tensors[name]
        with Path(location.file).open("rb") as file:
            file.seek(location.offset)
            assert file.read(value.nbytes) == raw({name: value})[name]
    assert (found.folder, found.revision, found.format) == (str(folder), None, "safetensors")


def test_one_file_by_its_path(zoo: Zoo) -> None:
    folder = zoo.save("m", TENSORS, shards=2)
    found = source.find(str(folder / "model-00001-of-00002.safetensors"))
    assert set(found.specs) == set(list(TENSORS)[::2])
    assert found.folder == str(folder)


def test_tensors_stand_in_the_order_of_the_file(zoo: Zoo) -> None:
    folder = zoo.save("m", TENSORS)
    rewrite(folder / "model.safetensors", lambda h: h.update(dict(reversed(list(h.items())))))
    offsets = [location.offset for location in source.find(str(folder)).tensors.values()]
    assert offsets == sorted(offsets)


# --- what does not fit together


def test_an_index_that_names_an_absent_shard(zoo: Zoo) -> None:
    folder = zoo.save("m", TENSORS, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "the shard model-00002-of-00002.safetensors that the index names is not there")


def test_an_index_that_lists_a_tensor_of_no_shard(zoo: Zoo) -> None:
    folder = zoo.save("m", TENSORS, shards=2)
    index = folder / "model.safetensors.index.json"
    listing = json.loads(index.read_text())
    listing["weight_map"]["model.gone"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(listing))
    refused(folder, "1 tensor(s) that", "'model.gone'")


@pytest.mark.parametrize("text", [
    "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "m"}}', "\xff"
])  # fmt: skip
def test_an_index_that_is_garbage(zoo: Zoo, text: str) -> None:
    folder = zoo.save("m", TENSORS, shards=2)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refused(folder, "index")


@pytest.mark.parametrize("shard", ["", ".", "..", "{away}", "../away.safetensors", "a\0b", "m.bin"])
def test_an_index_that_leads_elsewhere(zoo: Zoo, shard: str) -> None:
    folder = zoo.save("m", TENSORS, shards=2)
    away = folder.parent / "away.safetensors"
    save_file(TENSORS, away)
    listing = {"weight_map": dict.fromkeys(TENSORS, shard.format(away=away))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
    refused(folder, "the index names '", "which is no safetensors file beside it")


def test_an_index_without_tensors(zoo: Zoo) -> None:
    folder = zoo.save("m", TENSORS, shards=2)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused(folder, "the index names no tensors")


def test_two_sets_of_weights(zoo: Zoo) -> None:
    folder = zoo.save("m", TENSORS, shards=2)
    save_file(TENSORS, folder / "model.safetensors")
    refused(folder, "both model.safetensors and model.safetensors.index.json are there")


def test_a_tensor_in_two_shards(zoo: Zoo) -> None:
    folder = zoo.save("m", TENSORS, shards=2, index=False)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "extra.safetensors")
    refused(folder, "is in two files", "extra.safetensors", "model-00001-of-00002.safetensors")


def absurd(length: int, content: bytes) -> bytes:
    return length.to_bytes(8, "little") + content[8:]


@pytest.mark.parametrize(("damage", "words"), [
    (lambda c: c[:-1], "the file is truncated"),
    (lambda c: c[: len(c) // 2], "truncated"),
    (lambda c: c[:6], "not a safetensors file, or a truncated one"),
    (lambda c: b"", "not a safetensors file, or a truncated one (0 bytes)"),
    (lambda c: c + b"\0", "longer than its header says"),
    (partial(absurd, 2**63 - 1), "not a safetensors file"),
    (partial(absurd, 0), "not a safetensors file"),
    (partial(absurd, 50), "the header is corrupt"),
    (lambda c: c[:8] + b"\xff" * 20 + c[28:], "the header is corrupt"),
    (lambda c: (5000).to_bytes(8, "little") + b"[" * 5000, "the header is corrupt"),
    (lambda c: (2).to_bytes(8, "little") + b"[]", "the header is corrupt"),
    (lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not a safetensors"),
])  # fmt: skip
def test_damaged_files(zoo: Zoo, damage: Callable[[bytes], bytes], words: str) -> None:
    file = zoo.save("m", TENSORS) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(file.parent, words, str(file), "download it again")


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["model.norm.weight"].__setitem__(key, value)


@pytest.mark.parametrize(("change", "words"), [
    (put("dtype", "F128"), "'model.norm.weight' has the unknown dtype 'F128'"),
    (put("dtype", ["F32"]), "corrupt"),
    (put("shape", [5]), "corrupt at tensor 'model.norm.weight'"),
    (put("shape", [-2, -2]), "corrupt at tensor 'model.norm.weight'"),
    (put("shape", [4.0]), "corrupt at tensor 'model.norm.weight'"),
    (put("shape", None), "corrupt"), (put("data_offsets", [0]), "corrupt"),
    (put("data_offsets", [16, 0]), "corrupt"), (put("data_offsets", ["0", "16"]), "corrupt"),
    (lambda h: h.pop("model.norm.weight"), "corrupt at tensor"),
    (lambda h: h.update(extra={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}), "corrupt"),
    (lambda h: h.update(extra="text"), "corrupt"),
])  # fmt: skip
def test_damaged_headers(zoo: Zoo, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    file = zoo.save("m", TENSORS) / "model.safetensors"
    rewrite(file, change)
    refused(file.parent, words, str(file))


# --- what cannot be merged


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_fp8_is_refused(zoo: Zoo, dtype: str) -> None:
    file = zoo.save("m", TENSORS) / "model.safetensors"
    header = {"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    rewrite(file, lambda h: (h.clear(), h.update(header)), b"\0" * 4)
    refused(
        file.parent,
        f"is quantised: tensor 'w' is {dtype} without a scale",
        "merge the bf16 or fp16 checkpoint",
    )


@pytest.mark.parametrize("name", [
    "model.layers.0.mlp.up_proj.weight_scale_inv", "model.layers.0.mlp.up_proj.weight_scale",
    "model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.g_idx",
    "model.layers.0.mlp.up_proj.weight.absmax", "model.layers.0.mlp.up_proj.weight_packed",
    "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4",
    "model.layers.0.mlp.up_proj.SCB", "model.layers.0.mlp.up_proj.W_q",
    "model.layers.0.mlp.up_proj.weight_scales",
])  # fmt: skip
def test_quantised_weights_are_refused(zoo: Zoo, name: str) -> None:
    folder = zoo.save("m", TENSORS | {name: torch.ones(3)})
    refused(folder, f"tensor '{name}' belongs to a quantised weight", "merge the bf16 or fp16")


@pytest.mark.parametrize(("name", "dtype"), [
    ("model.layers.0.mlp.up_proj.weight", torch.int8),
    ("model.layers.0.mlp.experts.up_proj_blocks", torch.uint8),
])  # fmt: skip
def test_weights_in_integers_of_8_bits_are_refused(zoo: Zoo, name: str, dtype: torch.dtype) -> None:
    """No config says so where only the weights were copied; a causal mask may be of such."""
    mask = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    found = source.find(str(zoo.save("fine", TENSORS | {"h.0.attn.bias": mask})))
    assert found.specs["h.0.attn.bias"].dtype == "U8"
    folder = zoo.save("m", TENSORS | {name: torch.ones(3, 4).to(dtype)})
    refused(folder, f"this checkpoint is quantised: tensor '{name}' is ", "merge the bf16 or fp16")


@pytest.mark.parametrize("settings", [
    {"quant_method": "gptq"}, {"quant_method": "awq"}, {"quant_method": "bitsandbytes"},
    {"quant_method": "mxfp4"}, {"quant_method": "modelopt"}, {"quant_method": "hqq"},
    {"quant_method": "compressed-tensors",
     "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4}}}},
])  # fmt: skip
def test_a_quantisation_config_is_refused(zoo: Zoo, settings: dict[str, Any]) -> None:
    folder = zoo.save("m", TENSORS, config={"quantization_config": settings})
    named = settings["quant_method"]
    refused(folder, f"config.json says it is quantised ({named})", "merge the bf16 or fp16")


def test_other_formats_are_refused_with_advice(zoo: Zoo) -> None:
    for i, (files, words) in enumerate((
        (["model.gguf"], "GGUF files are quantised exports"),
        (["pytorch_model.bin"], "--allow-pickle"), (["model.pt"], "--allow-pickle"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
        ([], "give a folder with model.safetensors"),
    )):  # fmt: skip
        folder = zoo.folder / f"f{i}"
        folder.mkdir()
        for file in files:
            (folder / file).write_bytes(b"")
        refused(folder, words)
        if len(files) == 1:
            refused(folder / files[0], words)


def test_paths_to_nothing(zoo: Zoo) -> None:
    for path in ("./nowhere", "/nowhere/at/all", "~/nowhere", "a b", "x/y/z", "no-such-name"):
        refused(path, "there is no folder or file", kind=SourceError)
    path = f"{zoo.folder}@main"
    refused(path, f"'{zoo.folder}' is a folder, which has no revisions", kind=SourceError)


# --- pickles


class Bomb:
    """Unpickled without weights_only, it makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_pickles_are_read_on_request(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    wanted, _ = zoo.merge({"method": "linear"}, "wanted")
    for name, tensors in models.items():
        (zoo.folder / name / "model.safetensors").unlink()
        halves = dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])
        for i, half in enumerate(halves, 1):
            torch.save(half, zoo.folder / name / f"pytorch_model-0000{i}-of-00002.bin")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        zoo.merge({"method": "linear"})
    found, _ = zoo.merge({"method": "linear"}, allow_pickle=True, workers=2)
    assert raw(found) == raw(wanted)


def test_a_pickle_that_would_run_code_runs_none(zoo: Zoo) -> None:
    folder = zoo.folder / "evil"
    folder.mkdir()
    made = zoo.folder / "made"
    torch.save({"w": torch.ones(2), "x": Bomb(str(made))}, folder / "pytorch_model.bin")
    refused(folder, "cannot be loaded with weights_only", "safetensors", allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(made))))
    refused(folder, "cannot be loaded with weights_only", allow_pickle=True)
    assert not made.exists()


@pytest.mark.parametrize("content", [
    {"model": {"w": torch.ones(2)}}, {"w": torch.ones(2), "step": 3}, [torch.ones(2)], torch.ones(2)
])  # fmt: skip
def test_a_pickle_that_is_no_state_dict(zoo: Zoo, content: Any) -> None:
    torch.save(content, zoo.folder / "model.pt")
    refused(zoo.folder / "model.pt", "state", allow_pickle=True)


def test_tensors_of_a_pickle_that_share_and_stride(zoo: Zoo) -> None:
    w = torch.arange(12.0).reshape(3, 4)
    torch.save({"w": w, "t": w.T, "row": w[1]}, zoo.folder / "model.pt")
    found, _ = zoo.merge(
        {"method": "passthrough", "models": {"a": "./model.pt"}}, allow_pickle=True
    )
    assert torch.equal(found["w"], w)
    assert torch.equal(found["t"], w.T)
    assert torch.equal(found["row"], w[1])
