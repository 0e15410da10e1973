"""Tables of which experts change few rows: counted in the weights, then stored row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Block, Site, Survey
from mowmerge.methods.gating import in_block_matrix
from mowmerge.tensors import Tensor, TensorSpec, torch


class ChangedRows:
    """How many rows of a table each task vector changes: [N], whatever the blocks."""

    share = 1.0

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._changed: Any = None  # bool [N,rows]

    @property
    def total(self) -> Tensor:
        """Rows by model."""
        return torch.as_tensor(self._changed).sum(1)

    def fresh(self) -> ChangedRows:
        """None counted yet."""
        return ChangedRows(self.columns)

    def observe(self, block: Block) -> None:
        """Takes in a block, which may begin and end within a row."""
        n, start = len(block.values), block.rng.start
        if self._changed is None:
            self._changed = torch.zeros(n, block.numel // self.columns, dtype=torch.bool)
        entries = block.values.reshape(n, -1) != 0
        first, before = divmod(start, self.columns)
        after = -(before + entries.shape[1]) % self.columns
        rows = torch.nn.functional.pad(entries, (before, after)).view(n, -1, self.columns).any(2)
        self._changed[:, first : first + rows.shape[1]] |= rows.cpu()

    def merge(self, other: ChangedRows) -> None:
        """Takes in another part of the same table."""
        self._changed = other._changed if self._changed is None else self._changed | other._changed


def _measure(site: Site) -> ChangedRows | None:
    table = len(site.shape) == 2 and site.rank and not in_block_matrix(site)
    return ChangedRows(site.shape[-1]) if table else None


def _decide(
    totals: Mapping[str, Any], sites: Sequence[Site], p: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The rows that each expert changes of each table."""
    return {"rows": {name: [int(n) for n in total.tolist()] for name, total in totals.items()}}


COUNTED = Survey(_measure, _decide)


def kept_whole(site: Site, found: Mapping[str, Any] | None) -> Code | None:
    """The code of a tensor whose deltas are kept as they are: of a table the rows that experts
    change, where they were counted and are less than all; None where none is changed."""
    full = Code(site.name, site.shape, "full", site.models, "0", site.dtype)
    rows = (found or {}).get("rows", {}).get(site.name)
    if rows is None:
        return full
    few = replace(full, codec="row_sparse", kept=sum(rows), each=tuple(rows))
    return min(few, full, key=_nbytes) if few.kept else None


def _nbytes(code: Code) -> int:
    return sum(TensorSpec("", part.dtype, part.shape).nbytes for part in code.parts.values())
