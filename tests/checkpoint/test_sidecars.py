"""What goes beside the weights: config, tokenizer, licences, card; odd files are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import Zoo, load

from mowmerge.checkpoint import sidecars

LINEAR: dict[str, Any] = {"method": "linear"}
NARROW = LINEAR | {"output": {"dtype": "bfloat16"}}


def out(zoo: Zoo, name: str) -> str:
    return (zoo.folder / "out" / name).read_text()


def with_config(zoo: Zoo, text: str) -> None:
    zoo.family("llama", 2)
    (zoo.folder / "base" / "config.json").write_text(text)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_changes_by_its_dtype_alone(zoo: Zoo, key: str) -> None:
    text = f'{{"model_type": "llama", "{key}": "float32", "name": "Zoë", "n": [1, 2]}}'
    with_config(zoo, text)
    zoo.merge(NARROW)
    assert list(json.loads(out(zoo, "config.json")).items()) == list(
        json.loads(text.replace("float32", "bfloat16")).items()
    )
    assert "Zoë" in out(zoo, "config.json")


@pytest.mark.parametrize("content", [LINEAR, LINEAR | {"output": {"dtype": "float32"}}])
def test_where_the_dtype_stays_the_config_is_the_base_s(zoo: Zoo, content: Any) -> None:
    text = '{"torch_dtype":"float32",\n   "odd":   1e-05}'
    with_config(zoo, text)
    zoo.merge(content)
    assert out(zoo, "config.json") == text


def test_a_config_without_a_dtype_gets_one(zoo: Zoo) -> None:
    with_config(zoo, '{"model_type": "llama"}')
    zoo.merge(NARROW)
    assert json.loads(out(zoo, "config.json")) == {"model_type": "llama", "dtype": "bfloat16"}


def test_without_a_config_there_is_none(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    (zoo.folder / "base" / "config.json").unlink()
    zoo.merge(NARROW)
    assert not (zoo.folder / "out" / "config.json").exists()
    zoo.merge(LINEAR, force=True)


def test_what_is_copied_and_what_is_reported(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    base = zoo.folder / "base"
    copied = {
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
        "vocab.txt", "tokenizer.model", "preprocessor_config.json", "1_Pooling/config.json",
        "additional_chat_templates/rag.jinja", "merges.txt", "added_tokens.json",
    }  # fmt: skip
    odd = {"modeling_odd.py", "vectors.npz"}
    hidden = {
        ".gitattributes", "training_args.bin", "README.md", "report.json", "trainer_state.json",
        "recipe.yaml", "SHA256SUMS", "pytorch_model.bin.index.json", "optimizer.pt",
    }  # fmt: skip
    for name in copied | odd | hidden:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"the base's {name}")
    _, report = zoo.merge(LINEAR)
    written = {
        p.relative_to(zoo.folder / "out").as_posix()
        for p in (zoo.folder / "out").rglob("*") if p.is_file()
    }  # fmt: skip
    ours = {"model.safetensors", "config.json", "recipe.yaml", "report.json", "README.md"}
    assert written == copied | ours | {"LICENSE", "recipe.lock.yaml"}
    for name in copied:
        assert out(zoo, name) == f"the base's {name}"
    assert odd <= set(report["files_left_behind"])
    for name in ("recipe.yaml", "README.md"):
        assert "the base's" not in out(zoo, name)


def test_every_expert_s_own_licence_is_kept(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    (zoo.folder / "b" / "LICENSE").write_text("Llama licence")
    (zoo.folder / "c" / "LICENSE.txt").write_text("Gemma licence")
    (zoo.folder / "c" / "USE_POLICY.md").write_text("be nice")
    zoo.merge(LINEAR)
    found = {p.name: p.read_text() for p in (zoo.folder / "out").glob("[LU]*")}
    assert found == {
        "LICENSE": "Apache-2.0\n", "LICENSE-b": "Llama licence", "LICENSE-c.txt": "Gemma licence",
        "USE_POLICY-c.md": "be nice",
    }  # fmt: skip


def test_licences_of_nested_inputs_are_kept(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    (zoo.folder / "b" / "LICENSE").write_text("Llama licence")
    inner = {"method": "linear", "models": {"x": "./a", "y": "./b"}}
    zoo.merge({"method": "linear", "base": "./base", "models": {"n": {"source": inner}}})
    assert "Llama licence" in {p.read_text() for p in (zoo.folder / "out").glob("LICENSE*")}


def test_without_a_base_the_first_model_gives_the_sidecars(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    for name in "ab":
        (zoo.folder / name / "tokenizer.json").write_text(name)
    zoo.merge(LINEAR | {"models": {"b": "./b", "a": "./a"}})
    assert out(zoo, "tokenizer.json") == "b"


def test_a_path_to_a_file_takes_the_sidecars_of_its_folder(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.merge(LINEAR | {"models": {n: f"./{n}/model.safetensors" for n in "ab"}})
    assert out(zoo, "tokenizer_config.json")


def test_the_card_tells_lineage_inputs_and_recipe(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    zoo.recipe({"method": "ties"})
    recipe = "base: ./base\nmodels: {a: ./a, b: ./b}  # ours\nmethod: ties\n"
    zoo.merge(recipe, name="mine")
    card = out(zoo, "README.md")
    front, _, body = card.partition("\n---\n")
    assert front.startswith("---\nlibrary_name: transformers\n")
    assert "- merge" in front
    assert "- ties" in front
    assert "# mine" in body
    assert recipe.strip() in body
    assert (
        f"| ties | {len(models['base'])} | [arXiv:2306.01708](https://arxiv.org/abs/2306.01708) |"
        in body
    )
    assert str(zoo.folder) not in card
    absolute = recipe.replace("./", f"{zoo.folder}/")
    zoo.merge(absolute, "other")
    assert str(zoo.folder) not in (zoo.folder / "other" / "README.md").read_text()


def test_generation_config_is_carried_byte_for_byte(zoo: Zoo) -> None:
    zoo.family("llama", 2, dtype=torch.bfloat16)
    (zoo.folder / "base" / "generation_config.json").write_bytes(b'{"a":1}\r\n')
    zoo.merge(LINEAR)
    assert (zoo.folder / "out" / "generation_config.json").read_bytes() == b'{"a":1}\r\n'
    assert set(load(zoo.folder / "out"))


def test_an_unreadable_config_says_which(zoo: Zoo, tmp_path: Path) -> None:
    from mowmerge.errors import CheckpointError

    with_config(zoo, "{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        zoo.merge(LINEAR)


def test_no_weights_are_read_to_compare_licences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor, other, out = (tmp_path / name for name in ("donor", "other", "out"))
    for folder in (donor, other, out):
        folder.mkdir()
        (folder / "LICENSE").write_text(f"licence of {folder.name}")
    (out / "model.safetensors").write_text("many bytes")
    true, seen = Path.read_bytes, []

    def reading(self: Path) -> bytes:
        seen.append(self.suffix)
        return true(self)

    monkeypatch.setattr(Path, "read_bytes", reading)
    sidecars.copy(donor, [("donor", donor), ("other", other)], out)
    assert seen
    assert ".safetensors" not in seen
    assert (out / "LICENSE-other").exists()
