"""The transformers classes of a dynamic checkpoint: the base's own class, with mixing modules in it.

A folder's config says `model_type: mowmerge` and holds the base's config whole; the class is made
from the base's at load time, so names, generation and device maps are the base's. `import
mowmerge.hf` registers it; these files also lie in every dynamic checkpoint, as its remote code.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    extract_weight_conversions_for_model,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import ModelOutput

from .format import HEADS, ROUTER, Manifest
from .layers import Context, MixedEmbedding, MixedLinear, install
from .routers import RouterModule

FILES = ("format.py", "codecs.py", "routers.py", "layers.py", "modeling.py")
AUTO = (
    "Model", "ForCausalLM", "ForSequenceClassification", "ForImageClassification",
    "ForSeq2SeqLM", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM",
)  # fmt: skip
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
    def manifest(self) -> Manifest:
        """The manifest, checked."""
        return Manifest.from_json(self.mowmerge)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """Itself for a flat base; else the base's answer."""
        found = self._base.get_text_config(*args, **kwargs) if self.base_config else self
        return self if self.base_config and found is self._base else found

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: not the base's object, which `base_config` describes."""
        held = super().to_dict()
        for name in ("_base", *_OWN):
            held.pop(name, None)
        return held


class _Reached(Exception):
    """Ends a pass of which only the first layers were wanted."""


class MowMixin:
    """What every dynamic class adds to the base's: mixing modules, routers, heads, gates.

    `forward` takes, beside what the base's takes: gates [B,G], the coefficients of all gates side
    by side as `route` returns them; task_ids [B], one expert a sample (its number, for all gates);
    routing_mask [B,T], the tokens that the routers may see (the prompt's); head_ids [B], the expert
    whose head answers for each sample, the gates left free. The output also carries `gates` and,
    where there are heads or a classifier, `task`.
    """

    config: MowmergeConfig
    _keys_to_ignore_on_load_unexpected = [rf"^{HEADS}\."]
    _manifest: Manifest

    def __init__(self, config: MowmergeConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        manifest = self._manifest = config.manifest
        slots = {name: manifest.slots(name) for name in manifest.gates}
        made = {name: RouterModule(r) for name, r in manifest.routers.items()}
        self.mow_router = nn.ModuleDict(made)
        self._context = Context(manifest.gates, slots, dict(made))
        install(self, manifest, self._context, _locator(self))
        self._tie()
        if manifest.heads and type(self).__name__.endswith(manifest.head_class):
            self._add_heads()
        self.post_init()
        freeze(self)

    def _tie(self) -> None:
        """What is tied to a mixed embedding is mixed with it."""
        ties = self.get_expanded_tied_weights_keys(all_submodels=True)
        for target, source in ties.items():
            path, _, leaf = target.rpartition(".")
            owner = self.get_submodule(source.rpartition(".")[0])
            inner = self.get_submodule(path)
            if leaf == "weight" and isinstance(owner, MixedEmbedding):
                kind = MixedLinear if isinstance(inner, nn.Linear) else MixedEmbedding
                parent, _, name = path.rpartition(".")
                made = kind(inner, {}, self._context, owner=owner)
                setattr(self.get_submodule(parent), name, made)

    def _add_heads(self) -> None:
        """One module a task in the place of the base's head."""
        made, place = [], ""
        for head in self._manifest.heads:
            with torch.device("meta"):
                whole = type(self).__mro__[2](AutoConfig.for_model(**head.config))
            place = _head_name(whole)
            made.append(getattr(whole, place).to_empty(device=torch.empty(0).device))
        self.mow_heads = nn.ModuleList(made)
        setattr(self, place, Heads(self.mow_heads, self._context))

    def route(self, *args: Any, **inputs: Any) -> Tensor:
        """The coefficients of all gates side by side for these inputs, [B,G], as `gates` takes."""
        with torch.no_grad():
            self(*args, **inputs)
        raw = self._context.raw
        return torch.cat([raw[name] for name in self._manifest.routed], 1)

    def features(self, layer: int, *args: Any, **inputs: Any) -> Tensor:
        """The anchor's hidden states [B,T,d] after `layer` layers; 0: its last ones."""
        found: list[Tensor] = []

        def keep(module: nn.Module, given: Any, result: Any) -> None:
            first = result if isinstance(result, Tensor) else result[0]
            found.append(first.detach())
            raise _Reached

        backbone = self.base_model
        where = backbone if not layer else layer_stack(backbone)[layer - 1]
        if where is self:  # the class is itself the backbone: its own forward is this one
            with torch.no_grad():
                result = self._plain_forward(*args, **inputs)
            return (result if isinstance(result, Tensor) else result[0]).detach()
        hook = where.register_forward_hook(keep)
        try:
            with torch.no_grad():
                self._plain_forward(*args, **inputs)
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0]

    def _plain_forward(self, *args: Any, **inputs: Any) -> Any:
        return super().forward(*args, **inputs)  # type: ignore[misc]

    def _set_gates(
        self, args: Any, inputs: Mapping[str, Any], gates: Tensor | None,
        task_ids: Tensor | None, routing_mask: Tensor | None, head_ids: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Begins a pass: how many samples, which tokens count, and the gates that are known."""
        manifest, context = self._manifest, self._context
        batch = _batch(args, inputs)
        named = (routing_mask,) if routing_mask is not None else (
            inputs.get("attention_mask"), inputs.get("decoder_attention_mask"))  # fmt: skip
        masks = [m for m in named if isinstance(m, Tensor) and m.dim() == 2]
        if gates is None and task_ids is None:
            chosen = self._classified(args, inputs, batch, masks)
        context.begin(batch, masks)
        context.heads = head_ids
        n = len(manifest.experts)
        if task_ids is not None:
            one = nn.functional.one_hot(task_ids.long(), n).float()
            context.forced = one
            for name in manifest.gates:
                context.set(name, one.repeat_interleave(context.slots[name] // n, 1))
        elif gates is not None:
            sizes = [context.slots[name] for name in manifest.routed]
            if gates.shape != (batch, sum(sizes)):
                raise ValueError(f"gates must be [{batch}, {sum(sizes)}], not {list(gates.shape)}")
            for name, c in zip(manifest.routed, gates.split(sizes, 1), strict=True):
                context.set(name, c)
        else:
            for name, c in chosen.items():
                context.set(name, c)

    def _classified(
        self, args: Any, inputs: Mapping[str, Any], batch: int, masks: list[Tensor]
    ) -> dict[str, Tensor]:
        """The coefficients of the gates of scope sample, from the anchor's own features."""
        found: dict[str, Tensor] = {}
        for name, gate in self._manifest.gates.items():
            if gate.scope == "task":
                raise ValueError(
                    "this checkpoint has no router for its experts: pass task_ids (the number of"
                    f" an expert for each sample: {', '.join(self._manifest.experts)}) or gates"
                )
            if gate.scope == "sample":
                found[name] = self.classify(gate.router, args, inputs, batch, masks)[1]
        return found

    def classify(
        self, router: str, args: Any, inputs: Mapping[str, Any], batch: int, masks: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A classifier's raw outputs and coefficients, each [B,S]."""
        module = self.mow_router[router]
        self._context.begin(batch, masks, active=False)
        tokens = self.features(module.router.layer, *args, **inputs)
        valid = next((m for m in masks if m.shape == tokens.shape[:2]), None)
        raw = module(tokens, valid)
        return raw, module.coefficients(raw)

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The base's, with gates taken from the prompt once and kept through decoding."""
        routed = kwargs.get("gates") is None and kwargs.get("task_ids") is None
        if routed and self._manifest.routed:
            prompt = {
                name: kwargs[name]
                for name in ("input_ids", "attention_mask", "inputs_embeds", "pixel_values")
                if kwargs.get(name) is not None
            }
            if inputs is not None:
                prompt["input_ids"] = inputs
            if self.config.is_encoder_decoder:
                first = next(iter(prompt.values()))
                start = self.generation_config.decoder_start_token_id
                start = self.config.decoder_start_token_id if start is None else start
                prompt["decoder_input_ids"] = torch.full(
                    (len(first), 1), start, device=first.device
                )
            kwargs["gates"] = self.route(**prompt)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, folder: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes weights, config and the files of remote code; refuses a merged folder.

        The layout is one of transformers' own, which loads as well: anchor, codes and routers
        together.
        """
        if (Path(folder) / "router.safetensors").exists():
            raise ValueError(f"{folder} is a merged checkpoint: save into another folder")
        super().save_pretrained(folder, *args, **kwargs)  # type: ignore[misc]
        bundle(Path(folder))


class Heads(nn.Module):
    """The heads of all tasks: each sample's logits from its own, padded with -inf to the widest."""

    def __init__(self, heads: nn.ModuleList, context: Context) -> None:
        super().__init__()
        self._heads, self.context = (heads,), context  # registered once, as mow_heads

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """[B,...,d] -> [B,...,widest]."""
        logits = [head(x, *args) for head in self._heads[0]]
        widest = max(one.shape[-1] for one in logits)
        padded = [
            nn.functional.pad(one, (0, widest - one.shape[-1]), value=float("-inf"))
            for one in logits
        ]
        together = torch.stack(padded, 1)
        return together[torch.arange(len(x), device=x.device), self.context.choice(len(logits))]


def freeze(model: nn.Module) -> None:
    """Lets only the routers learn."""
    for name, parameter in model.named_parameters():
        trains = name.startswith(f"{ROUTER}.") and not name.endswith("temperature")
        parameter.requires_grad_(trains and parameter.is_floating_point())


def layer_stack(backbone: nn.Module) -> nn.ModuleList:
    """The first list of layers of a backbone: the encoder's where it has two."""
    lists = (m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m))
    return next(m for m in lists if len({type(layer) for layer in m}) == 1 or len(m) > 1)


def _batch(args: Any, inputs: Mapping[str, Any]) -> int:
    """How many samples there are, from the first tensor given."""
    for value in (*args, *inputs.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return len(value)
        if isinstance(value, tuple | list | Mapping) and hasattr(value, "last_hidden_state"):
            return len(value.last_hidden_state)
    raise ValueError("a dynamic model needs a batch of inputs: [B, ...]")


def _head_name(model: nn.Module) -> str:
    """The module that a class has beside its backbone: its head."""
    inside = model.base_model_prefix
    names = [
        n for n, m in model.named_children() if n != inside and any(True for _ in m.parameters())
    ]
    if len(names) != 1:
        raise ValueError(f"{type(model).__name__} has no single head: {', '.join(names)}")
    return names[0]


def _locator(model: Any) -> Any:
    """Maps a tensor's name on disk to its name in the model."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    held = model.state_dict()

    def located(name: str) -> str:
        found, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
        if fused is not None or found not in held:
            raise ValueError(f"'{name}' is not a tensor of {type(model).__name__} of its own")
        return str(found)

    return located


_classes: dict[type, type] = {}


def dynamic_class(base: type) -> type:
    """The base's class with mixing modules; one for each base."""
    if base not in _classes:
        name = f"Mowmerge{base.__name__}"
        made = type(name, (MowMixin, base), {"config_class": MowmergeConfig})
        made.forward = _forward(base)
        made.__module__ = __name__
        _classes[base] = made
    return _classes[base]


def _forward(base: type) -> Any:
    """A forward with the base's own signature and ours behind it, as `generate` inspects it."""

    def forward(
        self: Any, *args: Any, gates: Tensor | None = None, task_ids: Tensor | None = None,
        routing_mask: Tensor | None = None, head_ids: Tensor | None = None, **inputs: Any,
    ) -> Any:  # fmt: skip
        self._set_gates(args, inputs, gates, task_ids, routing_mask, head_ids)
        try:
            result = self._plain_forward(*args, **inputs)
        finally:
            self._context.active = False
        if isinstance(result, ModelOutput) and self._context.raw:
            result["gates"] = torch.cat(list(self._context.raw.values()), 1)
            if self._context.chosen is not None:
                result["task"] = self._context.chosen
        return result

    own = inspect.signature(base.forward)
    ours = inspect.signature(forward).parameters
    extra = [ours[n] for n in ("gates", "task_ids", "routing_mask", "head_ids")]
    given = list(own.parameters.values())
    tail = [p for p in given if p.kind is p.VAR_KEYWORD]
    forward.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*(p for p in given if p not in tail), *extra, *tail]
    )
    return forward


class _Front(PreTrainedModel):
    """What an Auto class finds for the config; loads the class made from the base's."""

    config_class = MowmergeConfig
    auto = "AutoModel"

    @classmethod
    def _made(cls, config: MowmergeConfig) -> Any:
        known = getattr(transformers, cls.auto)._model_mapping
        base = known.get(type(config._base), None)
        if base is None:
            raise ValueError(f"{cls.auto} knows no class for {type(config._base).__name__}")
        return dynamic_class(base[0] if isinstance(base, tuple | list) else base)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The dynamic model in a folder; ValueError where a key is missing or unexpected."""
        told = kwargs.pop("output_loading_info", False)
        kwargs.pop("trust_remote_code", None)
        if config is None:
            config = MowmergeConfig.from_pretrained(folder)
        model, info = load(cls._made(config), folder, config, *args, **kwargs)
        return (model, info) if told else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._made(config)._from_config(config, **kwargs)


def load(made: Any, folder: Any, config: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A model of that dynamic class in eval mode, and transformers' loading info.

    Raises:
        ValueError: a key that is missing, unexpected or of another shape.
    """
    _keep_conversions(made, config)
    model, info = made.from_pretrained(
        folder, *args, config=config, output_loading_info=True, **kwargs
    )
    wrong = {k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys") if info[k]}
    if wrong:
        listed = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in wrong.items())
        raise ValueError(f"{folder} does not load as {made.__name__}: {listed}")
    freeze(model)
    return model.eval(), info


def _keep_conversions(made: Any, config: MowmergeConfig) -> None:
    """Registers the base's own conversion of names for the class made from it."""
    with torch.device("meta"):
        native = made.__mro__[2](config._base)
    found = extract_weight_conversions_for_model(native)
    if found:
        register_checkpoint_conversion_mapping(made.__name__, found, overwrite=True)


def _front(kind: str) -> type:
    made = type(f"Mowmerge{kind}", (_Front,), {"auto": f"Auto{_auto_name(kind)}"})
    made.__module__ = __name__
    return made


def _auto_name(kind: str) -> str:
    return {"Model": "Model"}.get(kind, f"ModelFor{kind.removeprefix('For')}")


FRONTS = {kind: _front(kind) for kind in AUTO}
globals().update({front.__name__: front for front in FRONTS.values()})


def register() -> None:
    """Makes transformers' Auto classes know the dynamic model type."""
    AutoConfig.register(MowmergeConfig.model_type, MowmergeConfig, exist_ok=True)
    for kind, front in FRONTS.items():
        auto = getattr(transformers, f"Auto{_auto_name(kind)}")
        auto.register(MowmergeConfig, front, exist_ok=True)


def auto_map() -> dict[str, str]:
    """What config.json says to those who load without mowmerge, with trust_remote_code."""
    fronts = {f"Auto{_auto_name(k)}": f"modeling.Mowmerge{k}" for k in AUTO}
    return {"AutoConfig": "modeling.MowmergeConfig", **fronts}


def bundle(folder: Path) -> None:
    """Copies the files of remote code into a checkpoint."""
    for name in FILES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
