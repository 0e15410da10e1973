"""Codes of deltas: how each is made, and how weights are mixed from it.

A slot s of a code holds D_s. `mixed` gives A + sum_s c_s D_s for a batch of coefficients, `inner`
the gradient of those coefficients, <G, D_s>. Bits are little-endian in a byte, and rows padded to
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from .format import Code

Parts = Mapping[str, Tensor]
EACH = ("delta", "abs", "mask", "sign", "occ", "scale", "factor")  # whose first axis is the slot


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


def low_rank(factors: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Each delta as a product of two: D_s = u[:, slot == s] v[slot == s].

    Shapes: factors S times ([rows, r], [r, columns]) -> u [rows, S r], v [S r, columns], slot
    [S r].
    """
    left, right = zip(*factors, strict=True)
    slots = [torch.full((len(part),), s, dtype=torch.int32) for s, part in enumerate(right)]
    return {"u": torch.cat(left, 1), "v": torch.cat(right), "slot": torch.cat(slots)}


def one_bit(
    deltas: Tensor, scale: Tensor, *, zeros: bool = False, fitted: bool = False
) -> dict[str, Tensor]:
    """Signs and one scale a slot: D_s = scale_s sgn(delta_s), with sgn(0) = 1, or 0 if marked.

    Shapes: deltas [S,*shape], scale [S] -> sign [S,rows,bytes], scale [S], occ like sign, and if
    the scales are to be fitted factor [S], ones.
    """
    flat = deltas.reshape(len(deltas), *_matrix(deltas.shape[1:]))
    parts = {"sign": pack(flat >= 0), "scale": scale.float()}
    parts |= {"factor": torch.ones_like(parts["scale"])} if fitted else {}
    return parts | ({"occ": pack(flat != 0)} if zeros else {})


def mask(unified: Tensor, masks: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """One delta for all and a bit mask a slot: D_s = scale_s mask_s unified.

    Shapes: unified [*shape], masks bool [S,*shape], scale [S].
    """
    flat = masks.reshape(len(masks), *_matrix(unified.shape))
    return {"unified": unified, "mask": pack(flat), "scale": scale.float()}


def sparse(deltas: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Of each delta the entries that its mask marks, and where they stand.

    Shapes: deltas [S,*shape], masks bool [S,*shape] -> occ [S,rows,bytes], val [n], ptr [S+1].
    """
    occ = pack(masks.reshape(len(masks), *_matrix(deltas.shape[1:])))
    counts = [0, *masks.flatten(1).sum(1).tolist()]
    return {"occ": occ, "val": deltas[masks], "ptr": torch.tensor(counts).cumsum(0)}


def row_sparse(deltas: Tensor) -> dict[str, Tensor]:
    """The rows of each delta that are not all zero, in order.

    Shapes: deltas [S,*shape] -> rowidx [n], rowval [n,columns], ptr [S+1].
    """
    flat = deltas.reshape(len(deltas), *_matrix(deltas.shape[1:]))
    changed = [delta.abs().amax(1).nonzero().squeeze(1) for delta in flat]
    ptr = torch.tensor([0, *(len(rows) for rows in changed)], dtype=torch.int64).cumsum(0)
    values = [delta[rows] for delta, rows in zip(flat, changed, strict=True)]
    return {"rowidx": torch.cat(changed), "rowval": torch.cat(values), "ptr": ptr}


def basis(factors: Sequence[tuple[Tensor, Tensor]], size: int) -> dict[str, Tensor]:
    """For each row of the left factors L_s and each column of the right R_s, D_s = L_s R_s, their
    mean over the slots, `size` directions about it and each slot's share of them.

    The principal components of N vectors of r entries: of the row X [r,S], X - mean = U W V', U_p
    and U_p'(X - mean); a direction without variance is 0.

    Shapes: factors S times ([rows, r], [r, columns]) -> left_mean [rows, r], left_basis
    [rows, r, size], left_share [rows, size, S], and of columns right_mean ...
    """
    found: dict[str, Tensor] = {}
    for side, given in (("left", [a for a, _ in factors]), ("right", [b.T for _, b in factors])):
        each = torch.stack(given, 2)
        mean = each.mean(2, keepdim=True)
        moved = (each - mean).double()
        squares, turn = torch.linalg.eigh(moved.mT @ moved)
        turn, squares = turn.flip(2)[..., :size], squares.flip(1)[:, None, :size]
        used = squares > 1e-12 * squares[..., :1].clamp_min(torch.finfo(squares.dtype).tiny)
        length = squares.where(used, 1.0).sqrt()
        held = ((moved @ turn) / length).where(used, 0.0), (turn * length).where(used, 0.0).mT
        parts = (mean.squeeze(2), *(part.to(each.dtype) for part in held))
        names = (f"{side}_mean", f"{side}_basis", f"{side}_share")
        found |= dict(zip(names, parts, strict=True))
    return found


def plain(code: Code) -> Code:
    """The code as it is used: one of a shared basis as low_rank."""
    return replace(code, codec="low_rank", basis=0) if code.codec == "basis" else code


def expanded(code: Code, parts: Parts) -> Parts:
    """The parts of the plain code: of a shared basis, each slot's own factors."""
    if code.codec != "basis":
        return parts
    each = {}
    for side in ("left", "right"):
        mean, span, share = (parts[f"{side}_{name}"] for name in ("mean", "basis", "share"))
        each[side] = (mean.unsqueeze(2) + span @ share).permute(0, 2, 1)  # [length, S, r]
    n, rank = each["left"].shape[1:]
    slot = torch.arange(n, dtype=torch.int32, device=mean.device).repeat_interleave(rank)
    return {"u": each["left"].flatten(1), "v": each["right"].flatten(1).T, "slot": slot}


def slot(code: Code, parts: Parts, s: int, anchor: Tensor) -> Tensor:
    """D_s [*shape], in the anchor's dtype."""
    code, parts = plain(code), expanded(code, parts)
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
        scale = parts["scale"][s].to(kind)
        scale = scale * parts["factor"][s].to(kind) if code.fitted else scale
        return value.mul_(scale).view(code.shape)
    if code.codec == "mask":
        value = unpack(parts["mask"][s], columns).to(kind)
        value.mul_(parts["unified"].to(kind).view(rows, columns))
        return value.mul_(parts["scale"][s].to(kind)).view(code.shape)
    first, last = parts["ptr"][s : s + 2].tolist()
    value = torch.zeros(rows, columns, dtype=kind, device=anchor.device)
    if code.codec == "sparse":
        value[unpack(parts["occ"][s], columns)] = parts["val"][first:last].to(kind)
    else:
        value[parts["rowidx"][first:last]] = parts["rowval"][first:last].to(kind)
    return value.view(code.shape)


def pick(code: Code, parts: Parts, used: Sequence[int]) -> tuple[Code, Parts]:
    """The code of some slots alone, in that order: views of the parts where it is one slot."""
    code, parts = plain(code), expanded(code, parts)
    some = slice(used[0], used[0] + 1) if len(used) == 1 else list(used)
    picked = {name: value[some] if name in EACH else value for name, value in parts.items()}
    if code.codec == "low_rank":
        held = parts["slot"].tolist()
        columns = [j for s in used for j, own in enumerate(held) if own == s]
        slots = [n for n, s in enumerate(used) for own in held if own == s]
        picked = {
            **picked, "u": parts["u"][:, columns], "v": parts["v"][columns],
            "slot": parts["slot"].new_tensor(slots),
        }  # fmt: skip
    elif "ptr" in parts:
        place = parts["ptr"].tolist()
        spans = [slice(place[s], place[s + 1]) for s in used]
        for name in ("val", "rowidx", "rowval"):
            if name in parts:
                several = [parts[name][span] for span in spans]
                picked[name] = several[0] if len(several) == 1 else torch.cat(several)
        counts = [0, *(span.stop - span.start for span in spans)]
        picked["ptr"] = parts["ptr"].new_tensor(counts).cumsum(0)
    return replace(code, slots=len(used)), picked


def stacked(code: Code, parts: Parts) -> Tensor | None:
    """The slots side by side [S,numel] where they are stored so: one GEMM mixes them."""
    name = {"full": "delta", "full_abs": "abs"}.get(code.codec)
    return parts[name].view(code.slots, -1) if name else None


def opened(code: Code, parts: Parts, anchor: Tensor, out: Tensor | None = None) -> Tensor:
    """The anchor and the slots, one a row [S+1,numel]; W_s in place of D_s with full_abs."""
    if out is None:
        size = (code.slots + 1, anchor.numel())
        out = torch.empty(size, dtype=anchor.dtype, device=anchor.device)
    out[0] = anchor.reshape(-1)
    together = stacked(code, parts)
    if together is not None:
        out[1:] = together
    else:
        for s in range(code.slots):
            out[s + 1] = slot(code, parts, s, anchor).view(-1)
    return out


def lead(code: Code, c: Tensor) -> Tensor:
    """The anchor's own coefficient [B,1]: 1, or 1 - sum_s c_s with full_abs."""
    if code.codec == "full_abs":
        wide = torch.promote_types(c.dtype, torch.float32)
        return (1 - c.sum(1, keepdim=True, dtype=wide)).to(c.dtype)
    return torch.ones_like(c[:, :1])


def mixed(
    code: Code, parts: Parts, anchor: Tensor, c: Tensor, out: Tensor | None = None,
    room: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A + sum_s c_s D_s for each row of c, in the anchor's dtype.

    With full_abs it is (1 - sum_s c_s) A + sum_s c_s W_s: a one-hot row gives W_s bit for bit.

    Shapes: anchor [*shape], c [B,S] -> [B,*shape]; `out` [B,numel] and `room` [S+1,numel] are
    overwritten if given.
    """
    code, parts = plain(code), expanded(code, parts)
    c = c.to(device=anchor.device, dtype=anchor.dtype)
    flat, together = anchor.reshape(1, -1), stacked(code, parts)
    if code.codec == "low_rank":
        u, v = parts["u"].to(c.dtype), parts["v"].to(c.dtype)
        each = u.unsqueeze(0) * c.index_select(1, parts["slot"].long()).unsqueeze(1)
        result = flat.view(code.matrix) + each @ v
        result = result if out is None else out.view_as(result).copy_(result)
    elif together is not None and together.dtype == c.dtype and len(c) <= code.slots:
        own = flat * lead(code, c) if code.codec == "full_abs" else flat
        result = torch.addmm(own, c, together, out=out)
    else:
        whole = torch.cat([lead(code, c), c], 1)
        result = torch.mm(whole, opened(code, parts, anchor, room), out=out)
    return result.view(len(c), *code.shape)


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
    code, parts = plain(code), expanded(code, parts)
    shape = (len(index), *code.shape[1:])
    if code.codec in ("sparse", "row_sparse"):
        pick_one = _sparse_rows if code.codec == "sparse" else _changed_rows
        each = [pick_one(code, parts, s, index) for s in range(code.slots)]
        return replace(code, shape=shape, codec="full"), {"delta": torch.stack(each)}
    picked = dict(parts)
    for name, axis in _axes(code).items():
        picked[name] = parts[name].index_select(axis, index)
    return replace(code, shape=shape), picked


def _sparse_rows(code: Code, parts: Parts, s: int, index: Tensor) -> Tensor:
    """Some rows of slot s of a sparse code."""
    occ, own = parts["occ"][s], parts["val"][parts["ptr"][s] :]
    ends = _bits(occ).cumsum(0)
    there = unpack(occ[index], code.matrix[1])
    before = ends[index] - there.sum(1)  # values of the slot in the rows above
    place = before.unsqueeze(1) + there.cumsum(1) - 1
    found = own.new_zeros(there.shape)
    found[there] = own[place[there]]
    return found.view(len(index), *code.shape[1:])


def _bits(packed: Tensor) -> Tensor:
    """How many bits are set in each row [...,rows,bytes] -> [...,rows]."""
    bits = packed - ((packed >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return ((bits + (bits >> 4)) & 0x0F).sum(-1)


def _changed_rows(code: Code, parts: Parts, s: int, index: Tensor) -> Tensor:
    """Some rows of slot s of a row_sparse code; 0 where it has none."""
    first, last = parts["ptr"][s : s + 2].tolist()
    held, values = parts["rowidx"][first:last], parts["rowval"][first:last]
    found = values.new_zeros(len(index), *code.shape[1:])
    if last > first:
        place = torch.searchsorted(held, index).clamp_max(last - first - 1)
        there = held[place] == index
        found[there] = values[place[there]].view(-1, *code.shape[1:])
    return found


def bands(code: Code, parts: Parts, height: int) -> Iterator[tuple[slice, Code, Parts]]:
    """The code in bands of `height` rows: which rows, and the code of those alone, as views but
    for the values of sparse codes."""
    code, parts = plain(code), expanded(code, parts)
    total = code.matrix[0]
    starts = _starts(code, parts) if code.codec in ("sparse", "row_sparse") else None
    for first in range(0, total, height):
        n = min(height, total - first)
        if starts is not None:
            some = _ragged(code, parts, starts, first, n)
        else:
            cut = {k: parts[k].narrow(axis, first, n) for k, axis in _axes(code).items()}
            some = {**parts, **cut}
        yield slice(first, first + n), replace(code, shape=(n, *code.shape[1:])), some


def _axes(code: Code) -> dict[str, int]:
    """Along which axis the tensor's rows lie, for the parts that have them."""
    return {name: part.axis for name, part in code.parts.items() if part.axis is not None}


def _starts(code: Code, parts: Parts) -> list[list[int]]:
    """Where each row's values begin, for each slot: S lists of rows+1 places."""
    pairs = zip(parts["ptr"].tolist(), parts["ptr"].tolist()[1:], strict=False)
    if code.codec == "row_sparse":
        edges = torch.arange(code.matrix[0] + 1, device=parts["rowidx"].device)
        return [(torch.searchsorted(parts["rowidx"][a:b], edges) + a).tolist() for a, b in pairs]
    counts = _bits(parts["occ"]).cumsum(-1)
    return [[a, *(row + a).tolist()] for row, (a, _) in zip(counts, pairs, strict=True)]


def _ragged(
    code: Code, parts: Parts, starts: list[list[int]], first: int, n: int
) -> dict[str, Tensor]:
    """The parts of a sparse or row_sparse code for `n` rows from `first` on."""
    spans = [slice(place[first], place[first + n]) for place in starts]
    ptr = torch.tensor([0, *(span.stop - span.start for span in spans)]).cumsum(0)
    if code.codec == "sparse":
        values = torch.cat([parts["val"][span] for span in spans])
        return {"occ": parts["occ"].narrow(1, first, n), "val": values, "ptr": ptr}
    index = torch.cat([parts["rowidx"][span] for span in spans]) - first
    values = torch.cat([parts["rowval"][span] for span in spans])
    return {"rowidx": index, "rowval": values, "ptr": ptr}


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a shape; a vector is one row."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))
