"""Codes of deltas: how each is made, and how weights are mixed from it.

A slot s of a code holds D_s. `mixed` gives A + sum_s c_s D_s for a batch of coefficients, `inner`
the gradient of those coefficients, <G, D_s>. Bits are little-endian in a byte, rows padded to bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .format import Code

Parts = Mapping[str, Tensor]


def pack(bits: Tensor) -> Tensor:
    """Booleans [...,n] as bytes [...,ceil(n/8)], the first in the lowest bit."""
    n = bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -n % 8))
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=bits.device)
    return (padded.view(*bits.shape[:-1], -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The booleans [...,n] that `pack` put into bytes."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> places) & 1
    return bits.view(*packed.shape[:-1], -1)[..., :n].bool()


def low_rank(deltas: Tensor, rank: int) -> dict[str, Tensor]:
    """The best rank-`rank` factors of each delta: D_s = u[:, slot == s] v[slot == s], the singular
    values shared evenly.

    Shapes: deltas [S,*shape] -> u [rows, S rank], v [S rank, columns], slot [S rank].
    """
    flat = deltas.reshape(len(deltas), *_matrix(deltas.shape[1:]))
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    root = s[:, :rank].sqrt()
    left = (u[..., :rank] * root.unsqueeze(1)).permute(1, 0, 2).reshape(flat.shape[1], -1)
    right = (vh[:, :rank] * root.unsqueeze(2)).reshape(-1, flat.shape[2])
    slot = torch.arange(len(deltas), dtype=torch.int32).repeat_interleave(rank)
    return {"u": left, "v": right, "slot": slot}


def one_bit(deltas: Tensor, scale: Tensor, *, zeros: bool = False) -> dict[str, Tensor]:
    """Signs and one scale a slot: D_s = scale_s sgn(delta_s), with sgn(0) = 1, or 0 if marked.

    Shapes: deltas [S,*shape], scale [S] -> sign [S,rows,bytes], scale [S], and occ like sign.
    """
    flat = deltas.reshape(len(deltas), *_matrix(deltas.shape[1:]))
    parts = {"sign": pack(flat >= 0), "scale": scale.float()}
    return parts | ({"occ": pack(flat != 0)} if zeros else {})


def mask(unified: Tensor, masks: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """One delta for all and a bit mask a slot: D_s = scale_s mask_s unified.

    Shapes: unified [*shape], masks bool [S,*shape], scale [S].
    """
    flat = masks.reshape(len(masks), *_matrix(unified.shape))
    return {"unified": unified, "mask": pack(flat), "scale": scale.float()}


def sparse(deltas: Tensor, kept: int) -> dict[str, Tensor]:
    """Each delta's `kept` largest magnitudes, the first of equals, and where they stand.

    Shapes: deltas [S,*shape] -> occ [S,rows,bytes], val [S kept], ptr [S+1].
    """
    flat = deltas.reshape(len(deltas), -1)
    order = flat.abs().argsort(dim=1, descending=True, stable=True)[:, :kept]
    occupied = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
    occ = pack(occupied.view(len(flat), *_matrix(deltas.shape[1:])))
    ptr = torch.arange(len(flat) + 1, dtype=torch.int64) * kept
    return {"occ": occ, "val": flat[occupied], "ptr": ptr}


def row_sparse(deltas: Tensor) -> dict[str, Tensor]:
    """The rows of each delta that are not all zero.

    Shapes: deltas [S,rows,columns] -> rowidx [n], rowval [n,columns], ptr [S+1].
    """
    changed = [delta.abs().amax(1).nonzero().squeeze(1) for delta in deltas]
    ptr = torch.tensor([0, *(len(rows) for rows in changed)], dtype=torch.int64).cumsum(0)
    values = [delta[rows] for delta, rows in zip(deltas, changed, strict=True)]
    return {"rowidx": torch.cat(changed), "rowval": torch.cat(values), "ptr": ptr}


def slot(code: Code, parts: Parts, s: int, anchor: Tensor) -> Tensor:
    """D_s [*shape], in the anchor's dtype."""
    rows, columns = code.matrix
    kind = anchor.dtype
    if code.codec == "full":
        return parts["delta"][s].to(kind)
    if code.codec == "full_abs":
        return parts["abs"][s].to(kind) - anchor
    if code.codec == "low_rank":
        mine = parts["slot"] == s
        return (parts["u"][:, mine].to(kind) @ parts["v"][mine].to(kind)).view(code.shape)
    if code.codec == "one_bit":
        value = unpack(parts["sign"][s], columns).to(kind).mul_(2).sub_(1)
        if code.zeros:
            value *= unpack(parts["occ"][s], columns)
        return value.mul_(parts["scale"][s].to(kind)).view(code.shape)
    if code.codec == "mask":
        value = unpack(parts["mask"][s], columns).to(kind).view(code.shape)
        return value.mul_(parts["unified"].to(kind)).mul_(parts["scale"][s].to(kind))
    first, last = parts["ptr"][s : s + 2].tolist()
    value = torch.zeros(rows, columns, dtype=kind, device=anchor.device)
    if code.codec == "sparse":
        value[unpack(parts["occ"][s], columns)] = parts["val"][first:last].to(kind)
    else:
        value[parts["rowidx"][first:last]] = parts["rowval"][first:last].to(kind)
    return value.view(code.shape)


def stacked(code: Code, parts: Parts) -> Tensor | None:
    """The slots side by side [S,numel] where they are stored so: one GEMM mixes them."""
    name = {"full": "delta", "full_abs": "abs"}.get(code.codec)
    return parts[name].view(code.slots, -1) if name else None


def mixed(code: Code, parts: Parts, anchor: Tensor, c: Tensor, out: Tensor | None = None) -> Tensor:
    """A + sum_s c_s D_s for each row of c, in the anchor's dtype.

    With full_abs it is (1 - sum_s c_s) A + sum_s c_s W_s: a one-hot row gives W_s bit for bit.

    Shapes: anchor [*shape], c [B,S] -> [B,*shape]; `out` [B,numel] is overwritten if given.
    """
    flat, c = anchor.reshape(1, -1), c.to(anchor.dtype)
    if out is None:
        out = torch.empty(len(c), flat.shape[1], dtype=flat.dtype, device=flat.device)
    if code.codec == "full_abs":
        rest = 1 - c.sum(1, keepdim=True)
        out = flat * rest if rest.requires_grad else torch.mul(flat, rest, out=out)
    else:
        out.copy_(flat.expand_as(out))
    together = stacked(code, parts)
    if together is not None:
        out.addmm_(c, together.to(flat.dtype))
    elif code.codec == "mask":  # the sum of masks first: one product with the unified delta
        share = torch.zeros_like(out)
        for s in range(code.slots):
            bits = unpack(parts["mask"][s], code.matrix[1]).view(1, -1)
            share.addcmul_(bits.to(flat.dtype), (c[:, s] * parts["scale"][s]).to(c.dtype)[:, None])
        out.addcmul_(share, parts["unified"].to(flat.dtype).reshape(1, -1))
    elif code.codec == "low_rank":
        u, v = parts["u"].to(flat.dtype), parts["v"].to(flat.dtype)
        each = u.unsqueeze(0) * c[:, parts["slot"]].unsqueeze(1)
        out.view(len(c), *code.matrix).baddbmm_(each, v.expand(len(c), *v.shape))
    else:
        for s in range(code.slots):
            out.addcmul_(slot(code, parts, s, anchor).view(1, -1), c[:, s, None])
    return out.view(len(c), *code.shape)


def inner(code: Code, parts: Parts, anchor: Tensor, gradient: Tensor) -> Tensor:
    """<G_b, D_s>, the gradient of the coefficients.

    Shapes: gradient [B,*shape] -> [B,S].
    """
    flat = gradient.reshape(len(gradient), -1)
    together = stacked(code, parts)
    if together is not None:
        found = flat @ together.to(flat.dtype).T
        return found - flat @ anchor.reshape(-1, 1) if code.codec == "full_abs" else found
    columns = [flat @ slot(code, parts, s, anchor).reshape(-1) for s in range(code.slots)]
    return torch.stack(columns, 1)


def rows(code: Code, parts: Parts, index: Tensor) -> tuple[Code, Parts]:
    """The code of some rows of the tensor alone; row_sparse and sparse ones are opened for it.

    Shapes: index [n] of row numbers.
    """
    shape = (len(index), *code.shape[1:])
    if code.codec in ("sparse", "row_sparse"):
        blank = torch.zeros(code.shape, dtype=parts[_values(code)].dtype, device=index.device)
        each = [slot(code, parts, s, blank)[index] for s in range(code.slots)]
        return _changed(code, shape, "full"), {"delta": torch.stack(each)}
    picked = {
        name: parts[name].index_select(part.axis, index) if part.axis is not None else parts[name]
        for name, part in code.parts.items()
    }
    if code.codec == "low_rank":
        picked["u"] = parts["u"][index]
    return _changed(code, shape, code.codec), picked


def _values(code: Code) -> str:
    return "val" if code.codec == "sparse" else "rowval"


def _changed(code: Code, shape: tuple[int, ...], codec: str) -> Code:
    from dataclasses import replace

    return replace(code, shape=shape, codec=codec)


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a shape; a vector is one row."""
    total = 1
    for n in shape:
        total *= n
    return (shape[0], total // shape[0]) if len(shape) > 1 and shape[0] else (1, total)
