"""What a method may see and say: parameter types, random draws, folds over a tensor or a model.

A method is a plain function. It asks for what it needs by reserved parameter names:

    models [N,*S]   the experts' values          deltas [N,*S]  the experts minus the base, in fp32
    base [*S]       the base's values            state          what the method's `reduce` returned
    factors         B [m,r], A [r,k] of each delta, where all are known as such a product; else None
    rng             random draws that depend on nothing but seed, model, tensor and element
    role            what the tensor is for: embedding, attention, mlp, norm, head, router, other
    start           the index in the tensor, as a vector, of the block's first element
    once            keeps what is worked out for a matrix from one pass over the model to the next
    anchor [*S]     what the static method for the rest gave, as stored (dynamic methods)
    code            how this tensor is to be coded (dynamic methods)

`deltas` in means a delta out (the engine adds the base); `models` in means a weight out; `factors`
in means a delta out that is such a product too, its B and A, where they are given. A dynamic
method gives the parts of its code by name, and the "anchor" where it did not ask for one; of deltas
that it cuts to a rank also what `ops.spectral.truncated` tells, which goes into the report.

A method on matrices gets the models or deltas of a matrix as `Matrices`: it holds at once what it
keeps of them, and no more is read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol, TypeVar, Union

from mowmerge.dynamic.format import Code, Gate, Router
from mowmerge.plan import RUN, run_length
from mowmerge.tensors import Tensor, torch

T = TypeVar("T")
PerModel = Union[T, Sequence[T]]  # noqa: UP007  (an alias with a type variable)


@dataclass(frozen=True)
class Range:
    """The values a number may take, both ends included."""

    low: float = float("-inf")
    high: float = float("inf")


Unit = Annotated[float, Range(0.0, 1.0)]
NonNegative = Annotated[float, Range(0.0)]
Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**63 - 1)]

RESERVED = frozenset({
    "models", "base", "deltas", "state", "factors", "rng", "role", "start", "once", "anchor",
    "code",
})  # fmt: skip
SCOPES = ("element", "row", "tensor", "model")


class MethodError(ValueError):
    """A method's parameters contradict each other or the number of models."""


@dataclass(frozen=True)
class Site:
    """A tensor as a dynamic method sees it before anything is read.

    dtype: as it will be stored. stack, layer: the stack of layers it belongs to and its number
    there, None outside; layers: how many the stack has. width: of the hidden states there. models:
    how many there are. transposed: whether it is a weight stored [in,out] (GPT-2).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    stack: str | None
    layer: int | None
    layers: int
    width: int
    models: int
    transposed: bool = False

    @property
    def rank(self) -> int:
        """The largest rank it can have as a matrix, 0 for a vector."""
        code = Code(self.name, self.shape, "full", 1, "")
        return min(code.matrix) if len(self.shape) > 1 else 0


Routing = tuple[dict[str, Gate], dict[str, Router]]
Kept = tuple[Tensor, ...]
Once = Callable[[Callable[[], Kept]], Kept]
"""Of one matrix: what the function returns, or what it returned in an earlier pass. Nobody writes
into that."""


def anew(make: Callable[[], Kept]) -> Kept:
    """What it returns, each time."""
    return make()


class Memo:
    """Keeps it in memory."""

    def __init__(self) -> None:
        self.held: Kept | None = None

    def __call__(self, make: Callable[[], Kept]) -> Kept:
        """What the first call returned."""
        self.held = make() if self.held is None else self.held
        return self.held


@dataclass(frozen=True)
class Survey:
    """What decides a dynamic method's layout and needs the weights: a streamed pass.

    measure: of each site, the fold whose total over the tensor counts (None: not measured).
    decide: from all totals by tensor, what `code` is given as `found`; plain data, for a report,
    in which `warnings` are for the user.
    """

    measure: Callable[[Site], Any]
    decide: Callable[[Mapping[str, Any], Sequence[Site], Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Dynamic:
    """What makes a method dynamic.

    code: how a tensor is coded, None where it stays static; `found` is what the survey decided,
    None before it. routing: the gates and routers of the coded tensors, given all sites, those
    coded, and the parameters. rest: the static method, with parameters, of the anchor and of what
    is not coded, where the recipe does not say; learned: the one that takes its place where the
    recipe has data to fit it on. by_rows: whether a code is made of some whole rows at a time, with
    what the method's `reduce` returned of the tensor.
    """

    code: Callable[[Site, Mapping[str, Any], Mapping[str, Any] | None], Code | None]
    routing: Callable[[Sequence[Site], Sequence[Code], Mapping[str, Any]], Routing]
    rest: Callable[[Mapping[str, Any]], tuple[str, Mapping[str, Any]]]
    survey: Survey | None = None
    learned: str = ""
    by_rows: Callable[[Code], bool] = lambda code: False


class Matrices(Protocol):
    """N matrices [m,k], of which each is read when it is asked for, into memory of its own: a loop
    over them holds one. A Tensor [N,m,k] is such too; elements [N,B] are a Tensor."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, m, k)."""
        ...

    def dim(self) -> int:
        """3."""
        ...

    def numel(self) -> int:
        """N m k."""
        ...

    @property
    def dtype(self) -> Any:
        """Of each of them."""
        ...

    @property
    def mT(self) -> Matrices:
        """Their transposes."""
        ...

    def double(self) -> Matrices:
        """The same in fp64."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Tensor: ...

    def __iter__(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Block:
    """A piece of one tensor on its way through a fold: values [N,*B], and what goes with them.

    B is a run of elements; for a method of scope row it is some whole rows, [rows,*R], of which a
    vector is one. For a method on matrices it may be a whole matrix: then there are no values but
    `matrices`, with their `factors`, of which `once` keeps what is worked out. `base` and `anchor`
    [*B] are there for one that asks for them.
    """

    values: Tensor
    parameters: Mapping[str, Any]
    rng: Draws
    numel: int  # of the whole tensor
    base: Tensor | None = None
    matrices: Matrices | None = None
    factors: Sequence[tuple[Tensor, Tensor]] | None = None
    once: Once = anew
    anchor: Tensor | None = None

    def runs(self) -> Iterator[Block]:
        """The block in runs of 65,536 elements, or of as many whole rows: cut at the same places
        of the tensor, whatever the block. A matrix is not cut."""
        if self.matrices is not None:
            yield self
            return
        row = self.values[0, :1].numel()
        step = run_length(row) // max(1, row)
        for at in range(0, max(1, self.values.shape[1]), step):
            base = None if self.base is None else self.base[at : at + step]
            yield replace(
                self,
                values=self.values[:, at : at + step],
                rng=self.rng.ahead(at * row),
                base=base,
            )


@dataclass(frozen=True)
class Extent:
    """A tensor that a reduction will run over: its shape, its parameters, how a dynamic method
    codes it, its role, whether a method on matrices gets it whole, whether blocks are whole rows,
    and how many models there are."""

    shape: tuple[int, ...]
    parameters: Mapping[str, Any]
    codec: str = ""
    role: str = ""
    matrix: bool = False
    rows: bool = False
    models: int = 0

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    @property
    def undivided(self) -> bool:
        """Whether it lies in one block, however long blocks are."""
        return self.numel <= RUN


class Fold(Protocol):
    """One streamed pass: observes blocks in order, and merges with the folds of other tensors.

    `share` below 1 asks for a sample of about that share of the elements instead of all of them.
    `exact` says that folds may be merged in any order, to the same bits: so counts may, and maxima,
    and sums of floats not. What a fold has seen is in those attributes that are not functions, and
    can be pickled: so it goes from one rank to another.
    """

    share: float
    exact: bool

    def fresh(self) -> Fold:
        """An empty fold of the same kind."""
        ...

    def observe(self, block: Block) -> None:
        """Takes one block in."""
        ...

    def merge(self, other: Any) -> None:
        """Takes in what a later tensor's fold has seen."""
        ...


def seen(fold: Fold) -> dict[str, Any]:
    """What a fold holds, without its functions: plain data that can be sent."""
    return {name: value for name, value in vars(fold).items() if not callable(value)}


def with_seen(fold: Fold, held: Mapping[str, Any]) -> Fold:
    """A fold of the same kind that holds what another one, of another process, has seen."""
    made = fold.fresh()
    vars(made).update(held)
    return made


Reduction = Generator[Any, Any, Any]
"""Yields folds, receives each one filled, returns the state: a pass over the data a yield."""


class Draws:
    """Random draws as a function of (seed, model name, tensor name, element index).

    Philox 4x64 keyed by a digest of the first three and advanced to the fourth: any block can be
    drawn alone, on any thread, in any order. Element i is the i-th 16-bit word of the stream.
    """

    def __init__(
        self, seed: int = 0, models: Sequence[str] = (), tensor: str = "", start: int = 0
    ) -> None:
        self.seed, self.models, self.tensor, self.start = seed, models, tensor, start

    def keep(self, density: Sequence[float], like: Tensor) -> Tensor:
        """1.0 where an element is kept, else 0.0: Bernoulli(density[i]) for model i.

        Shapes: `like` [N,*B] -> [N,*B], in its dtype and on its device. The grain of the
        probability is 2^-32: the one word in 65,536 that meets the limit draws another word.
        """
        import numpy as np

        numel = like[0].numel()
        kept = np.ones((len(like), numel), dtype=bool)
        for i, share in enumerate(density):
            limit, rest = divmod(round(share * 2**32), 2**16)
            if limit == 2**16:
                continue
            words = self._words(i, self.start, numel)
            np.less(words, np.uint16(limit), out=kept[i])
            for at in np.flatnonzero(words == limit) if rest else ():
                kept[i, at] = self._rest(i, at) < rest
        mask = torch.empty(like.shape, dtype=like.dtype)
        np.copyto(mask.view(len(like), numel).numpy(), kept)
        return mask.to(like.device)

    def keep_each(self, probability: Tensor) -> Tensor:
        """1.0 where an element is kept, else 0.0: Bernoulli of its own probability.

        Shapes: probability [N,*B] -> [N,*B], in its dtype and on its device. Where it is the same
        for all, what `keep` keeps of that density.
        """
        import numpy as np

        mask = probability.cpu().contiguous() * 2.0**16
        for i, shares in enumerate(mask.view(len(mask), -1).numpy()):
            words = self._words(i, self.start, shares.size)
            limit = np.minimum(shares, 65_535).astype(np.uint16)
            kept = words < limit
            for at in np.flatnonzero(words == limit):
                kept[at] = self._rest(i, at) < round((float(shares[at]) - limit[at]) * 2**16)
            np.copyto(shares, kept)
        return mask.to(probability.device)

    def ahead(self, count: int) -> Draws:
        """The same draws from `count` elements further on."""
        return Draws(self.seed, self.models, self.tensor, self.start + count)

    def only(self, model: int) -> Draws:
        """The draws of one model alone."""
        return Draws(self.seed, [self._name(model)], self.tensor, self.start)

    def _rest(self, model: int, at: Any) -> int:
        """The word that goes on where one meets its limit."""
        return int(self._words(model, self.start + int(at), 1, "rest")[0])

    def _name(self, model: int) -> str:
        return self.models[model] if self.models else str(model)

    def _words(self, model: int, start: int, count: int, stream: str = "") -> Any:
        import numpy as np

        text = f"{self.seed}\0{self._name(model)}\0{self.tensor}\0{stream}"
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
        philox = np.random.Philox(key=key)
        first, skip = divmod(start, 16)  # one step of the counter gives sixteen 16-bit words
        philox.advance(first)
        raw = philox.random_raw((skip + count + 3) // 4)
        return raw.astype("<u8", copy=False).view("<u2")[skip : skip + count]
