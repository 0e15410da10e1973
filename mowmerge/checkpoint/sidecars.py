"""Everything in an output folder that is not a weight and not ours: config, tokenizer, licences."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.source import SIDECARS, config
from mowmerge.dynamic.format import Manifest
from mowmerge.dynamic.remote import auto_map, front_class
from mowmerge.placement import Vocabulary

_OURS = ("config.json", "report.json", "recipe.yaml", "README.md", "SHA256SUMS", "*.index.json",
         "recipe.lock.yaml", "coefficients.json", "trainer_state.json",
         "*_results.json")  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md")
_OF_A_HEAD = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task")
_CLASS_WITH_HEAD = re.compile(r"(?:For[A-Z]|LMHead|DoubleHeads)\w*$")
_TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "*.jinja", "chat_template.json",
              "additional_chat_templates/*", "generation_config.json")  # fmt: skip
_PLAIN_VOCABULARY = ("added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def copy(
    donor: Path, others: Sequence[tuple[str, Path]], out: Path,
    vocabulary: Vocabulary | None = None,
) -> list[str]:  # fmt: skip
    """Copies the donor's sidecars and every model's licence files; returns what was left behind.

    Another model's licence file is copied under a name of its own where its text differs. With a
    vocabulary the files of the tokenizer are its source's, as it changes them.
    """
    taken = _beside(donor)
    if vocabulary is not None:
        taken = {file for file in taken if not _of_tokenizer(donor, file)}
        _write_tokenizer(vocabulary, out)
    for file in sorted(taken):
        name = file.relative_to(donor).as_posix()
        if not _ours(name):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)
    for model, folder in others:
        for file in sorted(p for pattern in _LICENCES for p in folder.glob(pattern) if p.is_file()):
            held = [p for p in out.glob("*") if p.is_file() and p.suffix not in _WEIGHTS]
            if all(p.read_bytes() != file.read_bytes() for p in held):
                shutil.copyfile(file, out / f"{file.stem}-{model}{file.suffix}")
    rest = {file for file in donor.iterdir() if file.is_file()} - taken
    return sorted(f.name for f in rest if f.suffix not in _WEIGHTS and not f.name.startswith("."))


def carried(donor: Path) -> list[str]:
    """The donor's files, beside its weights, from which the output's are made."""
    names = sorted(file.relative_to(donor).as_posix() for file in _beside(donor))
    return [name for name in names if name == "config.json" or not _ours(name)]


def _beside(donor: Path) -> set[Path]:
    return {file for pattern in SIDECARS for file in donor.glob(pattern) if file.is_file()}


def _ours(name: str) -> bool:
    """Whether a file of that name is written anew."""
    return any(fnmatch(name, pattern) for pattern in _OURS)


def _of_tokenizer(folder: Path, file: Path) -> bool:
    """Whether a file goes with the tokens: a tokenizer's, a chat template, ids to generate with."""
    name = file.relative_to(folder).as_posix()
    return any(fnmatch(name, pattern) for pattern in (*_TOKENIZER, *_PLAIN_VOCABULARY))


def _write_tokenizer(vocabulary: Vocabulary, out: Path) -> None:
    """Writes the files of a vocabulary's tokenizer. Where it has new tokens, older files that list
    tokens without them are left out."""
    folder = Path(vocabulary.folder)
    for pattern in _TOKENIZER if vocabulary.extended else (*_TOKENIZER, *_PLAIN_VOCABULARY):
        for file in folder.glob(pattern):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and name not in vocabulary.files:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, out / name)
    for name, text in vocabulary.files.items():
        (out / name).write_text(text, encoding="utf-8")


def write_config(
    donor: Path, out: Path, dtype: str | None, *, headless: bool = False,
    quantised: Mapping[str, Any] | None = None, planned: Mapping[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:  # fmt: skip
    """Writes the donor's config.json, or the `planned` one, with nothing changed but dtype and
    vocabulary, where those are new.

    `headless` makes it that of the bare backbone: its class, and no label map. `quantised`
    takes the place of what says that the donor was.
    """
    own = config(donor)
    settings = dict(own if planned is None else planned)
    if not settings:
        return
    settings = vocabulary.changed(settings) if vocabulary else settings
    same = settings == own and settings.get("quantization_config") == quantised
    settings.pop("quantization_config", None)
    if quantised:
        settings["quantization_config"] = dict(quantised)
    if dtype is None and not headless and same:
        shutil.copyfile(donor / "config.json", out / "config.json")
        return
    if dtype:
        settings = with_dtype(settings, dtype)
    if headless:
        settings = {k: v for k, v in settings.items() if k not in _OF_A_HEAD}
        if "architectures" in settings:
            named = settings["architectures"] or []
            settings["architectures"] = [_CLASS_WITH_HEAD.sub("Model", name) for name in named]
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")


def with_dtype(settings: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with this dtype, under the key that it has for it."""
    keys = [key for key in ("dtype", "torch_dtype") if key in settings] or ["dtype"]
    return {**settings, **dict.fromkeys(keys, dtype)}


def front(donor: Path, manifest: Manifest) -> str:
    """The class that a dynamic checkpoint's config names."""
    named = (config(donor).get("architectures") or ["Model"])[0]
    return front_class(manifest.head_class or named)


def write_dynamic_config(
    donor: Path, out: Path, dtype: str | None, manifest: Manifest, planned: Mapping[str, Any],
    vocabulary: Vocabulary | None = None,
) -> None:  # fmt: skip
    """Writes the config of a dynamic checkpoint, with that which is `planned` whole in it."""
    base = {k: v for k, v in planned.items() if k != "quantization_config"}
    base = vocabulary.changed(base) if vocabulary else base
    settings = {
        "architectures": [front(donor, manifest)],
        "model_type": "mowmerge",
        "dtype": dtype or base.get("dtype") or base.get("torch_dtype") or "float32",
        "auto_map": auto_map(),
        "base_config": base,
        "mowmerge": manifest.to_json(),
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
