"""Rows for tokens that a model lacks, by the recipe's rules: whose row stands for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mowmerge.errors import Problem
from mowmerge.placement import MEAN, NONE
from mowmerge.recipe.vocabulary import Row

if TYPE_CHECKING:
    from numpy import bool_
    from numpy.typing import NDArray

    from mowmerge.checkpoint.tokens import Holder
    from mowmerge.vocabulary import Placing


class Lines:
    """One model's rows by the recipe's rules: of each model that lends any, the row that does."""

    def __init__(self, work: Placing, model: Holder, having: Sequence[str]) -> None:
        import numpy

        self._work, self._model, self._having = work, model, having
        own = work.own[model.name]
        self.lines = {name: numpy.full(work.rows, NONE, dtype=numpy.int32) for name in having}
        self.lines = {model.name: own.copy(), **self.lines, model.name: own.copy()}
        self.rules = numpy.full(work.rows, "", dtype="U5")
        lacking, tokens = own == NONE, work.worded
        self._base(lacking & ~tokens)
        self.rules[:] = ""
        self._apply(work.asked.missing, lacking & tokens, ("missing",))
        for token, about in work.asked.tokens.items():
            if token in work.ids and (about.force or about.source is not None):
                one = counted(work.rows) == work.ids[token]
                if about.force or (one & lacking).any():
                    rule = about.source or work.asked.missing
                    self._apply(rule, one, ("tokens", token), token)
        named, count = numpy.unique(self.rules[self.rules != ""], return_counts=True)
        self.counts = dict(zip(named.tolist(), count.tolist(), strict=True))

    def _apply(
        self, rule: str | Row, rows: NDArray[bool_], loc: tuple[str, ...], token: str = ""
    ) -> None:
        """Gives these rows what the rule says."""
        if not rows.any():
            return
        for line in self.lines.values():
            line[rows] = NONE
        if rule == "base":
            self._base(rows)
        elif rule == "mean":
            self._mean(rows)
        elif rule == "zero":
            self.rules[rows] = "zero"
        elif isinstance(rule, Row):
            self._row(rule, rows, loc, token)

    def _row(self, row: Row, rows: NDArray[bool_], loc: tuple[str, ...], token: str) -> None:
        """Another token's row, or another model's row of the same token."""
        name = row.model or self._model.name
        lender = self._work.models[name]
        if name not in self._having:
            self._base(rows)
            return
        if not row.other:
            theirs = self._work.own[name]
            has = rows & (theirs > NONE)
            self.lines[name][has], self.rules[has] = theirs[has], "row"
            if token and not has.any():
                self._lacks(f"the token '{token}'", name, loc)
            self._base(rows & ~has)
            return
        at = row.id if row.id is not None else lender.ids.get(str(row.token), NONE)
        if not 0 <= at < lender.rows:
            what = f"the row {at}" if row.id is not None else f"the token '{row.token}'"
            self._lacks(what, name, loc)
            return
        self.lines[name][rows], self.rules[rows] = at, "row"

    def _base(self, rows: NDArray[bool_]) -> None:
        """The base's rows; where it has none the mean."""
        if "base" in self._having:
            theirs = self._work.own["base"]
            has = rows & (theirs > NONE)
            self.lines["base"][has], self.rules[has] = theirs[has], "base"
            rows = rows & ~has
        self._mean(rows)

    def _mean(self, rows: NDArray[bool_]) -> None:
        """The mean over the models that have a row; the base's where none has; where nobody has one
        that of all the model's own rows, or for a token what `unseen` says."""
        left = rows.copy()
        everyone = [name for name in self._having if name in self._work.recipe.models]
        for name in everyone:
            theirs = self._work.own[name]
            has = rows & (theirs > NONE)
            self.lines[name][has], self.rules[has] = theirs[has], "mean"
            left &= ~has
        if "base" in self._having and "base" not in everyone:
            theirs = self._work.own["base"]
            has = left & (theirs > NONE)
            self.lines["base"][has], self.rules[has] = theirs[has], "base"
            left &= ~has
        if self._work.asked.unseen == "zero":
            self.rules[left & self._work.worded] = "zero"
            left &= ~self._work.worded
        self.lines[self._model.name][left], self.rules[left] = MEAN, "own"

    def _lacks(self, what: str, name: str, loc: tuple[str, ...]) -> None:
        problem = Problem(
            f"model '{name}' has not {what}", self._work.where(*loc),
            "name a token that it has, or another model",
        )  # fmt: skip
        if problem not in self._work.problems:
            self._work.problems.append(problem)


def counted(length: int) -> NDArray[Any]:
    """0, 1, 2 ... as an array."""
    import numpy

    return numpy.arange(length)
