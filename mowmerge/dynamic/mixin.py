"""What a dynamic class adds to the base's: mixing modules, routers, heads, and gates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from .configuration import MowmergeConfig, taken_for_base
from .context import Context, batch_of
from .embedding import MixedEmbedding
from .encoder import LoadedEncoder
from .format import ROUTER
from .heads import Heads, made, width
from .layers import install
from .linear import MixedLinear
from .loading import check_routers, complain, damaged, keep_conversions, locator, spare
from .names import HEADS
from .prefix import layer_stack, states, until
from .remote import auto_map, bundle
from .routers import RouterModule
from .towers import check, methods, of_pictures

_PROMPT = (
    "input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "pixel_values",
    "decoder_input_ids",
)  # fmt: skip


_CACHES = ("cache", "past_key_values")  # a cache of keys and values, as releases call it


class MowMixin(nn.Module):
    """What every dynamic class adds to the base's: mixing modules, routers, heads, gates.

    `forward` takes, beside what the base's takes: gates [B,G], the coefficients of all gates side
    by side as `route` returns them; task_ids [B], one expert a sample (its number, for all gates);
    routing_mask [B,T], the tokens that the routers may see (the prompt's); head_ids [B], the expert
    whose head answers for each sample, the gates left free. The output also carries `gates` and,
    where there are heads, `task`.
    """

    config: MowmergeConfig
    base_class: Any
    base_model: nn.Module
    generation_config: Any = None
    post_init: Callable[[], None]
    get_encoder: Callable[[], nn.Module]
    get_expanded_tied_weights_keys: Callable[..., dict[str, str]]
    _keys_to_ignore_on_load_unexpected = [rf"^{HEADS}\."]

    def __init__(self, config: MowmergeConfig, *args: Any, **kwargs: Any) -> None:
        with taken_for_base(config) as disguise:
            super().__init__(config, *args, **kwargs)
        for module in self.modules():
            if isinstance(getattr(module, "config", None), disguise):
                module.config.__class__ = type(config)
        self._generate_as_base()
        manifest = self._manifest = config.manifest
        located = locator(self)
        slots = {name: manifest.slots(name) for name in manifest.gates}
        routers = {name: RouterModule(router) for name, router in manifest.routers.items()}
        places, seen = [(c.gate, located(c.name)) for c in manifest.codes], of_pictures(self)
        encoder = {gate for gate, name in places if "decoder" not in name.split(".")}
        decoder = set(manifest.gates) - encoder if config.is_encoder_decoder else set[str]()
        pictures = set(manifest.gates) - {g for g, name in places if not name.startswith(seen)}
        self.mow_router = nn.ModuleDict(routers)
        self._encoder: LoadedEncoder | None = None
        sides = frozenset(decoder), frozenset(pictures)
        mixed = any(n.startswith(seen) and manifest.gates[g].scope != "module" for g, n in places)
        self._picture = getattr(config, "image_token_id", None) if mixed else None
        self._context = Context(manifest.gates, slots, dict(routers), *sides, True)
        install(self, manifest, self._context, located)
        self._tie()
        if manifest.heads and self.base_class.__name__ == manifest.head_class:
            self._add_heads()
        self.post_init()
        for router in routers.values():
            router.fresh()
        freeze(self)

    def _generate_as_base(self) -> None:
        """Where no file says how to generate, the base's config does."""
        if self.generation_config is not None:
            self.generation_config = GenerationConfig.from_model_config(self.config.base)

    def _tie(self) -> None:
        """What is tied to a mixed embedding is mixed with it."""
        for target, source in self.get_expanded_tied_weights_keys(all_submodels=True).items():
            path, _, leaf = target.rpartition(".")
            owner = self.get_submodule(source.rpartition(".")[0])
            inner = self.get_submodule(path)
            if leaf == "weight" and isinstance(owner, MixedEmbedding):
                kind = MixedLinear if isinstance(inner, nn.Linear) else MixedEmbedding
                parent, _, name = path.rpartition(".")
                tied = kind(inner, {}, self._context, owner=owner)
                setattr(self.get_submodule(parent), name, tied)

    def _add_heads(self) -> None:
        """One module a task in the place of the base's head."""
        heads = self._manifest.heads
        pairs = [made(self.base_class, head) for head in heads]
        self.mow_heads = nn.ModuleList([module for _, module in pairs])
        setattr(self, pairs[0][0], Heads(self.mow_heads, self._context))
        self.num_labels = self.config.num_labels = max(map(width, heads))

    # --- what routers see

    def route(self, *args: Any, **inputs: Any) -> Tensor:
        """The coefficients of all gates side by side for these inputs, [B,G], as `gates` takes."""
        routed = self._manifest.routed
        with torch.no_grad():
            if all(self._manifest.gates[name].scope == "sample" for name in routed):
                mask = inputs.pop("routing_mask", None)
                self._set_gates(args, inputs, None, None, mask)
                self._context.active = False
            else:
                self(*args, **inputs)
        return self._context.every(routed)

    def features(self, layer: int, *args: Any, **inputs: Any) -> Tensor:
        """The anchor's hidden states [B,T,d] after `layer` layers (of the encoder, where there are
        two stacks); 0: its last ones."""
        top = self.get_encoder() if self.config.is_encoder_decoder else self.base_model
        where = layer_stack(top)[layer - 1] if layer else top
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", *_CACHES)}
        self._context.active = False
        with torch.no_grad():
            if where is self:
                return states(self._plain_forward(*args, **inputs))
            found = until(where, lambda: self._plain_forward(*args, **inputs))
        if found is None:
            raise ValueError("the encoder did not run, so nothing says which experts: pass gates")
        return found

    def classify(
        self, router: str, args: Any, inputs: Mapping[str, Any], batch: int, masks: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A classifier's raw outputs and coefficients, each [B,S]."""
        module = self.mow_router[router]
        assert isinstance(module, RouterModule)
        self._context.begin(batch, masks, active=False)
        raw: Tensor = module(*self.seen(module.router.layer, args, inputs, masks))
        return raw, module.coefficients(raw)

    def seen(
        self, layer: int, args: Any, inputs: Mapping[str, Any], masks: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """What a classifier looks at: tokens [B,T,d], and which of them count [B,T], None if all
        do. They are the encoder's last hidden states where there is one, else the anchor's after
        `layer` layers."""
        if self._manifest.encoder:
            if self._encoder is None:
                raise ValueError("this model has no encoder for its classifier: load a checkpoint")
            return self._encoder.states(args, inputs, next(iter(masks), None))
        tokens = self.features(layer, *args, **inputs)
        return tokens, next((m for m in masks if m.shape == tokens.shape[:2]), None)

    def _classified(
        self, args: Any, inputs: Mapping[str, Any], batch: int, masks: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The coefficients of the gates of scope sample, from the anchor's own features."""
        found: dict[str, Tensor] = {}
        known: dict[str, Tensor] = {}
        for name, gate in self._manifest.gates.items():
            if gate.scope == "task":
                raise ValueError(
                    "this checkpoint has no router for its experts: pass task_ids (the number of"
                    f" an expert for each sample: {', '.join(self._manifest.experts)}) or gates"
                )
            if gate.scope == "sample":
                if gate.router not in known:
                    known[gate.router] = self.classify(gate.router, args, inputs, batch, masks)[1]
                found[name] = known[gate.router]
        return found

    # --- a pass

    def _set_gradient_checkpointing(
        self, *args: Any, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """The base's, so that a layer run again in backward has the gates that it first had.

        Raises:
            ValueError: reentrant checkpoints, through which gates would get no gradient.
        """
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("gates need checkpoints with use_reentrant=False")

        def func(run: Any, *given: Any, **named: Any) -> Any:
            return gradient_checkpointing_func(self._context.again(run), *given, **named)

        super()._set_gradient_checkpointing(*args, gradient_checkpointing_func=func, **kwargs)  # type: ignore[misc]

    def _plain_forward(self, *args: Any, **inputs: Any) -> Any:
        self._context.running = True
        try:
            return super().forward(*args, **inputs)
        finally:
            self._context.running = False

    def _set_gates(
        self, args: Any, inputs: Mapping[str, Any], gates: Tensor | None,
        task_ids: Tensor | None, routing_mask: Tensor | None,
    ) -> None:  # fmt: skip
        """Begins a pass: how many samples, which tokens count, and the gates that are known."""
        manifest, context = self._manifest, self._context
        check(self.base_class, inputs, self._picture)
        batch = batch_of(args, inputs)
        mask = inputs.get("attention_mask") if routing_mask is None else routing_mask
        masks = [mask] if isinstance(mask, Tensor) and mask.dim() == 2 else []
        chosen: dict[str, Tensor] = {}
        if gates is None and task_ids is None:
            caches = [inputs[k] for k in _CACHES if inputs.get(k) is not None]
            if manifest.routed and any(cache.get_seq_length() for cache in caches):
                raise ValueError("a cached prompt has its gates already: pass them as gates")
            chosen = self._classified(args, inputs, batch, masks)
        context.begin(batch, masks, decoder_mask=inputs.get("decoder_attention_mask"))
        if task_ids is not None:
            n = len(manifest.experts)
            context.forced = nn.functional.one_hot(task_ids.long(), n).float()
            for name in manifest.routed:
                hot = context.forced.repeat_interleave(context.slots[name] // n, 1)
                chosen[name] = hot + (1 - hot) * manifest.rest(name)
        elif gates is not None:
            sizes = [context.slots[name] for name in manifest.routed]
            if gates.shape != (batch, sum(sizes)):
                raise ValueError(f"gates must be [{batch}, {sum(sizes)}], not {list(gates.shape)}")
            edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
            for i, name in enumerate(manifest.routed):
                chosen[name] = gates[:, edges[i] : edges[i + 1]]
        for name, c in chosen.items():
            context.set(name, c)

    def _told(self, result: Any) -> Any:
        """The base's output, with gates and tasks beside."""
        context, routed = self._context, self._manifest.routed
        if isinstance(result, dict) and routed:
            result["gates"] = context.every(routed)
        if isinstance(result, dict) and context.chosen is not None:
            result["task"] = context.chosen
        return result

    # --- generation

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The base's, with gates taken from the prompt once and kept through decoding."""
        routed = kwargs.get("gates") is None and kwargs.get("task_ids") is None
        if routed and self._manifest.routed:
            kwargs["gates"] = self.route(**self._prompt(inputs, kwargs))
        hook = None
        if self.config.is_encoder_decoder:  # generate calls the encoder itself, not our forward

            def begin(module: nn.Module, given: Any, named: Mapping[str, Any]) -> None:
                if not self._context.active:
                    self._set_gates(given, named, kwargs.get("gates"), kwargs.get("task_ids"), None)

            hook = self.get_encoder().register_forward_pre_hook(begin, with_kwargs=True)
        try:
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._context.active = False
            if hook is not None:
                hook.remove()

    def _prompt(self, inputs: Tensor | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What the routers see of what `generate` was given: padding masked, positions from the
        mask, and a decoder's first token."""
        prompt = {name: kwargs[name] for name in _PROMPT if kwargs.get(name) is not None}
        if inputs is not None:
            prompt["pixel_values" if inputs.dim() > 2 else "input_ids"] = inputs
        ids, said = prompt.get("input_ids"), self.generation_config
        asked = kwargs.get("generation_config") or said
        pad, ends = kwargs.get("pad_token_id", asked.pad_token_id), asked.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if ids is not None and "attention_mask" not in prompt and pad not in (None, *ends):
            prompt["attention_mask"] = ids.ne(pad).long()
        accepted = inspect.signature(self.base_class.forward).parameters
        if self.config.is_encoder_decoder:
            start = asked.decoder_start_token_id
            start = self.config.decoder_start_token_id if start is None else start
            first = next(iter(prompt.values()))
            fresh = torch.full((len(first), 1), start, device=first.device)
            return {"decoder_input_ids": fresh, **prompt}
        mask = prompt.get("attention_mask")
        if mask is not None and "position_ids" in accepted:
            prompt["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return {**prompt, "use_cache": False} if "use_cache" in accepted else prompt

    # --- files and copies

    def _get_dtype_plan(self, dtype: Any) -> dict[str, Any]:
        """The base's modules that stay fp32 in half precision, but for the parts of their codes."""
        plan = super()._get_dtype_plan(dtype)  # type: ignore[misc]
        return {f"{module}(?!.+dyn_)": kind for module, kind in plan.items()}

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The base's, but it never comes back with random weights.

        Raises:
            ValueError: a damaged file, or a key that is missing, unexpected or of another shape.
        """
        told = kwargs.pop("output_loading_info", False)
        if getattr(config, "model_type", "") != MowmergeConfig.model_type:
            config = MowmergeConfig.from_pretrained(config or folder)
        keep_conversions(cls, cls.base_class, config)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                folder, *args, config=config, output_loading_info=True, **kwargs
            )
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(damaged(folder) or f"{folder} does not load: {error}") from error
        left = set(info["unexpected_keys"])
        complain(folder, cls.__name__, {**info, "unexpected_keys": left - spare(config.base, left)})
        check_routers(folder, config.manifest)
        if config.manifest.encoder:
            model._encoder = LoadedEncoder.load(folder, config.manifest.encoder, kwargs)
        if Path(folder).is_dir() and not (Path(folder) / "generation_config.json").exists():
            model._generate_as_base()
        freeze(model)
        model.eval()
        return (model, info) if told else model

    def save_pretrained(self, folder: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes weights, config and the files of remote code; refuses a merged folder.

        The layout is one of transformers' own, which loads as well: anchor, codes and routers
        together.
        """
        if (Path(folder) / "router.safetensors").exists():
            raise ValueError(f"{folder} is a merged checkpoint: save into another folder")
        self.config.auto_map = auto_map()
        super().save_pretrained(folder, *args, **kwargs)  # type: ignore[misc]
        if self._encoder is not None:
            self._encoder.save(Path(folder))
        bundle(Path(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles name the base's class: this one is made again from it."""
        return _blank, (self.base_class,), self.__dict__


def _blank(base: Any) -> Any:
    """A dynamic model with nothing in it, for copies and pickles to fill."""
    cls = dynamic_class(base)
    return cls.__new__(cls)


def freeze(model: nn.Module) -> None:
    """Lets only the routers learn."""
    for name, parameter in model.named_parameters():
        trains = name.startswith(f"{ROUTER}.") and not name.endswith("temperature")
        parameter.requires_grad_(trains and parameter.is_floating_point())


_classes: dict[Any, Any] = {}


def dynamic_class(base: Any) -> Any:
    """The base's class with mixing modules; one for each base."""
    if base not in _classes:
        held = {"config_class": MowmergeConfig, "base_class": base, "forward": _forward(base),
                **methods(base)}  # fmt: skip
        cls = type(f"Mowmerge{base.__name__}", (MowMixin, base), held)
        cls.__module__ = __name__
        _classes[base] = cls
    return _classes[base]


def _forward(base: Any) -> Any:
    """A forward with the base's own signature and ours behind it, as `generate` inspects it."""

    def forward(
        self: Any, *args: Any, gates: Tensor | None = None, task_ids: Tensor | None = None,
        routing_mask: Tensor | None = None, head_ids: Tensor | None = None, **inputs: Any,
    ) -> Any:  # fmt: skip
        self._set_gates(args, inputs, gates, task_ids, routing_mask)
        self._context.heads = head_ids
        try:
            return self._told(self._plain_forward(*args, **inputs))
        finally:
            self._context.active = False

    own = inspect.signature(base.forward)
    ours = inspect.signature(forward).parameters
    extra = [ours[n] for n in ("gates", "task_ids", "routing_mask", "head_ids")]
    given = list(own.parameters.values())
    tail = [p for p in given if p.kind is p.VAR_KEYWORD]
    forward.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*(p for p in given if p not in tail), *extra, *tail]
    )
    return forward
