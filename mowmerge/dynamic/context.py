"""What the mixing modules of a model share in one forward pass: each gate's coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .codecs import Parts, pick
from .format import Code, Gate
from .routers import RouterModule


@dataclass
class Mix:
    """One gate's coefficients, offsets taken off: c [B,S]; and which samples share them."""

    c: Tensor
    _groups: list[tuple[Mix, Tensor | None, int | None]] | None = None
    _idle: bool | None = None
    _used: list[int] | None = None

    @property
    def idle(self) -> bool:
        """Whether every coefficient is at its offset, so that the anchor answers."""
        if self._idle is None:
            self._idle = not (self.c.requires_grad or bool(self.c.any()))
        return self._idle

    @property
    def used(self) -> list[int]:
        """The slots of which any sample has a part, at least one; while c learns all, as 0 has a
        gradient too."""
        if self._used is None:
            whole = range(self.c.shape[1])
            found = whole if self.c.requires_grad else self.c.any(0).nonzero().flatten().tolist()
            self._used = list(found) or [0]
        return self._used

    def only(self, code: Code, parts: Parts) -> tuple[Code, Parts, Tensor]:
        """The code of the used slots alone, and their coefficients: only they are decoded. Several
        whole deltas stay together as they are stored, since to part them is to copy them."""
        n, kept = len(self.used), code.codec in ("full", "full_abs", "low_rank")
        if n == code.slots or (kept and n > 1):
            return code, parts, self.c
        return *pick(code, parts, self.used), self.c[:, self.used]

    @property
    def groups(self) -> list[tuple[Mix, Tensor | None, int | None]]:
        """The distinct rows: coefficients [1,S], the samples that have them (None: all), and the
        slot that they choose, where they are one-hot."""
        if self._groups is None:
            at: dict[tuple[float, ...], list[int]] = {}
            for sample, row in enumerate(self.c.detach().tolist()):
                at.setdefault(tuple(row), []).append(sample)
            self._groups = [
                (
                    Mix(self.c[samples[:1]]),
                    None if len(at) == 1 else torch.tensor(samples, device=self.c.device),
                    row.index(1.0) if sorted(row) == [*[0.0] * (len(row) - 1), 1.0] else None,
                )
                for row, samples in at.items()
            ]
        return self._groups


@dataclass
class Context:
    """What a forward pass knows: each gate's coefficients, which tokens count, how many samples.

    active: whether weights are mixed at all; without that the anchor answers. masks: of the tokens
    that count, [B,T]; decoder_mask: those of a decoder, for the gates in `decoder`; those in
    `pictures` see no texts. guarded: whether layers answer in a pass of the model alone. running:
    whether the base's own forward is running. forced: one
    expert's coefficients [B,S] for the gates of scope module. routers: shared with the model.
    heads: whose head answers for each sample [B], where that is known beforehand.
    """

    gates: Mapping[str, Gate]
    slots: Mapping[str, int]
    routers: Mapping[str, RouterModule] = field(default_factory=dict)
    decoder: frozenset[str] = frozenset()
    pictures: frozenset[str] = frozenset()
    guarded: bool = False
    active: bool = False
    running: bool = False
    batch: int = 0
    masks: Sequence[Tensor] = ()
    decoder_mask: Tensor | None = None
    mixes: dict[str, Mix] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)
    forced: Tensor | None = None
    heads: Tensor | None = None
    chosen: Tensor | None = None
    _scratch: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def begin(
        self, batch: int, masks: Sequence[Tensor] = (), *, decoder_mask: Tensor | None = None,
        active: bool = True,
    ) -> None:  # fmt: skip
        """Forgets the last pass."""
        self.batch, self.masks, self.decoder_mask, self.active = batch, masks, decoder_mask, active
        self.mixes, self.raw = {}, {}
        self.forced = self.heads = self.chosen = None

    def set(self, gate: str, c: Tensor) -> None:
        """Fixes a gate's coefficients c [B,S] for this pass."""
        self.mixes[gate] = Mix(c.float() - self.gates[gate].offset)
        self.raw[gate] = c

    def mix(self, gate: str, x: Tensor) -> Mix | None:
        """The gate's coefficients, None where the anchor answers; those of scope block come from
        the first input that asks, [B,T,d]."""
        if not self.mixing():
            return None
        if gate not in self.mixes:
            asked = self.gates[gate]
            router, tokens = self.routers[asked.router], self.samples(x)
            raw = router(tokens, self.mask(gate, tokens), asked.index)
            self.set(gate, router.coefficients(raw))
        return None if self.mixes[gate].idle else self.mixes[gate]

    def mixing(self) -> bool:
        """Whether weights are mixed in this pass, or the anchor was asked for.

        Raises:
            ValueError: there is no pass: a part of the model was called by itself.
        """
        if self.guarded and not (self.active or self.running):
            raise ValueError(
                "a part of a dynamic model was called by itself, and nothing says which weights it"
                " is to have: call the model (output_hidden_states=True has what is inside)"
            )
        return self.active

    def mask(self, gate: str, tokens: Tensor) -> Tensor | None:
        """Which tokens count for a gate [B,T], None if all do."""
        inside = gate in self.decoder
        masks = [self.decoder_mask] if inside and self.decoder_mask is not None else self.masks
        if gate in self.pictures or (inside and self.decoder_mask is None):
            return None
        return next((m for m in masks if m.shape == tokens.shape[:2]), None)

    def samples(self, x: Tensor) -> Tensor:
        """The rows of x by sample: [B*n,...,d] -> [B,T,d].

        Raises:
            ValueError: rows that do not divide into samples.
        """
        if len(x) % self.batch:
            raise ValueError(
                f"a layer was given {len(x)} rows for {self.batch} samples: its weights cannot"
                " differ from sample to sample"
            )
        return x.reshape(self.batch, -1, x.shape[-1])

    def every(self, names: Sequence[str]) -> Tensor:
        """These gates' coefficients side by side [B,G]; the offset where no layer asked."""
        known = next(iter(self.raw.values()), torch.empty(self.batch, 0))
        blank = {
            name: known.new_full((self.batch, self.slots[name]), self.gates[name].offset)
            for name in names
            if name not in self.raw
        }
        return torch.cat([(self.raw | blank)[name].to(known) for name in names], 1)

    def choice(self, n: int) -> Tensor:
        """The expert, of n, whose head answers for each sample [B]: the one with the most weight
        over all gates."""
        if self.heads is not None:
            self.chosen = self.heads
        elif self.forced is not None:
            self.chosen = self.forced.argmax(1)
        else:
            each = [c.view(len(c), n, -1).sum(2) for c in self.raw.values()]
            if not each:
                raise ValueError("no gate says whose head is meant: pass task_ids or gates")
            self.chosen = torch.stack([c.to(each[0]) for c in each]).sum(0).argmax(1)
        return self.chosen

    def again(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, which at every call but the first finds the pass as the first call found it: a
        layer that is run again in backward mixes, and asks routers, as it did."""
        first: list[dict[str, Any]] = []

        def called(*args: Any, **kwargs: Any) -> Any:
            if not first:
                first.append(self._pass())
                return run(*args, **kwargs)
            now = self._pass()
            vars(self).update(_kept(first[0]))
            try:
                return run(*args, **kwargs)
            finally:
                vars(self).update(now)

        return called

    def _pass(self) -> dict[str, Any]:
        """What is known of this pass so far."""
        known = ("active", "batch", "masks", "decoder_mask", "mixes", "raw", "forced", "heads",
                 "chosen")  # fmt: skip
        return _kept({name: getattr(self, name) for name in known})

    def scratch(self, numel: int, like: Tensor) -> Tensor:
        """Reused memory, for what a layer forgets before the next one begins."""
        key = (like.dtype, like.device)
        if key not in self._scratch or self._scratch[key].numel() < numel:
            self._scratch[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return self._scratch[key][:numel]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy keeps: nothing of the last pass."""
        fixed = (self.gates, self.slots, self.routers, self.decoder, self.pictures, self.guarded)
        blank = Context(*fixed)
        return dict(blank.__dict__)


def _kept(held: Mapping[str, Any]) -> dict[str, Any]:
    """These values, of which nothing that is added later becomes a part."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in held.items()}


def batch_of(args: Sequence[Any], inputs: Mapping[str, Any]) -> int:
    """How many samples there are, from the first tensor given."""
    for value in (*args, *inputs.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return len(value)
        if hasattr(value, "last_hidden_state"):
            return len(value.last_hidden_state)
    raise ValueError("a dynamic model needs a batch of inputs: [B, ...]")
