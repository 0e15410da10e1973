"""What a dynamic checkpoint says of itself: the manifest in config.json, and what lies where.

One equation for every method: W(x) = A + sum_s (c_s(x) - o_s) D_s, with A the anchor, a complete
static model under the base's own names, D_s the coded deltas beside it, c a gate's coefficients and
o constant offsets. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any

from .names import part, patterns

FORMAT = 5  # the newest
ROUTER = "mow_router"  # module and name prefix of what train-router may change
CODECS = ("full", "full_abs", "low_rank", "sparse", "row_sparse", "mask", "one_bit", "basis")
SCOPES = ("sample", "block", "module", "task")
POOLS = ("mean", "statistics")
READS = ("texts", "pixels")


class FormatError(ValueError):
    """A manifest that this version cannot read."""


@dataclass(frozen=True)
class Part:
    """One stored tensor of a code: safetensors dtype, shape, and the axis along which the rows of
    the coded tensor lie (None: it is no row's). ragged: it has some values a row, row after row of
    each slot."""

    dtype: str
    shape: tuple[int, ...]
    axis: int | None = None
    ragged: bool = False


@dataclass(frozen=True)
class Code:
    """How one tensor's deltas are stored.

    name: the anchor tensor's name on disk. gate: whose coefficients mix the slots. dtype: of the
    values. rank: columns a slot (low_rank, basis); basis: directions that the slots share. kept:
    entries a slot (sparse) or rows in all (row_sparse); each: of these each slot's, where whoever
    wrote it said so. zeros: whether one_bit marks entries that are 0. fitted: whether its scales
    have factors that train-router may learn, 1 before, beside the routers. gate_rank: rows a slot
    of a gate that scores tokens by their projection (scope module); gate_width: its columns, the
    inputs of the layer (0: the columns of the code, which are the outputs of a weight stored
    [in,out]).
    """

    name: str
    shape: tuple[int, ...]
    codec: str
    slots: int
    gate: str
    dtype: str = "F32"
    rank: int = 0
    kept: int = 0
    each: tuple[int, ...] = ()
    zeros: bool = False
    fitted: bool = False
    gate_rank: int = 0
    gate_width: int = 0
    basis: int = 0

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns under which the tensor is coded; a vector is one row."""
        if len(self.shape) < 2:
            return 1, prod(self.shape)
        return self.shape[0], prod(self.shape[1:])

    @property
    def parts(self) -> dict[str, Part]:
        """What is stored: part -> dtype, shape and row axis. See `codecs` for what each means."""
        rows, columns = self.matrix
        n, packed = self.slots, (columns + 7) // 8
        each, alone = (1, 0) if len(self.shape) > 1 else (None, None)
        bits, scale = Part("U8", (n, rows, packed), each), Part("F32", (n,))
        parts = {
            "full": {"delta": Part(self.dtype, (n, *self.shape), each)},
            "full_abs": {"abs": Part(self.dtype, (n, *self.shape), each)},
            "low_rank": {
                "u": Part(self.dtype, (rows, n * self.rank), 0),
                "v": Part(self.dtype, (n * self.rank, columns)),
                "slot": Part("I32", (n * self.rank,)),
            },
            "sparse": {
                "occ": bits,
                "val": Part(self.dtype, (n * self.kept,), ragged=True),
                "ptr": Part("I64", (n + 1,)),
            },
            "row_sparse": {
                "rowidx": Part("I64", (self.kept,), ragged=True),
                "rowval": Part(self.dtype, (self.kept, columns), ragged=True),
                "ptr": Part("I64", (n + 1,)),
            },
            "mask": {
                "unified": Part(self.dtype, self.shape, alone),
                "mask": bits,
                "scale": scale,
            },
            "basis": {
                f"{side}_{name}": Part(self.dtype, shape)
                for side, length in (("left", rows), ("right", columns))
                for name, shape in (
                    ("mean", (length, self.rank)),
                    ("basis", (length, self.rank, self.basis)),
                    ("share", (length, self.basis, n)),
                )
            },
            "one_bit": {"sign": bits, "scale": scale} | ({"occ": bits} if self.zeros else {}),
        }[self.codec]
        if self.fitted:
            parts["factor"] = scale
        if self.gate_rank:
            parts["gate"] = Part("F32", (n * self.gate_rank, self.gate_width or columns))
        return parts

    def part_name(self, name: str) -> str:
        """A part's name in the checkpoint: P.dyn_u beside P.weight, P.bias.dyn_u for P.bias."""
        return part(self.name, name)


@dataclass(frozen=True)
class Gate:
    """Where the coefficients of a set of tensors come from.

    scope: sample (a classifier on pooled features), block (on the tokens that enter the first of
    its tensors), module (each token, by projection, in each tensor alone) or task (the caller says
    which). router: whose parameters. offset: o, the same for every slot. index: the layer's number,
    for a router that is shared and told where it is.
    """

    scope: str
    router: str = ""
    offset: float = 0.0
    index: int = 0


@dataclass(frozen=True)
class Router:
    """What turns features into one coefficient a slot.

    kind: linear, mlp (linear, ReLU, linear, on each token), constant, twin (two hidden layers with
    batch norm), centroid (minus the squared distance), projection (scope module: each token by its
    norm on the gates of the codes). width: of the hidden states. layer: after how many layers of
    the anchor they are taken (0: its last hidden state). pool: what of the tokens is the feature:
    their mean, or their statistics, mean and standard deviation side by side. code: width of the
    layer code put in front. activation: softmax, or none. top_k: how many keep their coefficient
    (0: all). hard: from which largest probability on it counts as 1. rest: coefficient of the slots
    that were not chosen.
    """

    kind: str
    width: int
    outputs: int
    hidden: int = 0
    layer: int = 0
    pool: str = "mean"
    code: int = 0
    activation: str = "softmax"
    top_k: int = 0
    hard: float = 1.0
    rest: float = 0.0
    init: float = 0.0
    seed: int = 0
    objective: str = "task"

    @property
    def inputs(self) -> int:
        """How many numbers its first layer takes."""
        return self.width * (2 if self.pool == "statistics" else 1) + self.code

    @property
    def parts(self) -> dict[str, Part]:
        """The router's tensors by name, as `RouterModule` has them."""
        width, wide = self.inputs, self.hidden or self.inputs
        shapes: dict[str, tuple[int, ...]] = {}
        layers = {
            "linear": [("last", self.outputs, width)],
            "mlp": [("first", wide, width), ("last", self.outputs, wide)],
            "twin": [("first", wide, width), ("second", wide, wide), ("last", self.outputs, wide)],
        }
        for name, rows, columns in layers.get(self.kind, []):
            shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
        if self.kind == "twin":
            for norm in ("norm1", "norm2"):
                vectors = ("weight", "bias", "running_mean", "running_var")
                shapes |= {f"{norm}.{vector}": (wide,) for vector in vectors}
                shapes |= {f"{norm}.num_batches_tracked": ()}
        shapes |= {"bias": (self.outputs,)} if self.kind == "constant" else {}
        shapes |= {"centroids": (self.outputs, width)} if self.kind == "centroid" else {}
        shapes |= {"temperature": ()}
        return {
            name: Part("I64" if name.endswith("tracked") else "F32", shape)
            for name, shape in shapes.items()
        }


@dataclass(frozen=True)
class Head:
    """One expert's head, its config whole, and what `extract` needs to give its own names back.

    module: what the head is called there (classifier). prefix: what stands before the anchor's
    names there (bert.). lacks: the tensors of the anchor that are not there.
    """

    expert: str
    config: Mapping[str, Any]
    module: str = ""
    prefix: str = ""
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """The model in the folder `encoder` on whose last hidden states classifiers look.

    reads: texts, which the base's tokenizer spells out for the encoder's own, or pixels, which are
    taken as scale x + shift (a number a channel) at `size`, rows and columns.
    """

    reads: str
    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()
    size: tuple[int, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything `config.json` holds under "mowmerge"; the order of experts is that of slots."""

    method: str
    experts: tuple[str, ...]
    codes: tuple[Code, ...]
    gates: Mapping[str, Gate]
    routers: Mapping[str, Router] = field(default_factory=dict)
    heads: tuple[Head, ...] = ()
    head_class: str = ""
    encoder: Encoder | None = None

    @property
    def format(self) -> int:
        """The oldest format that can say this: 2 where a router sees statistics, or keeps its
        largest outputs as they are; 3 where classifiers look at an encoder, scales are fitted, or
        it says how many rows of a table each slot has; 4 where slots share a basis; 5 where names
        on disk are not those in memory."""
        if self.renamed:
            return 5
        if any(code.codec == "basis" for code in self.codes):
            return 4
        if self.encoder or self.fitted or any(code.each for code in self.codes):
            return 3
        newer = (
            r.pool != "mean" or (r.top_k and r.activation == "none") for r in self.routers.values()
        )
        return 2 if any(newer) else 1

    @property
    def renamed(self) -> list[tuple[str, str]]:
        """What becomes of names on disk in a model's memory, as patterns."""
        return patterns([code.name for code in self.codes], self.experts if self.heads else ())

    @property
    def fitted(self) -> tuple[str, ...]:
        """The factors that train-router may learn, as they are called on disk."""
        return tuple(code.part_name("factor") for code in self.codes if code.fitted)

    @property
    def routed(self) -> tuple[str, ...]:
        """The gates whose coefficients are the same for all tokens of a sample, in order: those
        that a `gates` tensor holds side by side."""
        return tuple(name for name, gate in self.gates.items() if gate.scope != "module")

    def slots(self, gate: str) -> int:
        """How many coefficients a gate has."""
        return next(code.slots for code in self.codes if code.gate == gate)

    def rest(self, gate: str) -> float:
        """The coefficient of the experts that a gate's router did not choose."""
        router = self.routers.get(self.gates[gate].router)
        return router.rest if router else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data; what has its default is left out."""
        return {
            "format": self.format,
            "method": self.method,
            "experts": list(self.experts),
            "gates": {name: _lean(gate) for name, gate in self.gates.items()},
            "routers": {name: _lean(router) for name, router in self.routers.items()},
            "heads": [asdict(head) for head in self.heads],
            "head_class": self.head_class,
            **({"encoder": _lean(self.encoder)} if self.encoder else {}),
            "tensors": [_lean(code) for code in self.codes],
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Manifest:
        """The manifest that `to_json` wrote.

        Raises:
            FormatError: a newer format, an unknown codec or scope, a gate that is not there.
        """
        number = held.get("format")
        if number not in range(1, FORMAT + 1):
            raise FormatError(
                f"this checkpoint has format {number!r} and this mowmerge reads up to {FORMAT}:"
                " upgrade mowmerge"
            )
        try:
            made = cls(
                method=held["method"],
                experts=tuple(held["experts"]),
                codes=tuple(Code(**_tupled(code)) for code in held["tensors"]),
                gates={name: Gate(**gate) for name, gate in held["gates"].items()},
                routers={name: Router(**router) for name, router in held["routers"].items()},
                heads=tuple(
                    Head(**{**head, "lacks": tuple(head.get("lacks", ()))})
                    for head in held["heads"]
                ),
                head_class=held["head_class"],
                encoder=_encoder(held.get("encoder")),
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"the manifest in config.json is damaged: {error}") from error
        made._check()
        return made

    def _check(self) -> None:
        """Raises FormatError where the manifest contradicts itself."""
        for code in self.codes:
            if code.codec not in CODECS or code.gate not in self.gates:
                raise FormatError(
                    f"'{code.name}' has codec '{code.codec}' and gate '{code.gate}', which this"
                    " mowmerge does not know"
                )
            if code.slots != self.slots(code.gate) or code.slots % len(self.experts):
                raise FormatError(
                    f"'{code.name}' has {code.slots} slots for {len(self.experts)} experts and the"
                    f" {self.slots(code.gate)} coefficients of gate '{code.gate}'"
                )
        for name, gate in self.gates.items():
            known = gate.router in self.routers or (gate.scope == "task" and not gate.router)
            if gate.scope not in SCOPES or not known:
                raise FormatError(f"gate '{name}' has an unknown scope or router")
            if all(code.gate != name for code in self.codes):
                raise FormatError(f"gate '{name}' has no tensor to mix")
            outputs = self.routers[gate.router].outputs if gate.router else self.slots(name)
            if outputs != self.slots(name):
                raise FormatError(
                    f"router '{gate.router}' has {outputs} outputs for the {self.slots(name)} slots"
                    f" of gate '{name}'"
                )
        for name, router in self.routers.items():
            if router.pool not in POOLS or (router.pool != "mean" and router.kind == "mlp"):
                raise FormatError(
                    f"router '{name}' of kind {router.kind} cannot pool its tokens by"
                    f" '{router.pool}'"
                )
        if len(self.heads) not in (0, len(self.experts)):
            raise FormatError(f"{len(self.heads)} heads for {len(self.experts)} experts")
        if self.encoder and self.encoder.reads not in READS:
            raise FormatError(f"an encoder that reads '{self.encoder.reads}' is not known")


def _encoder(held: Mapping[str, Any] | None) -> Encoder | None:
    """What `to_json` wrote of an encoder."""
    return None if held is None else Encoder(**_tupled(held))


def _tupled(held: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping of JSON with tuples for its lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in held.items()}


def _lean(item: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    return {f.name: values[f.name] for f in fields(item) if values[f.name] != f.default}
