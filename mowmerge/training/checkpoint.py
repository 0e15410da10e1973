"""A dynamic checkpoint as training meets it: its manifest, its router file, its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mowmerge.checkpoint.header import metadata
from mowmerge.checkpoint.source import config, find
from mowmerge.dynamic import beside
from mowmerge.dynamic.format import ROUTER, FormatError, Manifest
from mowmerge.errors import CheckpointError, SourceError
from mowmerge.tasks import heads
from mowmerge.tensors import Tensor, torch
from mowmerge.training import desk

if TYPE_CHECKING:
    from mowmerge.dynamic.routers import RouterModule


def manifest(folder: Path) -> Manifest:
    """The manifest of a dynamic checkpoint whose router file fits it.

    Raises:
        SourceError: there is no folder.
        CheckpointError: it is no dynamic checkpoint, of a newer format, or its router file is
            absent or from other experts.
    """
    if not folder.is_dir():
        raise SourceError(f"there is no folder '{folder}'", hint="name a merged folder")
    held = config(folder)
    if held.get("model_type") != "mowmerge":
        raise CheckpointError(
            "this is no dynamic checkpoint, so it has no routers", where=str(folder),
            hint="merge with a dynamic method first",
        )  # fmt: skip
    try:
        found = Manifest.from_json(held.get("mowmerge") or {})
    except FormatError as error:
        raise CheckpointError(str(error), where=str(folder / "config.json")) from error
    _check(folder / desk.ROUTER, found)
    return found


def _check(file: Path, held: Manifest) -> None:
    """Compares the router file with the manifest, name by name."""
    if not held.routers and not held.fitted:
        return
    if not file.exists():
        raise CheckpointError("there is no router file", where=str(file), hint="merge again")
    stored = find(str(file))
    expected = {
        f"{ROUTER}.{name}.{key}": list(value.shape)
        for name in held.routers
        for key, value in module(held, name, meta=True).state_dict().items()
    } | {code.part_name("factor"): [code.slots] for code in held.codes if code.fitted}
    shapes = {name: list(spec.shape) for name, spec in stored.specs.items()}
    wrong = next((n for n in {**expected, **shapes} if expected.get(n) != shapes.get(n)), None)
    hint = "put back the router file of this checkpoint, or merge again"
    if wrong is not None:
        raise CheckpointError(
            f"the router file is from other experts: '{wrong}' is {shapes.get(wrong, 'absent')} in"
            f" it and {expected.get(wrong, 'unknown')} in config.json",
            where=str(file), hint=hint,
        )  # fmt: skip
    if why := beside.foreign(file, held.experts, metadata(file)):
        raise CheckpointError(why, where=str(file), hint=hint)


def module(held: Manifest, name: str, seed: int = 0, *, meta: bool = False) -> RouterModule:
    """A router as it is before training, its weights drawn by the manifest's seed plus `seed`."""
    from mowmerge.dynamic.routers import RouterModule

    asked = held.routers[name]
    with torch.device("meta" if meta else "cpu"):
        made = RouterModule(replace(asked, seed=asked.seed + seed))
    return made if meta else made.fresh()


def model(folder: Path, held: Manifest, *, bf16: bool) -> Any:
    """The model, frozen but for its routers, in eval mode: fp32, or as stored for bf16 autocast.

    Its class is that of the heads, or the one that the base's config names.

    Raises:
        CheckpointError: it does not load.
        SourceError: transformers is not installed.
    """
    from importlib.util import find_spec

    if not find_spec("transformers"):
        raise SourceError(
            "training needs transformers, which is not installed",
            hint='pip install "mowmerge[train]"',
        )
    return heads.dynamic(folder, dtype="auto" if bf16 else torch.float32)


def factors(model: Any) -> dict[str, Any]:
    """The factors of scales in a model that may be learned, as parameters by name on disk."""
    from mowmerge.dynamic.loading import locator

    located = locator(model)
    return {name: model.get_parameter(located(name)) for name in model._manifest.fitted}


def router_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of router.safetensors, by their names there."""
    routers = {
        f"{ROUTER}.{name}.{key}": value
        for name, made in model.mow_router.items()
        for key, value in made.state_dict().items()
    }
    return routers | factors(model)


def trained(folder: Path) -> bool:
    """Whether the router file says that its routers were trained."""
    file = folder / desk.ROUTER
    return file.exists() and metadata(file).get("trained") == "true"
