"""The config of a dynamic checkpoint: the base's own, whole, and the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .format import Manifest

_OWN = (
    "id2label", "label2id", "num_labels", "problem_type", "is_encoder_decoder",
    "chunk_size_feed_forward", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id", "decoder_start_token_id", "vocab_size", "output_hidden_states",
)  # fmt: skip


class MowmergeConfig(PreTrainedConfig):
    """The base's config, whole, and the manifest. Answers every attribute that the base's does."""

    model_type = "mowmerge"

    def __init__(
        self,
        base_config: Mapping[str, Any] | None = None,
        mowmerge: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        base = dict(base_config or {})
        self.base_config, self.mowmerge = base, dict(mowmerge or {})
        if base:
            held = {k: v for k, v in base.items() if k not in ("dtype", "torch_dtype", "auto_map")}
            self._base = AutoConfig.for_model(**held)
            for name in _OWN:
                if hasattr(self._base, name):
                    kwargs.setdefault(name, getattr(self._base, name))
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_base" or "_base" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_base"], name)

    @property
    def base(self) -> Any:
        """The base's config object."""
        return self._base

    @property
    def manifest(self) -> Manifest:
        """The manifest, checked."""
        return Manifest.from_json(self.mowmerge)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """Itself for a flat base; else the base's answer."""
        found = self._base.get_text_config(*args, **kwargs) if self.base_config else self
        return self if self.base_config and found is self._base else found

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: not the base's object, which `base_config` describes."""
        held: dict[str, Any] = super().to_dict()
        for name in ("_base", *_OWN):
            held.pop(name, None)
        return held


@contextmanager
def taken_for_base(config: Any) -> Iterator[type]:
    """Within it, Auto classes take the config, and copies of it, for one of the base's: a backbone
    that a base's class makes so inside itself is the base's own, and not a dynamic one once more.
    Gives the class that copies then have."""
    held = type(config)
    made = type(type(config.base).__name__, (held,), {"__init__": held.__init__})
    config.__class__ = made
    try:
        yield made
    finally:
        config.__class__ = held
