"""Plans what a dynamic method adds to a merge: codes, gates, routers, heads and the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mowmerge import memory
from mowmerge.checkpoint import modules, naming
from mowmerge.checkpoint.encoder import Named
from mowmerge.checkpoint.layout import layout, shard_of
from mowmerge.dynamic import names
from mowmerge.dynamic.format import ROUTER, Code, Gate, Head, Manifest, Router
from mowmerge.errors import RecipeError
from mowmerge.methods import registry
from mowmerge.methods.contracts import Dynamic, MethodError, Routing, Site
from mowmerge.plan import Plan, TensorJob
from mowmerge.recipe.model import Recipe, Rest
from mowmerge.recipe.values import Place, Setting, default_rest, rest_setting
from mowmerge.tensors import TensorSpec

# no layer reads these with one value a sample: attention biases shared by the batch, fused experts
UNMIXABLE = ("relative_attention_bias", ".experts.", "logit_scale", "rotary_emb", "mask_token")


class Upcycling:
    """The recipe's dynamic method, applied to the tensors of the donor; `encoder` is
    what classifiers look at instead of the anchor, `types` are the donor's model types."""

    def __init__(
        self,
        recipe: Recipe,
        specs: Mapping[str, TensorSpec],
        found: Mapping[str, Any] | None,
        encoder: Named | None = None,
        types: Collection[str] = (),
    ) -> None:
        self.encoder, self._types = encoder, types
        self.recipe, self.method, self.found = recipe, registry.get(recipe.method), found
        self.sites: dict[str, Site] = {}
        self.skipped: list[str] = []
        self.why = ""  # the rest is what it is, where the recipe does not say
        stacks = [place for name in specs if (place := naming.stack(name))]
        self._rests: dict[Any, Rest] = {}
        self._layers = {stack: 1 + max(i for s, i in stacks if s == stack) for stack, _ in stacks}
        self._widths = _widths(specs)

    @property
    def dynamic(self) -> Dynamic:
        """What the method says of itself."""
        assert self.method.dynamic is not None
        return self.method.dynamic

    def code(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> Code | None:
        """How the tensor, as it will be stored, is coded; None where it stays static."""
        site = self.sites[spec.name] = self.site(spec)
        if spec.kind != "float" or not spec.shape or not spec.numel:
            return None
        code = self.dynamic.code(site, parameters, self.found)
        if code is not None and any(part in spec.name for part in UNMIXABLE):
            self.skipped.append(spec.name)
            return None
        return code

    def coded(self, job: TensorJob, code: Code, anchor: TensorJob | None) -> TensorJob:
        """The job with its code and the one that makes its anchor."""
        scope = "row" if self.dynamic.by_rows(code) else job.scope
        return replace(job, code=code, anchor=anchor, scope=scope)

    def site(self, spec: TensorSpec) -> Site:
        """The tensor, and where it stands."""
        stack, layer = naming.stack(spec.name) or (None, None)
        width = self._widths.get(stack) or self._widths.get(None, 0)
        module, _, leaf = spec.name.rpartition(".")
        return Site(
            spec.name, spec.shape, spec.dtype, naming.role(spec.name), stack, layer,
            self._layers.get(stack or "", 0), width, len(self.recipe.models),
            leaf == "weight" and modules.is_conv1d(module, self._types),
        )  # fmt: skip

    def rest(self, place: Place, parameters: Mapping[str, Any]) -> Setting:
        """The static method for a tensor: the recipe's `rest`, or the method's own."""

        def default() -> Rest:
            found, self.why = default_rest(self.recipe, parameters)
            key = (found.method, tuple(found.parameters.items()))
            return self._rests.setdefault(key, found)

        return rest_setting(self.recipe, place, default)

    def finish(
        self, plan: Plan, config_of: Callable[[str], Mapping[str, Any]], metadata: Mapping[str, str]
    ) -> Plan:
        """The plan with the manifest and the files of codes, heads and routers."""
        codes = [job.code for job in plan.jobs if job.code]
        if not codes:
            nothing = f"'{self.method.name}' makes no tensor dynamic: this is the static merge"
            return replace(plan, warnings=(*plan.warnings, nothing))
        gates, routers = self._routing(plan, codes)
        heads, head_class, kept = self._heads(plan, config_of)
        manifest = Manifest(
            self.method.name, tuple(self.recipe.models), tuple(codes), gates, routers,
            heads, head_class, self.encoder.reading if self.encoder else None,
        )  # fmt: skip
        parts = [part for job in plan.jobs for part in job.parts] + kept
        fitted = [part for part in parts if part.name in manifest.fitted]
        parts = [part for part in parts if part.name not in manifest.fitted]
        size = self.recipe.output.shard_size
        anchor = layout(list(plan.specs.values()), size, metadata, "model")
        shards = layout(parts, size, metadata, "dynamic")
        params = [
            TensorSpec(f"{ROUTER}.{name}.{part}", p.dtype, p.shape)
            for name, router in routers.items()
            for part, p in router.parts.items()
        ] + fitted
        told = {**metadata, "trained": "false"}
        router = shard_of("router.safetensors", params, told) if params else None
        largest = max((_router_bytes(router) for router in routers.values()), default=0)
        warnings = [*plan.warnings, *(self.found or {}).get("warnings", ())]
        if self.skipped:
            warnings.append(
                f"{len(self.skipped)} tensor(s) cannot differ from sample to sample and stay"
                f" static: {', '.join(self.skipped[:3])}"
            )
        names = {spec.name: held for spec, held in zip(kept, self._sources, strict=True)}
        return replace(
            plan, shards=tuple(anchor), heads={}, manifest=manifest, codes=tuple(shards),
            router=router, head_names=names, warnings=tuple(warnings),
            peak_bytes=memory.then(plan.peak_bytes, plan.workers, largest),
            undecided=self.dynamic.survey is not None and self.found is None,
            rest=self._rest_told(), encoder=self.encoder.stored if self.encoder else None,
        )  # fmt: skip

    def _rest_told(self) -> str:
        """The method of what is not dynamic, and why it is that one."""
        named = self.recipe.rest.method if self.recipe.rest else ", ".join(
            dict.fromkeys(rest.method for rest in self._rests.values())
        )  # fmt: skip
        return f"{named}, {self.why}" if self.why else named

    def _routing(self, plan: Plan, codes: Sequence[Code]) -> Routing:
        """The gates and routers of all codes, each gate by the parameters of its own tensors."""
        sites = list(self.sites.values())
        if self.encoder:  # it has a width of its own, and is looked at behind its last layer
            sites = [replace(site, width=self.encoder.width, layers=0) for site in sites]
        gates: dict[str, Gate] = {}
        routers: dict[str, Router] = {}
        known: dict[tuple[Any, ...], Routing] = {}
        for job in plan.jobs:
            if job.code is None:
                continue
            key = tuple(job.parameters.items())
            try:
                if key not in known:
                    known[key] = self.dynamic.routing(sites, codes, job.parameters)
            except MethodError as error:
                where = self.recipe.where("method")
                raise RecipeError(f"{self.method.name}: {error}", where=where) from error
            gate = known[key][0][job.code.gate]
            router = known[key][1].get(gate.router)
            alike = gates.setdefault(job.code.gate, gate) == gate
            if not alike or (router and routers.setdefault(gate.router, router) != router):
                raise RecipeError(
                    f"the parameters of '{job.output.name}' ask for another gate or router than"
                    " those of tensors that it shares them with",
                    where=self.recipe.where("rules"),
                    hint="change them for whole blocks, or for all tensors",
                )
        if self.encoder and any(gate.scope != "sample" for gate in gates.values()):
            raise RecipeError(
                f"{self.method.name} has no classifier that could look at an encoder",
                where=self.recipe.where("encoder"),
                hint="remove `encoder`, or have one: `router: deep` where the method takes it",
            )
        return gates, routers

    def _heads(
        self, plan: Plan, config_of: Callable[[str], Mapping[str, Any]]
    ) -> tuple[tuple[Head, ...], str, list[TensorSpec]]:
        """The heads in slot order, the class they belong to, and their tensors' new specs."""
        self._sources: list[tuple[str, str]] = []
        if not plan.heads:
            return (), "", []
        lacking = [model for model in self.recipe.models if model not in plan.heads]
        modules = {name.partition(".")[0] for s in plan.heads.values() for name in s.offsets}
        configs = {model: config_of(model) for model in plan.heads}
        classes = {(c.get("architectures") or [""])[0] for c in configs.values()}
        where = self.recipe.where("heads", "match")
        if lacking:
            raise RecipeError(
                f"model '{lacking[0]}' has no head, and the router would choose it", where=where
            )
        if len(modules) > 1 or len(classes) > 1 or "" in classes:
            raise RecipeError(
                "a dynamic checkpoint keeps one head module of one class, and here are"
                f" {', '.join(sorted(modules))} of {', '.join(sorted(classes))}",
                where=where,
                hint="match the head alone, such as `classifier.*`",
            )
        kept, experts = [], list(self.recipe.models)
        for i, model in enumerate(experts):
            specs = plan.sources[model].specs
            for name in plan.heads[model].offsets:
                inside = name.partition(".")[2]
                kept.append(replace(specs[name], name=names.head(experts, i) + inside))
                self._sources.append((model, name))
        module = modules.pop()
        heads = tuple(_head(plan, model, configs[model], module) for model in self.recipe.models)
        return heads, classes.pop(), kept


def _head(plan: Plan, model: str, config: Mapping[str, Any], module: str) -> Head:
    """A model's head, and how the model's own names differ from the anchor's."""
    view = naming.aligned(plan.sources[model].specs, plan.specs)
    own = (spec.name.removesuffix(n) for n, spec in view.items() if spec.name.endswith(n))
    lacks = (n for n in plan.specs if n not in view and not naming.tied_to(n, view))
    return Head(model, config, module, next(filter(None, own), ""), tuple(lacks))


def _router_bytes(router: Router) -> int:
    return sum(TensorSpec("", part.dtype, part.shape).nbytes for part in router.parts.values())


def _widths(specs: Mapping[str, TensorSpec]) -> dict[str | None, int]:
    """The width of hidden states by stack of layers, None for the model: that of its norms."""
    seen: dict[str | None, Counter[int]] = {}
    for name, spec in specs.items():
        if naming.role(name) == "norm" and len(spec.shape) == 1:
            stack = naming.stack(name)
            for where in {stack[0] if stack else None, None}:
                seen.setdefault(where, Counter())[spec.shape[0]] += 1
    return {stack: counted.most_common(1)[0][0] for stack, counted in seen.items()}


def sites_of(recipe: Recipe, plan: Plan) -> list[Site]:
    """Every tensor of a plan as a dynamic method sees it."""
    looked = Upcycling(recipe, plan.specs, None)
    return [looked.site(spec) for spec in plan.specs.values()]


def initial_routers(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """The name and value of each tensor of untrained routers, the same for the same seeds; one
    router at a time is in memory."""
    from mowmerge.dynamic.routers import RouterModule

    for name, router in manifest.routers.items():
        for part, value in RouterModule(router).fresh().state_dict().items():
            yield f"{ROUTER}.{name}.{part}", value
