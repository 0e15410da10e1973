"""The gates and routers that dynamic methods share: by block, by classifier, by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mowmerge.dynamic.format import Code, Gate, Router
from mowmerge.methods.contracts import MethodError, Routing, Site

Classifier = Literal["deep", "linear", "centroid"]
Chooser = Literal["task_id", "deep", "linear", "centroid"]
Features = Literal["statistics", "mean"]
DEPTHS = {0: "constant", 1: "linear", 2: "mlp"}
KINDS = {"deep": "twin"}  # what a classifier's kind is called in the format, where it differs


def block_of(site: Site) -> str:
    """The gate of a tensor's block, such as `encoder.layer.3`."""
    return f"{site.stack}{site.layer}"


def in_mlp(site: Site) -> bool:
    """Whether the tensor belongs to the MLP of a block."""
    return site.role == "mlp" and site.layer is not None


def in_block_matrix(site: Site) -> bool:
    """Whether it is a matrix of a block's attention or MLP."""
    return site.role in ("attention", "mlp") and site.layer is not None and len(site.shape) == 2


def by_block(
    sites: Sequence[Site],
    codes: Sequence[Code],
    *,
    offset: float,
    depth: int,
    seed: int,
    shared: bool = False,
    layer_code: int = 0,
    hidden: int = 0,
    top_k: int = 0,
) -> Routing:
    """A gate a block on the tokens that enter it, with a router of its own or one for each stack.

    Coefficients are the router's mean over tokens, not normalised, `offset` at first.
    """
    coded = {code.name: code for code in codes}
    ids: dict[str, str] = {}
    gates: dict[str, Gate] = {}
    routers: dict[str, Router] = {}
    for site in sites:
        code = coded.get(site.name)
        if code is None:
            continue
        id = ids.setdefault(str(site.stack) if shared else code.gate, str(len(ids)))
        gates[code.gate] = Gate("block", id, offset, site.layer or 0)
        described = Router(
            DEPTHS[depth], _width(site), code.slots, hidden=hidden, code=layer_code,
            activation="none", top_k=top_k, init=offset, seed=seed + int(id), objective="distill",
        )  # fmt: skip
        if routers.setdefault(id, described) != described:
            raise MethodError(
                f"the blocks that share router {id} differ in width or rank at '{site.name}'"
            )
    return gates, routers


def by_choice(sites: Sequence[Site], p: Mapping[str, Any], **more: Any) -> Routing:
    """One gate for all, by the parameters `router`, `prefix`, `features` and `seed`: a classifier
    of the sample on the anchor's own hidden states, or task_id, which the caller sets."""
    if p["router"] == "task_id":
        return {"0": Gate("task")}, {}
    inside = next((s for s in sites if s.layer is not None), sites[0])
    kind, width = KINDS.get(p["router"], p["router"]), _width(inside)
    router = Router(
        kind, width, inside.models, hidden=2 * width if kind == "twin" else 0,
        layer=_layer(inside.layers, p["prefix"]), pool=p["features"], seed=p["seed"], **more,
    )  # fmt: skip
    return {"0": Gate("sample", "0")}, {"0": router}


def _layer(layers: int, prefix: float) -> int:
    """The layer, of so many, after that share of them, at least the first; 0 means all of them and
    what comes behind."""
    return max(1, round(prefix * layers)) if layers and prefix < 1 else 0


def _width(site: Site) -> int:
    """The width of what a router of this tensor reads."""
    if not site.width:
        raise MethodError(f"no normalisation tells how wide the hidden states at '{site.name}' are")
    return site.width


def of_base(parameters: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What is not coded stays the base's: no task vector is added."""
    return "task_arithmetic", {"scale": 0.0}


def of_sum(parameters: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What is not coded is task arithmetic at the method's own scale."""
    return "task_arithmetic", {"scale": parameters["scale"]}
