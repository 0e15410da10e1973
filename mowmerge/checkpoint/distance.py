"""How far a tensor that is being written lies from the one it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

from mowmerge.checkpoint import naming
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.errors import CheckpointError
from mowmerge.plan import RUN, Stored
from mowmerge.tensors import DTYPES, Tensor, TensorSpec, torch

STEP = 4 * RUN  # elements compared at a time


class Reference:
    """The expert W_k that a checkpoint stands for, and the base W_0 where there is one."""

    def __init__(
        self, expert: Stored, base: Stored | None, specs: Mapping[str, TensorSpec]
    ) -> None:
        """`specs`: what will be compared, by name.

        Raises:
            CheckpointError: the expert lacks one of them, or has it in another shape.
        """
        self.expert, self.base = expert, base
        self._views = [_view(stored, specs) for stored in (expert, base) if stored]
        self._readers = [StoredReader(stored) for stored in (expert, base) if stored]
        for name, spec in specs.items():
            found = self._views[0].get(name)
            if found is None or found.shape != spec.shape:
                theirs = f"as {list(found.shape)}" if found else "not at all"
                raise CheckpointError(
                    f"'{name}' is {list(spec.shape)} here, and the reference has it {theirs}",
                    where=expert.origin,
                    hint="compare with the expert that the checkpoint was made of",
                )

    def beside(self, spec: TensorSpec) -> Distance:
        """The distance of one tensor, to be fed its blocks in any order."""
        found = [view.get(spec.name) for view in self._views]
        pairs = [(r, s) for r, s in zip(self._readers, found, strict=True) if s]
        return Distance(spec, [pair for pair in pairs if pair[1].shape == spec.shape])


def _view(stored: Stored, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """A model's tensors under the names in `specs`: its own, behind another prefix, or tied."""
    held = naming.aligned(stored.specs, specs)
    found = {name: held.get(name) or naming.tied_to(name, held) for name in specs}
    return {name: spec for name, spec in found.items() if spec is not None}


class Distance:
    """|W - W_k| and |W_k - W_0| of one tensor, summed in fp64; a context manager."""

    def __init__(self, spec: TensorSpec, against: list[tuple[StoredReader, TensorSpec]]) -> None:
        self._spec, self._against, self._closing = spec, against, ExitStack()
        self.error, self.moved = 0.0, 0.0  # squared

    def __enter__(self) -> Distance:
        with ExitStack() as stack:
            self._handles = [
                (stack.enter_context(closing(reader.open(spec.name))), spec)
                for reader, spec in self._against
            ]
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.close()

    def update(self, start: int, data: memoryview) -> None:
        """Takes in the bytes of a block that begins at byte `start`."""
        ours = torch.frombuffer(data, dtype=DTYPES[self._spec.dtype].torch)
        first = start // self._spec.itemsize
        for at in range(0, len(ours), STEP):
            some = ours[at : at + STEP].double()
            where = first + at, first + at + len(some)
            theirs = [self._block(i, *where) for i in range(len(self._handles))]
            self.error += float((some - theirs[0]).square().sum())
            if len(theirs) > 1:
                self.moved += float((theirs[0] - theirs[1]).square().sum())

    def _block(self, i: int, start: int, stop: int) -> Tensor:
        handle, spec = self._handles[i]
        value = torch.empty(stop - start, dtype=DTYPES[spec.dtype].torch)
        handle.read(start, stop, value.view(torch.uint8).numpy().data)
        return value.double()

    def figures(self) -> dict[str, Any]:
        """exact; error = |W - W_k|; moved = |W_k - W_0| and relative = error / moved, None where
        there is no base or the expert did not move the tensor."""
        error, moved = self.error**0.5, self.moved**0.5 if len(self._handles) > 1 else None
        relative = error / moved if moved else None
        return {"exact": not error, "error": error, "moved": moved, "relative": relative}
