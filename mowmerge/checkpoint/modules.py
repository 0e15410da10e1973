"""The modules that a checkpoint's tensors belong to: their names in memory, and their kinds.

transformers has other names in memory for some architectures than on disk, and adapters use those.
Where it does not know the architecture, or is not installed, names on disk serve, and kinds are
told by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mowmerge.checkpoint import naming
from mowmerge.tensors import TensorSpec

Kind = Literal["linear", "conv1d", "embedding", "conv", "experts", "other"]
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LEAVES = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class Modules:
    """Tensors by their names in memory; the kind of each module that is known; ties, by the name
    of the tensor that is the other's.

    `experts` are the parameters that stack one matrix for each expert, in the order in which their
    modules declare them, and whether they are stored [in, out]; `fused` the tensors on disk that
    are only parts of one in memory.
    """

    names: Mapping[str, TensorSpec]
    kinds: Mapping[str, Kind]
    model_types: Collection[str] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, bool] = field(default_factory=dict)
    fused: Collection[str] = ()

    def kind(self, name: str) -> Kind:
        """What the module is that has this tensor (by its name in memory) as its weight."""
        module, _, leaf = name.rpartition(".")
        spec = self.names[name]
        if name in self.experts and spec.kind == "float":
            return "experts"
        if leaf != "weight" or spec.kind != "float":
            return "other"
        if self.kinds:
            return self.kinds.get(module, "other")
        if len(spec.shape) != 2:
            return "conv" if len(spec.shape) == 4 else "other"
        if naming.role(name) == "embedding":
            return "embedding"
        return "conv1d" if is_conv1d(module, self.model_types) else "linear"


def model_types(config: Mapping[str, Any]) -> set[str]:
    """The model types that a config.json names: the model's, and the language model's in it."""
    inner = config.get("text_config") or {}
    return {str(c.get("model_type")) for c in (config, inner) if isinstance(c, Mapping)}


def is_conv1d(module: str, model_types: Collection[str]) -> bool:
    """Whether a module stores its weight [in, out], as GPT-2's do."""
    return bool(set(model_types) & set(_CONV1D)) and module.rpartition(".")[2] in _CONV1D_LEAVES


def of(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Modules:
    """The modules of a checkpoint; takes seconds, since it asks transformers for the architecture.

    Tensors that transformers takes apart or joins as it loads them keep their names on disk.
    """
    types = {str(config.get("model_type"))}
    try:
        import torch
        import transformers
        from transformers import core_model_loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        settings = dict(config)
        built = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            model = getattr(transformers, str(config["architectures"][0]))(built)
        changes = get_model_conversion_mapping(model)
        simple = [c for c in changes if isinstance(c, core_model_loading.WeightRenaming)]
        held, prefix = model.state_dict(), model.base_model_prefix
        others = [c for c in changes if not isinstance(c, core_model_loading.WeightRenaming)]
        rename = core_model_loading.rename_source_key
        renamed = {rename(name, simple, [], prefix, held)[0]: spec for name, spec in specs.items()}
        fused = {name for name in specs if rename(name, simple, others, prefix, held)[1]}
        kinds = {name: _kind(module) for name, module in model.named_modules()}
        ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    except Exception:  # whatever an unknown architecture, or another transformers, may raise
        return Modules(specs, {}, types)
    names = renamed if len(renamed) == len(specs) else specs
    return Modules(names, kinds, types, ties, _experts(model), fused)


def _experts(model: Any) -> dict[str, bool]:
    """The stacks of experts' matrices, and whether they are stored [in, out]."""
    return {
        f"{path}.{name}": bool(getattr(module, "is_transposed", False))
        for path, module in model.named_modules()
        if getattr(module, "num_experts", 0) > 1
        for name, value in module.named_parameters(recurse=False)
        if value.dim() == 3 and len(value) == module.num_experts
    }


def _kind(module: Any) -> Kind:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for kind, of_kind in (
        ("embedding", nn.Embedding), ("linear", nn.Linear), ("conv", nn.Conv2d), ("conv1d", Conv1D),
    ):  # fmt: skip
        if isinstance(module, of_kind):
            grouped = getattr(module, "groups", 1) > 1
            return "other" if grouped else kind  # type: ignore[return-value]
    return "other"
