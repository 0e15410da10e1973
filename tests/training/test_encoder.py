"""A named encoder as what a classifier looks at: read, bundled, trained on, loaded again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import mowmerge
from mowmerge import api
from mowmerge.errors import CheckpointError, MowmergeError, RecipeError
from mowmerge.training.settings import Options
from tests.training import checkpoints as make
from tests.zoo import run

WIDE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2}  # fmt: skip
NAMES = make.EXPERTS


def family(root: Path, kind: str, encoder: str) -> Path:
    """A base with its tokenizer or processor, three experts, an encoder, tasks and a recipe."""
    made = make.base(kind)
    if kind == "vit":
        made = T.ViTForImageClassification(made.config)
    made.save_pretrained(root / "base")
    make._tool(root / "base", kind)
    held = load_file(root / "base" / "model.safetensors")
    for k, name in enumerate(NAMES):
        shutil.copytree(root / "base", root / name)
        draw = torch.Generator().manual_seed(k)
        moved = {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in held.items()}
        save_file(moved, root / name / "model.safetensors", {"format": "pt"})
    {"vit": picture_encoder, "bert": text_encoder}[encoder](root / "encoder")
    recipe = make._tasks(root, kind)
    content = json.loads(recipe.read_text()) | {
        "base": "./base", "method": "mow", "parameters": {"blocks": 1, "router": "linear"},
        "rest": {"method": "task_arithmetic"}, "encoder": "./encoder",
    }  # fmt: skip
    recipe.write_text(json.dumps(content))
    return recipe


def picture_encoder(folder: Path, size: int = 12) -> None:
    torch.manual_seed(5)
    config = T.ViTConfig(**WIDE, image_size=size, patch_size=4)
    T.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    T.ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.4, 0.5, 0.3], image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(folder)


def text_encoder(folder: Path) -> None:
    """A BERT whose tokenizer has the same words in another order, and more of its own."""
    torch.manual_seed(5)
    config = T.BertConfig(**WIDE, vocab_size=40, max_position_embeddings=10)
    made = T.BertForMaskedLM(config)
    made.bert.embeddings.word_embeddings.weight.data.mul_(50)
    made.save_pretrained(folder)
    words = [*" ".join(make.WORDS.values()).split(), *(f"w{i}" for i in range(19))]
    words = ["[CLS]", "[UNK]", "[PAD]", *reversed(words)]
    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    T.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def merged(root: Path, recipe: Path) -> Path:
    out: Path = api.merge(recipe, root / "out").path
    return out


def inputs(kind: str, folder: Path) -> dict[str, Any]:
    if kind == "vit":
        draw = torch.Generator().manual_seed(3)
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=draw)}
    tokens = T.AutoTokenizer.from_pretrained(folder)
    texts = ["red rose w1 ruby", "blue sea", "green leaf w3 w4 w5 grass", "sky"]
    return dict(tokens(texts, padding=True, return_tensors="pt"))


CASES = [("vit", "vit"), ("bert", "bert"), ("llama", "bert")]


@pytest.mark.parametrize(("kind", "encoder"), CASES)
def test_it_is_merged_trained_saved_and_loaded_without_its_source(
    tmp_path: Path, kind: str, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = family(tmp_path, kind, encoder)
    out = merged(tmp_path, recipe)
    for name in ("base", "encoder", *NAMES):
        shutil.rmtree(tmp_path / name)
    options = Options(objective="task", steps=60, batch=16, lr=0.02)
    assert "to be trained first" in (out / "README.md").read_text()
    told = api.train_router(out, recipe, options).report
    assert "trained routers choose" in (out / "README.md").read_text()
    assert told["metrics"]["accuracy"] == 1.0
    assert "encoder/model.safetensors" in make.verified(out)
    assert not api.verify(out).problems
    model = mowmerge.load(out)
    given = inputs(kind, out)
    with torch.no_grad():
        first = model(**given)
    assert first.gates.std() > 0.01
    model.save_pretrained(tmp_path / "again")
    again = mowmerge.load(tmp_path / "again")
    with torch.no_grad():
        second = again(**given)
    assert torch.equal(first.gates, second.gates)
    assert torch.equal(first[0], second[0])
    single = {k: v[2:3] for k, v in given.items()}
    with torch.no_grad():
        torch.testing.assert_close(again(**single).gates, first.gates[2:3], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "encoder"), CASES)
def test_the_classifier_sees_what_the_encoder_says(tmp_path: Path, kind: str, encoder: str) -> None:
    """By hand: the encoder on pixels of its own normalisation, or on texts by its own tokenizer."""
    out = merged(tmp_path, family(tmp_path, kind, encoder))
    if kind == "vit":
        picture_encoder(tmp_path / "encoder", 8)  # of the base's size: nothing is resized
        recipe = tmp_path / "recipe.yaml"
        out = api.merge(recipe, tmp_path / "same").path
    model, given = mowmerge.load(out), inputs(kind, out)
    alone = T.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    if kind == "vit":
        raw = given["pixel_values"] * 0.5 + 0.5
        m, s = (torch.tensor(v).view(3, 1, 1) for v in ([0.4, 0.5, 0.3], [0.2, 0.3, 0.4]))
        own = {"pixel_values": (raw - m) / s}
    else:
        own = dict(
            T.AutoTokenizer.from_pretrained(tmp_path / "encoder")(
                ["red rose w1 ruby", "blue sea", "green leaf w3 w4 w5 grass", "sky"],
                padding=True, return_tensors="pt",
            )
        )  # fmt: skip
        assert not torch.equal(own["input_ids"], given["input_ids"])
    with torch.no_grad():
        want = alone(**own).last_hidden_state
    masks = [given["attention_mask"]] if "attention_mask" in given else []
    seen, mask = model.seen(0, (), given, masks)
    torch.testing.assert_close(seen, want, rtol=1e-4, atol=1e-4)
    assert (mask is None) == (kind == "vit")
    assert model.mow_router["0"].last.weight.shape == (3, 48)


def test_pictures_of_another_size_are_resized(tmp_path: Path) -> None:
    out = merged(tmp_path, family(tmp_path, "vit", "vit"))
    model = mowmerge.load(out)
    assert json.loads((out / "config.json").read_text())["mowmerge"]["encoder"]["size"] == [12, 12]
    grey = torch.full((1, 3, 8, 8), 0.25)
    own = model._encoder._pixels(grey)["pixel_values"]
    raw = 0.25 * 0.5 + 0.5
    assert own.shape == (1, 3, 12, 12)
    want = torch.tensor([(raw - 0.4) / 0.2, (raw - 0.5) / 0.3, (raw - 0.3) / 0.4])
    torch.testing.assert_close(own.mean((0, 2, 3)), want)


def test_a_generation_asks_it_for_the_prompt_alone(tmp_path: Path) -> None:
    out = merged(tmp_path, family(tmp_path, "llama", "bert"))
    model, given = mowmerge.load(out), inputs("llama", out)
    given.pop("token_type_ids", None)
    asked: list[int] = []
    model._encoder.model.register_forward_hook(lambda *a: asked.append(1))
    model.generate(**given, max_new_tokens=3, do_sample=False)
    assert asked == [1]


def test_what_is_told_of_it(tmp_path: Path) -> None:
    recipe = family(tmp_path, "vit", "vit")
    planned = api.inspect(recipe)
    out = merged(tmp_path, recipe)
    held = api.inspect(out)
    weighs = sum(t.nbytes for t in load_file(tmp_path / "encoder/model.safetensors").values())
    assert held["bytes"]["encoder"] == planned["bytes"]["encoder"] == weighs
    assert held["encoder"]["reads"] == "pixels"
    assert json.loads((out / "config.json").read_text())["mowmerge"]["format"] == 5
    lock = (out / "recipe.lock.yaml").read_text()
    assert "encoder: ./encoder" in lock and "\n    encoder:" in lock
    dense = api.extract(out, tmp_path / "dense", expert="a").path
    assert not (dense / "encoder").exists()
    (out / "encoder/model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="the encoder of .* does not load"):
        mowmerge.load(out)
    assert api.verify(out).problems


def test_remote_code_needs_no_mowmerge(tmp_path: Path) -> None:
    out = merged(tmp_path, family(tmp_path, "bert", "bert"))
    given = inputs("bert", out)
    with torch.no_grad():
        want = mowmerge.load(out)(**given).gates
    torch.save({"given": given, "want": want}, tmp_path / "held.pt")
    code = """if True:
        import sys, torch
        sys.modules["mowmerge"] = None
        from transformers import AutoModel
        model = AutoModel.from_pretrained("out", trust_remote_code=True)
        held = torch.load("held.pt")
        with torch.no_grad():
            torch.testing.assert_close(model(**held["given"]).gates, held["want"])
    """
    env = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    ran = run([sys.executable, "-c", code], tmp_path, env=env)
    assert ran.rc == 0, ran.err


@pytest.mark.parametrize(("change", "words"), [
    ({"method": "wemoe", "parameters": {}}, "wemoe has no classifier that could look"),
    ({"method": "emr", "parameters": {}}, "emr has no classifier that could look"),
    ({"method": "linear", "parameters": {}, "rest": None}, "an encoder is for classifiers"),
    ({"encoder": "./absent"}, "there is no folder or file './absent'"),
    ({"encoder": "./texts"}, "it has no tokenizer|no image processor|has no tokenizer"),
])  # fmt: skip
def test_what_cannot_be_one_is_refused_before_anything_is_read(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    recipe = family(tmp_path, "vit", "vit")
    text_encoder(tmp_path / "texts")
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | change))
    with pytest.raises(MowmergeError, match=words) as error:
        api.plan(recipe)
    assert "recipe.yaml:" in error.value.problems[0].where


def test_a_model_cannot_share_its_name(tmp_path: Path) -> None:
    recipe = family(tmp_path, "vit", "vit")
    content = json.loads(recipe.read_text())
    content["models"]["encoder"] = "./a"
    recipe.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="cannot be named 'encoder'"):
        api.check(recipe)
