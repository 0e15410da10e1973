"""A dynamic checkpoint on disk as its headers describe it; loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mowmerge.checkpoint import naming
from mowmerge.checkpoint.header import metadata
from mowmerge.checkpoint.source import config, find
from mowmerge.dynamic import beside, names
from mowmerge.dynamic.format import ROUTER, FormatError, Manifest
from mowmerge.errors import CheckpointError, SourceError
from mowmerge.plan import Stored
from mowmerge.tensors import TensorSpec

ROUTER_FILE = "router.safetensors"


@dataclass(frozen=True)
class DynamicCheckpoint:
    """What a folder holds: its config and manifest, its files, and each tensor by the name that
    the manifest gives it (`specs[name].name` is the one on disk).

    trained: whether `train-router` wrote the routers; None where the files do not say. encoder:
    what its classifiers look at, where that is not the anchor.
    """

    folder: Path
    config: Mapping[str, Any]
    manifest: Manifest
    stored: Stored
    specs: Mapping[str, TensorSpec]
    trained: bool | None
    encoder: Stored | None = None

    @property
    def anchor(self) -> dict[str, TensorSpec]:
        """The static model's tensors, by name."""
        codes = self.manifest.codes
        parts = {code.part_name(part) for code in codes for part in code.parts}
        ours = (f"{names.HEADS}.", f"{ROUTER}.")
        return {n: s for n, s in self.specs.items() if n not in parts and not n.startswith(ours)}

    def head(self, number: int) -> dict[str, TensorSpec]:
        """The tensors of a head by the names that its expert has for them; empty without heads."""
        prefix = names.head(self.manifest.experts, number)
        return {
            f"{self.manifest.heads[number].module}.{name.removeprefix(prefix)}": spec
            for name, spec in self.specs.items()
            if name.startswith(prefix)
        }


def held(folder: Path) -> DynamicCheckpoint:
    """The dynamic checkpoint in a folder, every tensor that its manifest promises in place.

    Raises:
        SourceError: there is no such folder.
        CheckpointError: it is no dynamic checkpoint, of a newer format, or not whole.
    """
    if not folder.is_dir():
        raise SourceError(f"there is no folder '{folder}'", hint="name a merged folder")
    settings = config(folder)
    if settings.get("model_type") != "mowmerge":
        raise CheckpointError(
            "this is no dynamic checkpoint: it holds one static model, or none",
            where=str(folder),
            hint="`mowmerge methods` lists the dynamic methods, `mowmerge merge` writes one",
        )
    try:
        manifest = Manifest.from_json(settings.get("mowmerge") or {})
    except FormatError as error:
        raise CheckpointError(str(error), where=str(folder / "config.json")) from error
    stored = find(str(folder))
    promised = _promised(manifest)
    specs = _named(stored.specs, promised, manifest)
    for name, shape in promised.items():
        found = specs.get(name)
        if found is None or found.shape != shape:
            what = "not there" if found is None else f"{list(found.shape)}"
            raise CheckpointError(
                f"tensor '{name}' is {what}, and config.json says {list(shape)}",
                where=str(folder),
                hint="config and weights belong to different checkpoints: merge again",
            )
    file = folder / ROUTER_FILE
    told = metadata(file) if file.exists() else {}
    if why := beside.foreign(file, manifest.experts, told):
        raise CheckpointError(
            why, where=str(file), hint="put back the router file of this checkpoint, or merge again"
        )
    trained = told.get("trained") == "true" if file.exists() else None
    encoder = find(str(folder / "encoder")) if manifest.encoder else None
    return DynamicCheckpoint(folder, settings, manifest, stored, specs, trained, encoder)


def _named(
    held: Mapping[str, TensorSpec], promised: Collection[str], manifest: Manifest
) -> dict[str, TensorSpec]:
    """The tensors by the manifest's names: up to format 4 some parts and heads had others, and a
    bare backbone has no class prefix."""
    today = {
        names.part_in_memory(code.name, part): code.part_name(part)
        for code in manifest.codes
        for part in code.parts
    }
    experts = manifest.experts if manifest.heads else ()
    heads = {names.head_in_memory(i): names.head(experts, i) for i in range(len(experts))}
    found = {}
    for name, spec in naming.aligned(held, {*promised, *today}).items():
        prefix = next((each for each in heads if name.startswith(each)), "")
        now = heads[prefix] + name.removeprefix(prefix) if prefix else today.get(name, name)
        found[now] = spec
    return found


def _promised(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Shape by name of all that the manifest says must be there; heads' shapes it does not say."""
    shapes: dict[str, tuple[int, ...]] = {}
    for code in manifest.codes:
        shapes[code.name] = code.shape
        shapes |= {code.part_name(name): part.shape for name, part in code.parts.items()}
    for name, router in manifest.routers.items():
        shapes |= {f"{ROUTER}.{name}.{key}": part.shape for key, part in router.parts.items()}
    return shapes
