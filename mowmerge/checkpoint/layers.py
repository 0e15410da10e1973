"""What a config says of layers, for a stack of layers that was made of slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mowmerge.checkpoint import naming, source
from mowmerge.plan import Plan, Source, Stored

Made = Sequence[tuple[str, int]]  # the model and the layer that each layer was
Path = tuple[str, ...]

COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers",
    "decoder_layers", "num_decoder_layers", "num_encoder_layers",
)  # fmt: skip
ONE_EACH = (  # lists with an entry a layer, where they are as long as there are layers
    "layer_types", "mlp_layer_types", "layers_block_type", "layer_block_type", "block_types",
    "indexer_types", "attention_layers", "attn_type_list", "no_rope_layers", "layer_rope_theta",
    "activation_sparsity_pattern", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "attention_window",
)  # fmt: skip
NUMBERS = (  # lists of the layers that are of a kind
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs",
    "hybrid_layer_ids", "global_attn_indexes", "fullatt_block_indexes", "window_block_indices",
)  # fmt: skip
FIRST = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")  # so many are of a kind
PERIODS = {  # every so manieth is of a kind, and the list that says it better
    "sliding_window_pattern": "layer_types", "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers", "decoder_sparse_step": "", "moe_layer_freq": "",
    "attn_layer_period": "", "expert_layer_period": "", "full_attention_interval": "layer_types",
}  # fmt: skip


def settings(origin: Source) -> Mapping[str, Any]:
    """The config of a source: its checkpoint's, with what a plan changes in it."""
    if isinstance(origin, Plan):
        return changed(settings(origin.sources[origin.donor]), origin.config)
    return source.config(origin.folder) if isinstance(origin, Stored) else settings(origin.model)


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config with changes in it, those of a section in the section."""
    return {**config} | {
        key: changed(config.get(key, {}), value) if isinstance(value, Mapping) else value
        for key, value in changes.items()
    }


def following(
    donor: str, stacks: Mapping[str, Made], sources: Mapping[str, Source]
) -> tuple[dict[str, Any], list[str]]:
    """What changes in the donor's config where stacks of layers are made anew; and what cannot be
    said there, or anywhere for want of a config."""
    found: dict[str, Any] = {}
    lacks = f"{donor} has no config.json, so there will be none: put one there before it is loaded"
    warnings = [] if settings(sources[donor]) else [lacks]
    for stack, made in stacks.items():
        models = dict.fromkeys([donor, *(model for model, _ in made)])
        configs = {model: settings(sources[model]) for model in models}
        depth = naming.layers(sources[donor].specs, stack)
        new, told = changes(stack, depth, made, donor, configs)
        found = changed(found, new)
        warnings += told
    return found, warnings


def changes(
    stack: str, depth: int, made: Made, donor: str, configs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """The same of one stack, in which the donor has `depth` layers."""
    if not configs[donor]:
        return {}, []
    place = _section(configs[donor], stack, depth)
    if place is None:
        name = stack.rstrip(".")
        return {}, [f"config.json has no number of layers that is {depth}, as in {name}: set it"]
    path, counts = place
    sections = {model: _at(config, path) for model, config in configs.items()}
    found: dict[str, Any] = dict.fromkeys(counts, len(made))
    told = []
    for key, value in sections[donor].items():
        if isinstance(value, list) and key in ONE_EACH and len(value) == depth:
            each = list(_each(key, made, sections))
            found[key] = each
            if len(each) < len(made):
                found[key] = value
                told.append(f"config.json: '{key}' has an entry a layer, and not in every model")
        elif isinstance(value, list) and key in NUMBERS:
            found[key] = [o for o, (m, i) in enumerate(made) if i in (sections[m].get(key) or ())]
        elif isinstance(value, int) and key in FIRST:
            kinds = [i < int(sections[m].get(key) or 0) for m, i in made]
            found[key] = sum(kinds)
            if kinds != sorted(kinds, reverse=True):
                told.append(f"config.json: '{key}' is a number of first layers, which now are not")
        elif isinstance(value, int) and value > 1 and key in PERIODS:
            better = sections[donor].get(PERIODS[key])
            if not better and any(o % value != i % value for o, (_, i) in enumerate(made)):
                told.append(f"config.json: '{key}' is {value}, and slices shift that period")
        elif key == "num_kv_shared_layers" and value:
            told.append(f"config.json: '{key}' is a number of last layers, which slices may move")
    for name in reversed(path):
        found = {name: found}
    return found, told


def _each(key: str, made: Made, sections: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    """The entry of every layer whose model has one."""
    for model, layer in made:
        value = sections[model].get(key)
        if isinstance(value, list) and layer < len(value):
            yield value[layer]


def _section(config: Mapping[str, Any], stack: str, depth: int) -> tuple[Path, list[str]] | None:
    """Where a config counts the layers of a stack: the section, and the keys there."""
    seen = any(word in stack for word in ("vision", "visual", "audio"))
    sections: list[Path] = [
        (key,)
        for key, value in config.items()
        if isinstance(value, Mapping)
        and any(word in key for word in ("vision", "visual", "audio")) == seen
    ]
    for path in [*sections, ()] if seen else [(), *sections]:
        keys = [k for k in COUNTS if _at(config, path).get(k) == depth]
        if "decoder" in stack and any("decoder" in key for key in _at(config, path)):
            keys = [key for key in keys if "decoder" in key]
        elif "encoder" in stack:
            keys = [key for key in keys if "decoder" not in key]
        if keys:
            return path, keys
    return None


def _at(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    for key in path:
        config = config.get(key) or {}
    return config
