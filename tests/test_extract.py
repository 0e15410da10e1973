"""Ordinary checkpoints back from dynamic ones: how exact, how they load, and what is refused."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import mowmerge
from mowmerge import api
from mowmerge.checkpoint import dynamic, heads, writer
from mowmerge.checkpoint.dense import DenseReader
from mowmerge.dynamic import codecs
from mowmerge.dynamic.format import FORMAT, Code, Gate, Head, Manifest
from mowmerge.errors import CheckpointError, RecipeError, ResourceError, SourceError
from mowmerge.extraction import one_hot
from mowmerge.methods import ops
from mowmerge.methods.ops.spectral import truncated
from tests.zoo import Zoo, left, load, raw

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32}
LABELS = {"pets": ["cat", "dog", "hen"], "sky": ["clear", "grey"]}
WORDS = {"input_ids": torch.arange(12).view(2, 6)}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}


@dataclass(frozen=True)
class Kind:
    """An architecture: its config, the classes of base and experts, its head, some inputs."""

    config: Any
    sizes: dict[str, Any]
    base: Any
    expert: Any
    head: str
    inputs: dict[str, Tensor]


KINDS = {
    "bert": Kind(
        transformers.BertConfig, {"vocab_size": 30, "max_position_embeddings": 16},
        transformers.BertModel, transformers.BertForSequenceClassification, "classifier.*", WORDS,
    ),
    "vit": Kind(
        transformers.ViTConfig, {"image_size": 8, "patch_size": 4},
        lambda config: transformers.ViTModel(config, add_pooling_layer=False),
        transformers.ViTForImageClassification, "classifier.*", IMAGES,
    ),
    "llama": Kind(
        transformers.LlamaConfig, {"vocab_size": 30, "tie_word_embeddings": True},
        transformers.LlamaForCausalLM, transformers.LlamaForCausalLM, "", WORDS,
    ),
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "mow": {"blocks": 9, "norms": "all", "embeddings": "all"},
    "wemoe": {}, "e_wemoe": {"density": 0.5}, "rank_one_moe": {"rank": 4},
    "smile": {"rank": 4, "top_k": 1}, "twin_merging": {"density": 0.5}, "emr": {},
    "tall_mask": {}, "one_bit": {}, "bitdelta": {},
}  # fmt: skip


def save(folder: Path, kind: Kind) -> None:
    """A base and an expert a label set, a small step away from it."""
    torch.manual_seed(0)
    base = kind.base(kind.config(**SIZES | kind.sizes))
    base.save_pretrained(folder / "base")
    stem = base.state_dict()
    for name, labels in LABELS.items():
        named = {
            "id2label": dict(enumerate(labels)),
            "label2id": {v: i for i, v in enumerate(labels)},
        }
        model = kind.expert(kind.config(**SIZES | kind.sizes | (named if kind.head else {})))
        backbone = model.base_model if kind.head else model
        moved = {k: v + 0.03 * torch.randn_like(v) for k, v in stem.items()}
        backbone.load_state_dict(moved, strict=False)
        model.save_pretrained(folder / name)


def recipe(folder: Path, kind: Kind, method: str, **more: Any) -> Path:
    content = {
        "version": 1, "base": "./base", "models": {name: f"./{name}" for name in LABELS},
        "method": method, "parameters": METHODS[method],
        **({"heads": {"match": kind.head}} if kind.head else {}), **more,
    }  # fmt: skip
    file = folder / f"{method}.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module", params=list(KINDS))
def zoo_of(request: Any, tmp_path_factory: Any) -> tuple[Path, Kind]:
    folder = tmp_path_factory.mktemp(request.param)
    save(folder, KINDS[request.param])
    return folder, KINDS[request.param]


@pytest.fixture
def berts(tmp_path: Path) -> Path:
    """The folder of a mow checkpoint `out` of BERTs, and what it was made of."""
    save(tmp_path, KINDS["bert"])
    api.merge(recipe(tmp_path, KINDS["bert"], "mow"), tmp_path / "out")
    return tmp_path


def reload(kind: Kind, folder: Path) -> Any:
    """The model as plain transformers loads it, every key in place."""
    loaded, info = kind.expert.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


# --- what comes back


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_comes_back(zoo_of: tuple[Path, Kind], method: str, tmp_path: Path) -> None:
    folder, kind = zoo_of
    asked = recipe(folder, kind, method)
    out = api.merge(asked, folder / method, force=True).path
    result = api.extract(out, tmp_path / "sky", expert="sky", recipe=asked)
    theirs, ours = load(folder / "sky"), load(tmp_path / "sky")
    assert ours.keys() == theirs.keys()
    assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {
        k: (v.dtype, v.shape) for k, v in theirs.items()
    }
    recomputed(result.report, ours, theirs, load(folder / "base"))
    within(method, result.report, load(folder / "base"), theirs, dynamic.held(out).manifest)
    model = reload(kind, result.path)
    names = LABELS["sky"] if kind.head else None
    assert names is None or list(model.config.id2label.values()) == names
    with torch.inference_mode():
        mixed = mowmerge.load(out)(**kind.inputs, task_ids=torch.tensor([1, 1])).logits
        dense = model(**kind.inputs).logits
    assert torch.allclose(mixed[..., : dense.shape[-1]], dense, atol=1e-5)


def recomputed(report: dict[str, Any], ours: Any, theirs: Any, base: Any) -> None:
    """Every figure of the report, from the files."""
    for line in report["tensors"]:
        name = line["name"]
        error = (ours[name].double() - theirs[name].double()).norm().item()
        start = next((base[n] for n in (name, name.partition(".")[2]) if n in base), None)
        assert line["exact"] == torch.equal(ours[name], theirs[name])
        assert line["error"] == pytest.approx(error, abs=1e-12)
        if start is None:
            assert line["relative"] is None
        else:
            moved = (theirs[name].double() - start.double()).norm().item()
            assert line["relative"] == pytest.approx(error / moved, abs=1e-12)
    assert report["exact"] == sum(line["exact"] for line in report["tensors"])
    assert report["largest"]["relative"] == max(line["relative"] or 0 for line in report["tensors"])


def within(method: str, report: dict[str, Any], base: Any, theirs: Any, manifest: Manifest) -> None:
    """Each dynamic tensor is as exact as its codec promises."""
    prefix = manifest.heads[0].prefix if manifest.heads else ""
    lines = {line["name"]: line for line in report["tensors"]}
    ranks = {code.name: code.rank for code in manifest.codes}
    n = len(manifest.experts)
    for code in manifest.codes:
        line, own = lines[prefix + code.name], theirs[prefix + code.name].double()
        delta = own - base[code.name].double()
        if code.codec == "full_abs":
            assert line["exact"]
        elif code.codec == "full":
            assert line["relative"] < 1e-5
        elif code.codec == "low_rank" and method != "twin_merging":  # of W_k - W_0
            rank = ranks[code.name] * code.slots // n
            tail = torch.linalg.svdvals(delta)[rank:].norm().item()
            assert line["error"] == pytest.approx(tail, rel=1e-3, abs=1e-6)
        elif code.codec == "sparse":
            dropped = delta.abs().flatten().sort().values[: delta.numel() - code.kept]
            assert line["error"] == pytest.approx(dropped.norm().item(), rel=1e-3, abs=1e-6)
        elif code.codec == "one_bit":
            left_over = delta.square().sum() - delta.numel() * delta.abs().mean() ** 2
            assert line["error"] == pytest.approx(math.sqrt(left_over), rel=1e-4)
        else:
            assert line["relative"] < (2 if method == "tall_mask" else 1)


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_all_dynamic_with_full_abs_is_the_expert_to_the_byte(kind: str, tmp_path: Path) -> None:
    save(tmp_path, KINDS[kind])
    asked = recipe(tmp_path, KINDS[kind], "mow")
    out = api.merge(asked, tmp_path / "out").path
    for name in LABELS:
        result = api.extract(out, tmp_path / f"x-{name}", expert=name, recipe=asked)
        assert raw(load(result.path)) == raw(load(tmp_path / name))
        assert result.report["exact"] == len(result.report["tensors"])
        assert result.report["relative"] == 0


def test_what_is_written(berts: Path) -> None:
    (berts / "out" / "tokenizer.json").write_text("{}")
    (berts / "out" / "LICENSE").write_text("mine")
    result = api.extract(berts / "out", berts / "sky-again", expert="sky")
    assert sorted(p.name for p in result.path.iterdir()) == [
        "LICENSE", "README.md", "SHA256SUMS", "config.json", "model.safetensors", "report.json",
        "tokenizer.json",
    ]  # fmt: skip
    own = json.loads((berts / "sky" / "config.json").read_text())
    assert json.loads((result.path / "config.json").read_text()) == own
    assert json.loads((result.path / "report.json").read_text()) == result.report
    assert result.report["gates"] == {"0": [0.0, 1.0]}
    for line in (result.path / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert writer.sha256(result.path / name) == digest


LOADS = """
import sys
from transformers import AutoModelForSequenceClassification
model, info = AutoModelForSequenceClassification.from_pretrained("x", output_loading_info=True)
assert not any(info.values()), info
print(type(model).__name__, model.config.id2label, "mowmerge" in sys.modules)
"""


def test_it_loads_where_mowmerge_is_not(berts: Path) -> None:
    zoo = Zoo(berts)
    assert zoo.cli("extract", "out", "--expert", "sky", "x", "-q").rc == 0
    assert zoo.python(LOADS, env={"PYTHONPATH": ""}).out == (
        "BertForSequenceClassification {0: 'clear', 1: 'grey'} False\n"
    )


def test_a_saved_model_gives_the_same_expert(berts: Path) -> None:
    mowmerge.load(berts / "out").save_pretrained(berts / "saved")
    first = api.extract(berts / "out", berts / "one", expert="pets").path
    second = api.extract(berts / "saved", berts / "two", expert="pets").path
    assert raw(load(first)) == raw(load(second))


def test_bf16_comes_back_in_bf16_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, KINDS["llama"])
    file = recipe(tmp_path, KINDS["llama"], "mow", output={"dtype": "bfloat16"})
    out = api.merge(file, tmp_path / "out").path
    result = api.extract(out, tmp_path / "sky-again", expert="sky", recipe=file)
    theirs, ours = load(tmp_path / "sky"), load(result.path)
    assert all(torch.equal(ours[name], value.bfloat16()) for name, value in theirs.items())
    assert json.loads((result.path / "config.json").read_text())["dtype"] == "bfloat16"
    assert 0 < result.report["relative"] < 0.1


def test_what_the_expert_lacks_does_not_come_back(tmp_path: Path) -> None:
    kind = KINDS["vit"]
    save(tmp_path, kind)
    torch.manual_seed(0)
    transformers.ViTModel(kind.config(**SIZES | kind.sizes)).save_pretrained(tmp_path / "base")
    file = recipe(tmp_path, kind, "mow", missing="base")
    out = api.merge(file, tmp_path / "out").path
    assert "pooler.dense.weight" in load(out)
    reload(kind, api.extract(out, tmp_path / "x", expert="sky").path)


# --- what a task would see


TASK = {"type": "text-classification", "data": {"path": "json", "data_files": {"s": "s.json"}}}


def with_task(folder: Path, method: str, **more: Any) -> Path:
    """A checkpoint of BERTs whose recipe has a task with three samples, and a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    save(folder, KINDS["bert"])
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 30)}}))
    words.pre_tokenizer = Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    made.save_pretrained(folder / "base")
    lines = [{"text": f"w{i} w{i + 7} w{2 * i}", "label": 0} for i in range(3, 6)]
    tasks = {"skies": {**TASK, "expert": "sky", "splits": {"select": "s"}}}
    tasks["skies"]["data"] = {"path": "json", "data_files": {"s": str(folder / "s.json")}}
    (folder / "s.json").write_text("\n".join(map(json.dumps, lines)))
    asked = recipe(folder, KINDS["bert"], method, tasks=tasks, **more)
    return api.merge(asked, folder / "out").path


def test_a_task_has_the_rest_that_its_router_adds(tmp_path: Path) -> None:
    out = with_task(tmp_path, "one_bit", parameters={"rest": 0.3})
    task = api.extract(out, tmp_path / "task", task="skies")
    expert = api.extract(out, tmp_path / "expert", expert="sky")
    each = {"task": task.report["gates"]["0"], "expert": expert.report["gates"]["0"]}
    place = each["expert"].index(1.0)
    assert [sum(each["expert"]), each["task"][place]] == [1.0, 1.0]
    assert {c for i, c in enumerate(each["task"]) if i != place} == {0.3}


def test_a_task_of_a_classifier_is_its_expert(tmp_path: Path) -> None:
    out = with_task(tmp_path, "mow")
    task = api.extract(out, tmp_path / "task", task="skies")
    expert = api.extract(out, tmp_path / "expert", expert="sky")
    assert raw(load(task.path)) == raw(load(expert.path))
    assert (task.report["task"], task.report["expert"]) == ("skies", "sky")


def test_a_task_of_block_gates_is_the_model_at_their_mean(tmp_path: Path) -> None:
    out = with_task(tmp_path, "wemoe")
    torch.manual_seed(1)
    file = out / "router.safetensors"
    routers = {k: v + 0.3 * torch.randn_like(v) for k, v in load_file(file).items()}
    save_file(routers, file, {"trained": "true"})
    result = api.extract(out, tmp_path / "task", task="skies")
    assert "mean over the 3 samples" in result.report["note"]
    assert "not trained" not in result.report["note"]
    words = transformers.AutoTokenizer.from_pretrained(out)
    texts = [json.loads(line)["text"] for line in (tmp_path / "s.json").read_text().splitlines()]
    mean = mowmerge.load(out).route(**words(texts, return_tensors="pt")).mean(0)
    given = torch.tensor([c for gate in result.report["gates"].values() for c in gate])
    assert torch.allclose(given, mean, atol=1e-6)
    held, ours, stored = dynamic.held(out), load(result.path), load(out)
    assert held.manifest.codes
    for code in held.manifest.codes:
        parts = {part: stored[code.part_name(part)] for part in code.parts}
        shares = torch.tensor([result.report["gates"][code.gate]])
        shares = shares - held.manifest.gates[code.gate].offset
        expected = codecs.mixed(code, parts, stored[code.name], shares)[0]
        assert torch.allclose(ours["bert." + code.name], expected, atol=1e-6)
    reload(KINDS["bert"], result.path)


def test_an_untrained_router_is_told(tmp_path: Path) -> None:
    out = with_task(tmp_path, "wemoe")
    assert "not trained yet" in api.extract(out, tmp_path / "x", task="skies").report["note"]


def test_tasks_that_are_not_there(tmp_path: Path) -> None:
    out = with_task(tmp_path, "wemoe")
    with pytest.raises(CheckpointError, match=r"(?s)no task 'skys'.*did you mean 'skies'"):
        api.extract(out, tmp_path / "x", task="skys")
    (out / "recipe.yaml").unlink()
    (out / "recipe.lock.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)no task 'skies'.*--recipe"):
        api.extract(out, tmp_path / "x", task="skies")
    other = recipe(tmp_path, KINDS["bert"], "wemoe", tasks={"t": {**TASK, "expert": "sky"}})
    with pytest.raises(RecipeError, match="no split for select"):
        api.extract(out, tmp_path / "x", task="t", recipe=other)
    assert not (tmp_path / "x").exists()


# --- what it is compared with


def test_the_reference(berts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = berts / "mow.yaml"
    found = api.extract(berts / "out", berts / "one", expert="sky", recipe=asked).report
    assert found["reference"] == str(berts / "sky")
    assert found["base"] == str(berts / "base")
    assert {line["name"] for line in found["tensors"] if not line["exact"]} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip
    monkeypatch.chdir(berts)  # where the folder's own recipe finds its sources again
    own = api.extract("out", "two", expert="sky").report
    named = api.extract("out", "three", expert="sky", reference="sky").report
    assert own["tensors"] == named["tensors"] == found["tensors"]


def test_without_any_reference_it_says_so(berts: Path) -> None:
    for name in ("base", "sky"):
        (berts / name).rename(berts / f"{name}-gone")
    zoo = Zoo(berts)
    ran = zoo.here("extract", "out", "--expert", "sky", "x")
    assert "not compared: the recipe's own sources are not found from here" in ran.out
    report = json.loads((berts / "x" / "report.json").read_text())
    assert report["reference"] is None
    assert "error" not in report["tensors"][0]
    ran = zoo.here("extract", "out", "--expert", "sky", "y", "--reference", "sky-gone")
    assert "(no base to measure them by)" in ran.out


def test_a_reference_that_does_not_fit(berts: Path) -> None:
    with pytest.raises(CheckpointError, match=r"classifier\.\w+' is \[.*has it as"):
        api.extract(berts / "out", berts / "x", expert="sky", reference=str(berts / "pets"))
    with pytest.raises(SourceError, match="no folder or file"):
        api.extract(berts / "out", berts / "x", expert="sky", reference="./nowhere")
    save_file({"a": torch.ones(2)}, berts / "sky" / "model.safetensors")
    asked = berts / "mow.yaml"
    report = api.extract(berts / "out", berts / "x", expert="sky", recipe=asked).report
    assert "not at all" in report["why_none"]


# --- what is refused


def fails(folder: Path, rc: int, *words: str, args: tuple[str, ...]) -> None:
    """Runs, and asserts exit code and words; nothing is written, no traceback."""
    ran = Zoo(folder).here("extract", *args)
    assert ran.rc == rc, ran.err
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.err
    assert not (folder / "x").exists()
    assert left(folder) == []


def test_bad_input(berts: Path) -> None:
    sky = ("--expert", "sky", "x")
    fails(
        berts, 4, "no expert 'skye'", "did you mean 'sky'?", args=("out", "--expert", "skye", "x")
    )
    fails(berts, 4, "no dynamic checkpoint", args=("sky", *sky))
    fails(berts, 5, "there is no folder 'nowhere'", args=("nowhere", *sky))
    fails(berts, 2, "name one of them", args=("out", "x"))
    fails(berts, 2, "name one of them", args=("out", *sky, "--task", "sky"))
    fails(berts, 6, "is not empty", "--force", args=("out", "--expert", "sky", "base"))
    fails(berts, 6, "holds one of the inputs", args=("out", "--expert", "sky", "out", "--force"))


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    held = json.loads((folder / "config.json").read_text())
    edit(held["mowmerge"])
    (folder / "config.json").write_text(json.dumps(held))


def test_a_damaged_checkpoint(berts: Path) -> None:
    sky, out = ("out", "--expert", "sky", "x"), berts / "out"
    shard = next(out.glob("dynamic-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    fails(berts, 4, shard.name, "the file is truncated", args=sky)
    shard.write_bytes(content)
    router = out / "router.safetensors"
    content = router.read_bytes()
    save_file(load_file(router), router, {"experts": '["x", "y"]'})
    fails(berts, 4, "the router file is from other experts: x, y, and this", args=sky)
    router.write_bytes(content)
    change(out, lambda m: m["tensors"][0].update(shape=[17]))
    fails(berts, 4, "is [16], and config.json says [17]", args=sky)
    change(out, lambda m: m["tensors"][0].update(shape=[16], name="encoder.lost"))
    fails(berts, 4, "tensor 'encoder.lost' is not there", args=sky)
    change(out, lambda m: m.update(format=FORMAT + 1))
    fails(berts, 4, f"has format {FORMAT + 1}", "upgrade mowmerge", args=sky)
    change(out, lambda m: m.clear())
    fails(berts, 4, "config.json", args=sky)


def test_a_full_disk_leaves_nothing(berts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = writer.write_at, iter(range(99))

    def full(fd: int, data: memoryview, offset: int) -> None:
        if next(count) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, data, offset)

    monkeypatch.setattr(writer, "write_at", full)
    with pytest.raises(ResourceError, match="free some space"):
        api.extract(berts / "out", berts / "x", expert="sky")
    assert not (berts / "x").exists()
    assert left(berts) == []


KILLED = """
import os, signal
from mowmerge import api
from mowmerge.checkpoint import sidecars
sidecars.copy = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
api.extract("out", "x", expert="sky")
"""


def test_a_kill_leaves_nothing_and_the_next_run_is_whole(berts: Path) -> None:
    zoo = Zoo(berts)
    assert zoo.python(KILLED).rc == -9
    assert not (berts / "x").exists()
    api.extract(berts / "out", berts / "x", expert="sky")
    assert left(berts) == []
    reload(KINDS["bert"], berts / "x")


def test_force_replaces_and_json_is_one_object(berts: Path) -> None:
    zoo = Zoo(berts)
    assert zoo.here("extract", "out", "--expert", "pets", "x", "-q").out == ""
    ran = zoo.here("extract", "out", "--expert", "sky", "x", "--force", "--json")
    told = json.loads(ran.out)
    assert (told["expert"], told["path"], "tensors" in told) == ("sky", str(berts / "x"), False)
    assert reload(KINDS["bert"], berts / "x").config.num_labels == 2


# --- mixing as it is read


SHAPE = (7, 5, 2)


def coded() -> Iterator[tuple[str, int, dict[str, Tensor], Tensor]]:
    """Each codec with parts of its own for two slots of a tensor [7,5,2], and its anchor."""
    draws = torch.Generator().manual_seed(0)
    deltas = torch.randn(2, *SHAPE, generator=draws)
    deltas[:, 3] = 0
    anchor = torch.randn(SHAPE, generator=draws)
    yield "full", 0, {"delta": deltas}, anchor
    yield "full_abs", 0, {"abs": deltas}, anchor
    yield "low_rank", 3, codecs.low_rank(truncated(deltas.flatten(2), 3)[0]), anchor
    largest = ops.marked(deltas, ops.largest(deltas, 11), 0)
    yield "sparse", 11, codecs.sparse(deltas, largest), anchor
    rows = codecs.row_sparse(deltas.flatten(2))
    yield "row_sparse", len(rows["rowidx"]), rows, anchor
    yield "one_bit", 0, codecs.one_bit(deltas, torch.tensor([0.3, 2.0])), anchor
    yield "mask", 0, codecs.mask(deltas[0], deltas > 0, torch.tensor([0.3, 2.0])), anchor


@pytest.mark.parametrize("shares", [[0.0, 1.0], [0.25, 0.5], [0.0, 0.0]])
@pytest.mark.parametrize("chunk", [1, 3, 9, 10, 23, 70])
def test_every_codec_mixes_as_the_runtime_does_in_any_pieces(
    tmp_path: Path, shares: list[float], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, codes, expected = {}, [], {}
    for codec, size, parts, anchor in coded():
        rank, kept = (size, 0) if codec == "low_rank" else (0, size)
        code = Code(f"{codec}.weight", SHAPE, codec, 2, "g", rank=rank, kept=kept)
        codes.append(code)
        tensors[code.name] = anchor.clone()
        tensors |= {
            code.part_name(name): value.contiguous().clone() for name, value in parts.items()
        }
        c = torch.tensor([shares]).double() - 0.1 * (codec != "full_abs")
        expected[code.name] = codecs.mixed(code, parts, anchor.double(), c)[0]
    save_file(tensors, tmp_path / "model.safetensors")
    gates = {"g": Gate("task", offset=0.1), "h": Gate("task")}
    codes = [c if c.codec != "full_abs" else Code(c.name, c.shape, c.codec, 2, "h") for c in codes]
    manifest = Manifest("emr", ("a", "b"), tuple(codes), gates)
    config = {"model_type": "mowmerge", "base_config": {}, "mowmerge": manifest.to_json()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reader = DenseReader(dynamic.held(tmp_path), {"g": shares, "h": shares})
    monkeypatch.setattr(heads, "CHUNK", chunk)
    assert set(reader.specs) == set(expected)
    for name, value in expected.items():
        data = b"".join(bytes(piece) for _, piece in heads.pieces(reader, name))
        got = torch.frombuffer(bytearray(data), dtype=torch.float32).view(SHAPE)
        assert torch.allclose(got, value.float(), rtol=1e-6, atol=1e-6), name
        if "full_abs" in name and shares == [0.0, 1.0]:
            assert torch.equal(got, tensors["full_abs.dyn_abs"][1])


def test_one_hot_spreads_over_an_experts_own_slots() -> None:
    codes = (Code("a", (4, 4), "low_rank", 6, "g", rank=1),)
    manifest = Manifest("rank_one_moe", ("x", "y"), codes, {"g": Gate("block")})
    assert one_hot(manifest, 1) == {"g": [0, 0, 0, 1, 1, 1]}


def test_a_manifest_without_the_heads_names_is_refused(berts: Path) -> None:
    change(berts / "out", lambda m: [head.pop("module") for head in m["heads"]])
    with pytest.raises(CheckpointError, match="what the heads are called"):
        api.extract(berts / "out", berts / "x", expert="sky")


def test_heads_survive_json() -> None:
    head = Head("a", {}, "classifier", "bert.", ("pooler.weight",))
    codes = (Code("w", (2,), "full", 1, "g"),)
    manifest = Manifest("emr", ("a",), codes, {"g": Gate("task")}, heads=(head,))
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_only_what_is_mixed_is_read(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(1000, 100), "w.dyn_delta": torch.ones(2, 1000, 100)}
    save_file(tensors, tmp_path / "model.safetensors")
    code = Code("w", (1000, 100), "full", 2, "g")
    manifest = Manifest("wemoe", ("a", "b"), (code,), {"g": Gate("task")})
    config = {"model_type": "mowmerge", "base_config": {}, "mowmerge": manifest.to_json()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    handle: Any = DenseReader(dynamic.held(tmp_path), {"g": [0.0, 1.0]}).open("w")
    read, inner, out = [], handle._read, memoryview(bytearray(4000))
    handle._read = lambda part, start, stop: read.append(stop - start) or inner(part, start, stop)
    handle.read(50_050, 51_050, out)
    assert torch.frombuffer(out, dtype=torch.float32).tolist() == [1.0] * 1000
    handle.close()
    assert read == [1100, 1100]  # eleven rows of the anchor, and of one slot
