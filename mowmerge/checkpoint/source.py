"""Finds a checkpoint, in a folder or on the Hub, and reads its headers; no tensor is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from mowmerge.checkpoint import fp8
from mowmerge.checkpoint.header import locations, pickle_header, read_header
from mowmerge.errors import CheckpointError, MowmergeError, SourceError, unreadable
from mowmerge.plan import Location, Scale, Stored

SIDECARS = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*",
    "USE_POLICY*", "additional_chat_templates/*", "1_Pooling/*",
)  # fmt: skip
CARD = "README.md"  # read for licence, languages and data; the output has one of its own
WANTED = "give a folder with safetensors files, or a Hub id such as org/name@revision"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?|[\w.-]+@[\w./-]+")
_QUANTISED = re.compile(
    r"\.(?:qweight|qzeros|g_idx|weight_packed|weight_scales?(?:_inv)?|absmax|quant_map|SCB|W_q"
    r"|nested_absmax|quant_state\..*|input_scale)$"
)
_ADAPTER = "adapter_model.safetensors"
Kind = Literal["checkpoint", "adapter", "tokenizer"]


def find(
    origin: str, *, download: bool = True, allow_pickle: bool = False, kind: Kind = "checkpoint"
) -> Stored:
    """The checkpoint at a path, or at `org/name[@revision]` on the Hub or in its cache.

    An adapter is looked for as peft saves it; of a tokenizer the files beside the weights alone.
    With download=False the Hub is asked for headers only. Raises SourceError where there is
    nothing, CheckpointError where what is there cannot be merged.
    """
    if os.path.exists(origin):
        try:
            return _stored(origin, Path(origin), None, allow_pickle, kind)
        except OSError as error:
            if refused := unreadable(error):
                raise SourceError(refused.problems) from error
            raise SourceError(
                f"cannot be read: {error.strerror}", where=str(error.filename or origin),
                hint="check who may read it",
            ) from error  # fmt: skip
    path, at, revision = origin.rpartition("@")
    if at and os.path.exists(path):
        raise SourceError(
            f"'{path}' is a folder, which has no revisions", where=origin,
            hint=f"leave '@{revision}' away",
        )  # fmt: skip
    if is_path(origin):
        near = "; '~' is not expanded here" if origin.startswith("~") else ""
        raise SourceError(f"there is no folder or file '{origin}'{near}", hint=WANTED)
    repo, _, revision = origin.partition("@")
    try:
        return _from_hub(origin, repo, revision or None, download, allow_pickle, kind)
    except MowmergeError:
        raise
    except Exception as error:  # the Hub's own error types vary by version: told apart by name
        raise _hub_error(repo, revision, error) from error


def is_path(origin: str) -> bool:
    """Whether it can be nothing on the Hub."""
    return origin.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(origin)


def _from_hub(
    origin: str, repo: str, revision: str | None, download: bool, allow_pickle: bool, kind: Kind
) -> Stored:
    from huggingface_hub import snapshot_download

    beside = [*SIDECARS, CARD]
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=beside))
    if kind != "tokenizer":
        _refuse_quantised(origin, folder)
    wanted = _wanted(origin, repo, folder, allow_pickle, kind)
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing and not download and not missing[0].endswith(".bin"):
        return _remote_headers(origin, repo, folder, wanted)
    if missing:
        snapshot_download(repo, revision=folder.name, allow_patterns=missing)
    absent = [name for name in missing if not (folder / name).exists()]
    if absent:
        raise SourceError(
            f"of '{origin}' the Hub cache lacks {absent[0]}", hint=_download_hint(repo, revision)
        )
    return _stored(origin, folder, folder.name, allow_pickle, kind)


def _wanted(origin: str, repo: str, folder: Path, allow_pickle: bool, kind: Kind) -> list[str]:
    """The weight files of a repository, as a folder with all its files would be read."""
    from huggingface_hub import HfApi

    if kind != "checkpoint":
        named = kind == "adapter" and (folder / "adapter_config.json").exists()
        return [_ADAPTER] if named else []
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return sorted(set(_index(indexes[0]).values()))
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    cached = sorted(p.name for p in folder.iterdir())
    try:
        found = HfApi().model_info(repo, revision=folder.name).siblings or []
        listed = [file.rfilename for file in found]
    except Exception:
        if not any(name.endswith((".safetensors", ".bin")) for name in cached):
            raise
        listed = cached
    top = [name for name in listed if "/" not in name]
    if "model.safetensors" in top:
        return ["model.safetensors"]
    files = [name for name in top if name.endswith(".safetensors")]
    pickles = [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    if "adapter_config.json" in top:
        return []  # refused with advice when the folder is read
    if not files and not (pickles and allow_pickle):
        first = next(iter([*pickles, *(n for n in top if n.endswith(".gguf"))]), "")
        raise CheckpointError("no safetensors files here", where=origin, hint=_advice(Path(first)))
    return files or pickles


def _remote_headers(origin: str, repo: str, folder: Path, names: Sequence[str]) -> Stored:
    """Tensor names and shapes by range requests, for a plan that will read nothing."""
    from huggingface_hub import HfApi

    tensors: dict[str, Location] = {}
    for name in names:
        header = HfApi().parse_safetensors_file_metadata(repo, name, revision=folder.name)
        entries = {
            key: {"dtype": str(i.dtype), "shape": i.shape, "data_offsets": list(i.data_offsets)}
            for key, i in header.tensors.items()
        }
        found, _ = locations(folder / name, entries, 0)
        tensors |= {location.spec.name: location for location in found}
    _check_index(origin, folder, tensors)
    tensors, scales = fp8.paired(tensors, config(folder))
    _refuse_packed(origin, tensors.values(), scales)
    return Stored(origin, str(folder), folder.name, tensors, scales=scales)


def _hub_error(repo: str, revision: str, error: Exception) -> SourceError:
    kind, at = type(error).__name__, f" at revision '{revision}'" if revision else ""
    if kind == "GatedRepoError":
        hint = f"ask for access on its page on the Hub ({repo}), then run `hf auth login`"
        return SourceError(f"access to '{repo}' is gated", hint=hint)
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError"):
        hint = "check the spelling; for a private repository run `hf auth login`"
        return SourceError(f"there is no '{repo}'{at} on the Hub, nor such a folder", hint=hint)
    return SourceError(
        f"'{repo}'{at} is neither a folder nor in the Hub cache, and the Hub cannot be reached"
        f" ({kind})",
        hint=_download_hint(repo, revision),
    )


def _download_hint(repo: str, revision: str | None) -> str:
    rev = f" --revision {revision}" if revision else ""
    return f"where there is a network: `hf download {repo}{rev}`, then run this again"


def _stored(
    origin: str, path: Path, revision: str | None, allow_pickle: bool, kind: Kind
) -> Stored:
    folder = path if path.is_dir() else path.parent
    if kind == "tokenizer":
        return Stored(origin, str(folder), revision, {})
    find_files = _adapter_files if kind == "adapter" else _weight_files
    files = find_files(origin, path, allow_pickle)
    _refuse_quantised(origin, folder)
    tensors: dict[str, Location] = {}
    pickled = bool(files) and files[0].suffix in (".bin", ".pt", ".pth")
    for file in files:
        for location in pickle_header(file) if pickled else read_header(file):
            name = location.spec.name
            if name in tensors:
                raise CheckpointError(
                    f"tensor '{name}' is in two files, {Path(tensors[name].file).name} and"
                    f" {file.name}",
                    where=origin,
                    hint="remove the file that does not belong to this checkpoint",
                )
            tensors[name] = location
    if path.is_dir() and kind == "checkpoint":
        _check_index(origin, path, tensors)
    tensors, scales = fp8.paired(tensors, config(folder))
    _refuse_packed(origin, tensors.values(), scales)
    form = "pickle" if pickled else "safetensors"
    return Stored(origin, str(folder), revision, tensors, form, scales)


def _weight_files(origin: str, path: Path, allow_pickle: bool) -> list[Path]:
    if path.is_file():
        if path.suffix == ".safetensors" or (
            allow_pickle and path.suffix in (".bin", ".pt", ".pth")
        ):
            return [path]
        raise CheckpointError(
            f"'{path.name}' is not a safetensors file", where=origin, hint=_advice(path)
        )
    indexes = sorted(path.glob("*.safetensors.index.json"))
    single = path / "model.safetensors"
    if indexes and single.exists():
        raise CheckpointError(
            f"both {single.name} and {indexes[0].name} are there: two sets of weights",
            where=origin,
            hint="remove the one that is stale; loaders disagree on which they take",
        )
    if indexes:
        return [path / name for name in sorted(set(_index(indexes[0]).values()))]
    if single.exists():
        return [single]
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            "this is an adapter (adapter_config.json), not a full checkpoint",
            where=origin,
            hint="name it beside its base, {source: BASE, adapter: THIS}; or merge it into that"
            " first (peft: merge_and_unload, then save_pretrained)",
        )
    files = sorted(path.glob("*.safetensors"))
    pickles = sorted([*path.glob("pytorch_model*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if files or not (pickles and allow_pickle):
        if not files:
            first = next(iter([*pickles, *sorted(path.glob("*.gguf"))]), path)
            raise CheckpointError("no safetensors files here", where=origin, hint=_advice(first))
        return files
    return pickles


def _adapter_files(origin: str, path: Path, allow_pickle: bool) -> list[Path]:
    """An adapter's one weight file."""
    file, pickled = path / _ADAPTER, path / "adapter_model.bin"
    if file.exists() or (pickled.exists() and allow_pickle):
        return [file if file.exists() else pickled]
    named = path.is_dir() and (path / "adapter_config.json").exists()
    raise CheckpointError(
        f"no {_ADAPTER} here" if named else "this is no adapter: adapter_config.json is not there",
        where=origin,
        hint=_advice(pickled) if pickled.exists() else "give a folder that peft saved",
    )


def _advice(path: Path) -> str:
    if path.suffix == ".gguf":
        return "GGUF files are quantised exports: merge the checkpoint they were made from"
    if path.suffix in (".bin", ".pt", ".pth"):
        return "pickled weights are read only with --allow-pickle (weights_only, no code is run)"
    return "give a folder with model.safetensors, or with shards and model.safetensors.index.json"


def _index(file: Path) -> dict[str, str]:
    """The shard of each tensor, by its name in the index's own folder."""
    again = "download it again"
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        found = {str(k): str(v) for k, v in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"the index cannot be read: {error!r}", where=str(file), hint=again
        ) from error
    if not found:
        raise CheckpointError("the index names no tensors", where=str(file), hint=again)
    for shard in set(found.values()):
        if not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise CheckpointError(
                f"the index names '{shard}', which is no safetensors file beside it",
                where=str(file), hint="shards lie in the index's own folder",
            )  # fmt: skip
    return found


def _check_index(origin: str, folder: Path, tensors: dict[str, Location]) -> None:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        absent = [name for name in _index(index) if name not in tensors]
        if absent:
            raise CheckpointError(
                f"the index lists {len(absent)} tensor(s) that no shard has, first '{absent[0]}'",
                where=str(index),
                hint="the index and the shards belong to different saves: download both again",
            )


def config(folder: str | Path) -> dict[str, Any]:
    """The folder's config.json; empty where there is none."""
    file = Path(folder) / "config.json"
    try:
        loaded = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(file)) from error
    return loaded if isinstance(loaded, dict) else {}


def refuse_dynamic(stored: Stored) -> None:
    """CheckpointError where a folder to be merged is a dynamic checkpoint."""
    if config(stored.folder).get("model_type") == "mowmerge":
        raise CheckpointError(
            "this is a dynamic checkpoint, and a merge takes models that are one",
            where=stored.origin,
            hint="merge what it was made from",
        )


def _refuse_quantised(origin: str, folder: Path) -> None:
    settings = config(folder).get("quantization_config")
    if settings and not (isinstance(settings, dict) and fp8.understood(settings)):
        method = (
            settings.get("quant_method", "quantised") if isinstance(settings, dict) else "quantised"
        )
        raise _quantised(origin, f"config.json says it is quantised ({method})")


def _refuse_packed(origin: str, locations: Iterable[Location], scales: Mapping[str, Scale]) -> None:
    left = [location.spec for location in locations if location.spec.name not in scales]
    for spec in left:
        if spec.kind == "packed":
            raise _quantised(origin, f"tensor '{spec.name}' is {spec.dtype} without a scale")
    for spec in left:
        if _QUANTISED.search(spec.name):
            raise _quantised(origin, f"tensor '{spec.name}' belongs to a quantised weight")
        if spec.dtype in ("I8", "U8") and spec.name.endswith((".weight", "_blocks")):
            raise _quantised(origin, f"tensor '{spec.name}' is {spec.dtype}")


def _quantised(origin: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"this checkpoint is quantised: {why}; its stored numbers are not weights",
        where=origin,
        hint="merge the bf16 or fp16 checkpoint it was made from, then quantise the result",
    )
