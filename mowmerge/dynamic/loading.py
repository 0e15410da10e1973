"""From names on disk to names in memory, and what is wrong with files that do not load."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel
from transformers.conversion_mapping import (
    extract_weight_conversions_for_model,
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming, rename_source_key

from .beside import foreign
from .configuration import MowmergeConfig
from .format import Manifest


def renamer(model: Any) -> Callable[[str], str]:
    """Maps a tensor's name on disk to what it is called in a model of this class; ValueError for
    what becomes a part of a fused tensor."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    held = model.state_dict()

    def located(name: str) -> str:
        found, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
        if fused is not None:
            raise ValueError(f"'{name}' is only a part of a tensor of {type(model).__name__}")
        return str(found)

    return located


def locator(model: Any) -> Callable[[str], str]:
    """Maps a tensor's name on disk to its name in the model; ValueError if it is not there."""
    renamed, held = renamer(model), model.state_dict()

    def located(name: str) -> str:
        found = renamed(name)
        if found not in held:
            raise ValueError(f"'{name}' is not a tensor of {type(model).__name__} of its own")
        return found

    return located


def keep_conversions(made: Any, base: Any, config: MowmergeConfig) -> None:
    """Registers the base's own conversion of names for the class made from it, and that of the
    names beside the anchor's."""
    with torch.device("meta"):
        native = base(config.base)
    found = extract_weight_conversions_for_model(native)
    ours = [WeightRenaming(disk, memory) for disk, memory in config.manifest.renamed]
    if found or ours or get_checkpoint_conversion_mapping(made.__name__):
        every = [*(found or []), *ours]
        register_checkpoint_conversion_mapping(made.__name__, every, overwrite=True)


def check_routers(folder: Any, manifest: Manifest) -> None:
    """Raises ValueError where a local folder's router file was trained in another one."""
    file = Path(folder) / "router.safetensors"
    if file.is_file():
        with safe_open(file, "pt") as held:
            why = foreign(file, manifest.experts, held.metadata() or {})
        if why:
            raise ValueError(f"{file}: {why}")


def spare(described: Any, names: Iterable[str]) -> set[str]:
    """Of names that a class has no place for, those that the bare model of this config has: what
    a class with a head leaves out, such as ViT's pooler."""
    names = set(map(str, names))
    if not names:
        return names
    try:
        with torch.device("meta"):
            bare = AutoModel.from_config(described)
    except ValueError:  # no bare model of this config is known
        return set()
    held = bare.state_dict()
    return {name for name in names if name.removeprefix(f"{bare.base_model_prefix}.") in held}


def complain(folder: Any, name: str, info: dict[str, Any]) -> None:
    """Raises ValueError where keys were missing or unexpected."""
    wrong = {k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys") if info[k]}
    if wrong:
        listed = "; ".join(
            f"{what.replace('_', ' ')}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
            for what, names in wrong.items()
        )
        raise ValueError(f"{folder} does not load as {name}: {listed}")


def damaged(folder: Any) -> str:
    """The first weights file of a local folder that cannot be opened, empty if all can."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file} is damaged: {error}"
    return ""
