"""What transformers finds for a dynamic checkpoint: a class for each Auto class, made at load time.

A folder's config says `model_type: mowmerge` and holds the base's config whole; the class is made
from the base's own, so names, generation and device maps are the base's. `import mowmerge.hf`
registers it; these files also lie in every dynamic checkpoint, as its remote code.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from .configuration import MowmergeConfig
from .mixin import MowMixin, dynamic_class, freeze
from .prefix import layer_stack
from .remote import AUTO, FILES, auto_map, auto_name, bundle

__all__ = [
    "AUTO", "FILES", "FRONTS", "MowMixin", "MowmergeConfig", "auto_map", "bundle", "dynamic_class",
    "freeze", "layer_stack", "load", "register",
]  # fmt: skip


class _Front(PreTrainedModel):
    """What an Auto class finds for the config; loads the class made from the base's."""

    config_class = MowmergeConfig
    auto = "AutoModel"

    @classmethod
    def _made(cls, config: Any) -> Any:
        known = getattr(transformers, cls.auto)._model_mapping
        base = known.get(type(config.base), None)
        if base is None:
            raise ValueError(f"{cls.auto} knows no class for {type(config.base).__name__}")
        return dynamic_class(base[0] if isinstance(base, tuple | list) else base)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The dynamic model in a folder; ValueError where it does not load whole."""
        kwargs.pop("trust_remote_code", None)
        if config is None:
            config = MowmergeConfig.from_pretrained(folder)
        return cls._made(config).from_pretrained(folder, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._made(config)._from_config(config, **kwargs)


def load(made: Any, folder: Any, config: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A model of that dynamic class in eval mode, and transformers' loading info.

    Raises:
        ValueError: a damaged file, or a key that is missing, unexpected or of another shape.
    """
    kwargs["output_loading_info"] = True
    model, info = made.from_pretrained(folder, *args, config=config, **kwargs)
    return model, info


def _front(kind: str) -> type:
    made = type(f"Mowmerge{kind}", (_Front,), {"auto": auto_name(kind)})
    made.__module__ = __name__
    return made


FRONTS = {kind: _front(kind) for kind in AUTO}
globals().update({front.__name__: front for front in FRONTS.values()})


def register() -> None:
    """Makes transformers' Auto classes know the dynamic model type."""
    AutoConfig.register(MowmergeConfig.model_type, MowmergeConfig, exist_ok=True)
    for kind, front in FRONTS.items():
        auto = getattr(transformers, auto_name(kind))
        auto.register(MowmergeConfig, front, exist_ok=True)
