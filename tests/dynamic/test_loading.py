"""A dynamic checkpoint loads by every door there is, and never with weights it does not hold."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from making import Made, alike, apart, first, inputs, model, write
from safetensors.torch import load_file, save_file

import mowmerge.hf  # noqa: F401
from mowmerge.checkpoint import dynamic
from mowmerge.dynamic import beside, modeling, remote
from mowmerge.dynamic.format import FORMAT
from mowmerge.errors import CheckpointError
from mowmerge.training import checkpoint

torch.set_num_threads(1)
BLOCKED = """
import json, sys
sys.modules["mowmerge"] = None
import torch, transformers
torch.set_num_threads(1)
folder, door, flag = sys.argv[1:4]
auto = getattr(transformers, door)
model = auto.from_pretrained(folder, **({"trust_remote_code": True} if flag == "remote" else {}))
x = torch.load(folder + "/x.pt")
with torch.no_grad():
    y = model(**x)
torch.save({"y": y.logits, "gates": y.gates}, folder + "/y.pt")
if len(sys.argv) > 4:
    model.save_pretrained(sys.argv[4])
    torch.save(x, sys.argv[4] + "/x.pt")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Made:
    return write(tmp_path_factory.mktemp("llama"), model("llama"))


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Path:
    """The checkpoint, to be damaged."""
    return Path(shutil.copytree(made.folder, tmp_path / "copied"))


def test_auto_classes_load_it(made: Made) -> None:
    batch = inputs("llama")
    loaded = hf.AutoModelForCausalLM.from_pretrained(made.folder)
    assert type(loaded) is modeling.dynamic_class(hf.LlamaForCausalLM)
    assert not loaded.training
    want = made.load()
    assert alike(loaded, want, batch)
    whole, parts = {"": "cpu"}, {"model": "cpu", "lm_head": "cpu", "mow_router": "cpu"}
    for device_map in (whole, parts, "auto"):
        mapped = hf.AutoModelForCausalLM.from_pretrained(made.folder, device_map=device_map)
        assert alike(mapped, want, batch)
    backbone = hf.AutoModel.from_pretrained(made.folder)
    assert type(backbone).__name__ == "MowmergeLlamaModel"
    with pytest.raises(ValueError, match=r"missing keys: (classifier|qa_outputs|score)"):
        hf.AutoModelForSequenceClassification.from_pretrained(made.folder)


def test_a_config_makes_a_model_without_weights(made: Made) -> None:
    config = hf.AutoConfig.from_pretrained(made.folder)
    fresh = hf.AutoModelForCausalLM.from_config(config)
    router = fresh.mow_router["0"]
    assert float(router.temperature.detach()) == 1
    assert all(torch.isfinite(v).all() for v in fresh.state_dict().values())


def test_half_precision_leaves_routers_alone(made: Made) -> None:
    half, batch = made.load(dtype=torch.bfloat16), inputs("llama")
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in half.mow_router.parameters()} == {torch.float32}
    with torch.no_grad():
        whole, want = half(**batch), made.load()(**batch)
        assert whole.gates.dtype == torch.float32
        assert (whole.gates - want.gates).abs().max() < 0.01
        near = apart(first(whole).float(), first(want), batch)
        plain = made.plain.bfloat16()
        try:
            rounding = apart(first(plain(**batch)).float(), first(plain.float()(**batch)), batch)
        finally:
            made.plain.float()
    assert near < 4 * rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t5_in_half_precision_keeps_the_precision_of_its_norms(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """transformers keeps T5's wo in fp32: the norm behind it has to come back to half."""
    made, batch = write(tmp_path, model("t5")), inputs("t5")
    half, ids = made.load(dtype=dtype), torch.tensor([0, 2, 1, 2])
    with torch.no_grad():
        found, want = half(**batch, task_ids=ids), made.load()(**batch, task_ids=ids)
    gap = apart(first(found).float(), first(want), batch)
    assert gap < 0.1 * first(want).abs().max()


def test_config_comes_back(made: Made, tmp_path: Path) -> None:
    config = hf.AutoConfig.from_pretrained(made.folder)
    config.save_pretrained(tmp_path)
    again = hf.AutoConfig.from_pretrained(tmp_path)
    told, want = again.to_dict(), config.to_dict()
    del told["_name_or_path"], want["_name_or_path"]
    assert told == want
    assert again.hidden_size == made.plain.config.hidden_size
    assert again.eos_token_id == made.plain.config.eos_token_id


def test_merged_folder_is_not_written_over(made: Made) -> None:
    with pytest.raises(ValueError, match="save into another folder"):
        made.load().save_pretrained(made.folder)


# --- remote code


def _run(folder: Path, door: str, *more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, "-c", BLOCKED, str(folder), door, *more]
    return subprocess.run(
        argv, capture_output=True, text=True, env=env, cwd=folder, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip


def test_remote_code_alone_loads_it_and_what_it_saves(made: Made, copied: Path) -> None:
    torch.save(inputs("llama"), copied / "x.pt")
    again = copied.with_name("again")
    with torch.no_grad():
        want = made.load()(**inputs("llama"))
    ran = _run(copied, "AutoModelForCausalLM", "remote", str(again))
    assert ran.returncode == 0, ran.stderr
    found = torch.load(copied / "y.pt")
    assert torch.allclose(found["y"], want.logits, atol=1e-6)
    assert torch.allclose(found["gates"], want.gates, atol=1e-6)
    ran = _run(again, "AutoModelForCausalLM", "remote")
    assert ran.returncode == 0, ran.stderr
    assert torch.equal(torch.load(again / "y.pt")["y"], found["y"])


def test_without_mowmerge_and_without_remote_code_it_fails_clearly(copied: Path) -> None:
    ran = _run(copied, "AutoModelForCausalLM", "none")
    assert ran.returncode != 0
    assert "trust_remote_code=True" in ran.stderr
    told = json.loads((copied / "config.json").read_text())
    del told["auto_map"]
    (copied / "config.json").write_text(json.dumps(told))
    ran = _run(copied, "AutoModelForCausalLM", "none")
    assert ran.returncode != 0
    assert "model type `mowmerge`" in ran.stderr


def test_every_file_of_the_runtime_is_bundled() -> None:
    here = Path(remote.__file__).parent
    assert set(remote.FILES) == {p.name for p in here.glob("*.py")} - {"__init__.py"}
    for name in remote.FILES:
        text = (here / name).read_text()
        assert "from . import" not in text  # transformers would not copy what it names
        assert not re.search(r"^\s*(import|from) mowmerge", text, re.MULTILINE)


# --- damage


def _edit(folder: Path, file: str, change: Any) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


SHARD = "dynamic-00001-of-00001.safetensors"
CODED = "model.layers.0.mlp.up_proj.dyn_"


def _part(folder: Path) -> str:
    return next(n for n in load_file(folder / SHARD) if n.startswith(CODED))


def test_missing_part_is_an_error(copied: Path) -> None:
    name = _part(copied)
    _edit(copied, SHARD, lambda t: t.pop(name))
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"missing keys: {name}"):
        hf.AutoModelForCausalLM.from_pretrained(copied)
    direct = modeling.dynamic_class(hf.LlamaForCausalLM)
    with pytest.raises(ValueError, match=f"missing keys: {name}"):
        direct.from_pretrained(copied)


def test_unexpected_tensor_is_an_error(copied: Path) -> None:
    _edit(copied, SHARD, lambda t: t.update({"model.norm.dyn_extra": torch.zeros(2)}))
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.dyn_extra"] = SHARD
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"unexpected keys: model\.norm\.dyn_extra"):
        hf.AutoModelForCausalLM.from_pretrained(copied)


def test_another_shape_is_an_error(copied: Path) -> None:
    name = _part(copied)
    _edit(copied, SHARD, lambda t: t.update({name: t[name][:1].clone()}))
    with pytest.raises(ValueError, match="does not load"):
        hf.AutoModelForCausalLM.from_pretrained(copied)


def test_router_file_of_other_experts_is_an_error(copied: Path) -> None:
    file = copied / "router.safetensors"
    for experts in ("xyz", "bac"):  # of others, and of these in another order
        save_file(load_file(file), file, {"experts": json.dumps(list(experts))})
        with pytest.raises(ValueError, match=f"other experts: {', '.join(experts)}, and this"):
            hf.AutoModelForCausalLM.from_pretrained(copied)
    save_file(load_file(file), file, {"experts": '["a", "b", "c"]'})
    hf.AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("file", [SHARD, "model-00001-of-00001.safetensors", "router.safetensors"])
def test_truncated_shard_is_named(copied: Path, file: str) -> None:
    held = (copied / file).read_bytes()
    (copied / file).write_bytes(held[:-5])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        hf.AutoModelForCausalLM.from_pretrained(copied)


def test_absent_shard_is_named(copied: Path) -> None:
    (copied / SHARD).unlink()
    with pytest.raises(OSError, match=SHARD):
        hf.AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("format", FORMAT + 1, f"this checkpoint has format {FORMAT + 1} .* upgrade mowmerge"),
        ("experts", ["a", "b"], "3 slots for 2 experts"),
    ],
)
def test_manifest_that_cannot_be_read_is_an_error(
    copied: Path, key: str, value: Any, says: str
) -> None:
    told = json.loads((copied / "config.json").read_text())
    told["mowmerge"][key] = value
    (copied / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=says):
        hf.AutoModelForCausalLM.from_pretrained(copied)


def test_code_of_another_shape_or_place_is_an_error(copied: Path) -> None:
    told = json.loads((copied / "config.json").read_text())
    told["mowmerge"]["tensors"][0]["name"] = "model.layers.7.mlp.up_proj.weight"
    (copied / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"'model\.layers\.7\.\S+' is not a tensor"):
        hf.AutoModelForCausalLM.from_pretrained(copied)
    told["mowmerge"]["tensors"][0]["name"] = "model.norm.weight"
    (copied / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is coded as .*; the model has"):
        hf.AutoModelForCausalLM.from_pretrained(copied)


# --- the router file


@pytest.mark.parametrize("what", ["the same", "a value", "a name", "a file"])
def test_a_router_file_that_was_trained_elsewhere_is_refused(
    made: Made, copied: Path, what: str
) -> None:
    router, experts = copied / "router.safetensors", made.manifest.experts
    held = load_file(router)
    save_file(held, router, {"format": "pt", **beside.told(copied, experts)})
    if what == "a value":
        floats = [n for n, v in load_file(copied / SHARD).items() if v.is_floating_point()]
        _edit(copied, SHARD, lambda t: t[floats[0]].view(-1)[:1].add_(1))
    elif what == "a name":
        save_file(held, router, {"format": "pt", **beside.told(copied, ["x", "y", "z"])})
    elif what == "a file":  # where a tensor lies says nothing
        _edit(copied, SHARD, lambda t: save_file({k: t.pop(k) for k in list(t)[:2]},
                                                 copied / "dynamic-2.safetensors"))  # fmt: skip
        index = json.loads((copied / "model.safetensors.index.json").read_text())
        moved = load_file(copied / "dynamic-2.safetensors")
        index["weight_map"] |= dict.fromkeys(moved, "dynamic-2.safetensors")
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    says = {"a value": "trained beside other weights", "a name": "from other experts: x, y, z"}
    if what not in says:
        hf.AutoModelForCausalLM.from_pretrained(copied)
        dynamic.held(copied)
        return
    with pytest.raises(ValueError, match=says[what]):
        hf.AutoModelForCausalLM.from_pretrained(copied)
    for door in (dynamic.held, checkpoint.manifest):
        with pytest.raises(CheckpointError, match=says[what]):
            door(copied)
