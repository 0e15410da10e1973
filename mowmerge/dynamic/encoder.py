"""The model beside a dynamic one on whose hidden states classifiers look: whole in a folder of its
own, as its makers saved it, with the tokenizers that lead from the base's tokens to its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from .format import Encoder

FOLDER = "encoder"
SPELLER = f"{FOLDER}/base"  # the base's tokenizer, which spells out what is to be read again
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclass
class LoadedEncoder:
    """A frozen encoder with what it needs to read the inputs of the model beside it."""

    described: Encoder
    model: Any
    speller: Any = None
    reader: Any = None

    @classmethod
    def load(cls, folder: Any, described: Encoder, told: Mapping[str, Any]) -> LoadedEncoder:
        """The encoder in a checkpoint's folder, or in its repository.

        Raises:
            ValueError: a damaged file, or a key that is missing, but for those of a pooler, which
                is not asked.
        """
        hub = {name: told[name] for name in _HUB if name in told}
        try:
            model, info = AutoModel.from_pretrained(
                folder, subfolder=FOLDER, output_loading_info=True, **hub
            )
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"the encoder of {folder} does not load: {error}") from error
        if absent := sorted(n for n in info["missing_keys"] if "pooler" not in n):
            raise ValueError(f"the encoder of {folder} lacks {', '.join(absent[:5])}")
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        found = cls(described, model.eval().requires_grad_(False))
        if described.reads == "texts":
            found.speller = AutoTokenizer.from_pretrained(folder, subfolder=SPELLER, **hub)
            found.reader = AutoTokenizer.from_pretrained(folder, subfolder=FOLDER, **hub)
            if found.reader.pad_token is None:
                found.reader.pad_token = found.reader.eos_token
        return found

    def save(self, folder: Path) -> None:
        """Puts it into another checkpoint's folder."""
        self.model.save_pretrained(folder / FOLDER)
        if self.reader is not None:
            self.reader.save_pretrained(folder / FOLDER)
            self.speller.save_pretrained(folder / SPELLER)

    def states(
        self, args: Any, inputs: Mapping[str, Any], mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Its last hidden states [B,T,d] for the inputs of the model beside it, and which of them
        count [B,T], None if all do. `mask` says which tokens of a text it may read."""
        name = "input_ids" if self.described.reads == "texts" else "pixel_values"
        given = inputs.get(name, args[0] if args else None)
        if not isinstance(given, Tensor):
            raise ValueError(f"the encoder reads {name}, and there are none: pass gates")
        if self.model.device != given.device:
            self.model.to(given.device)
        own = self._texts(given, mask) if name == "input_ids" else self._pixels(given)
        with torch.no_grad():
            states: Tensor = self.model(**own).last_hidden_state
        if states.dim() == 4:  # a map of features [B,d,rows,columns]
            states = states.flatten(2).transpose(1, 2)
        return states, own.get("attention_mask")

    def _texts(self, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The tokens that count, spelled out and read again."""
        counted = torch.ones_like(ids) if mask is None else mask
        kept = [row[own.bool()].tolist() for row, own in zip(ids, counted, strict=True)]
        texts = [self.speller.decode(row, skip_special_tokens=True) for row in kept]
        places = getattr(self.model.config, "max_position_embeddings", self.reader.model_max_length)
        found = self.reader(
            texts, padding=True, truncation=True, return_tensors="pt",
            max_length=min(places, self.reader.model_max_length),
        )  # fmt: skip
        return {name: value.to(ids.device) for name, value in found.items()}

    def _pixels(self, x: Tensor) -> dict[str, Tensor]:
        """The picture, normalised and sized as the encoder's own processor would."""
        scale, shift = (
            torch.tensor(each, device=x.device).view(-1, 1, 1)
            for each in (self.described.scale, self.described.shift)
        )
        x = x.float() * scale + shift
        if tuple(x.shape[-2:]) != self.described.size:
            x = nn.functional.interpolate(
                x, self.described.size, mode="bilinear", antialias=True, align_corners=False
            )
        return {"pixel_values": x.to(self.model.dtype)}
