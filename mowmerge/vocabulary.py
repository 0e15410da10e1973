"""Places vocabulary rows by token, as the recipe asks, and says where that is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mowmerge.checkpoint import naming, special, tokenizers, union
from mowmerge.checkpoint.source import config
from mowmerge.checkpoint.tokenizers import Tokenizer
from mowmerge.checkpoint.tokens import Holder, after, axis, height, home, of
from mowmerge.checkpoint.union import Addition
from mowmerge.errors import CheckpointError, Problem, did_you_mean
from mowmerge.placement import NONE, Placed, Rows, Share, Vocabulary
from mowmerge.plan import Adapted, Source, Stored, TensorJob, config_source
from mowmerge.recipe.model import Recipe
from mowmerge.recipe.vocabulary import Row
from mowmerge.rows import Lines, counted
from mowmerge.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    from numpy import bool_, int32
    from numpy.typing import NDArray

PARSED = 16  # bytes of memory that a byte of tokenizer.json takes, about


def holders(recipe: Recipe, sources: Mapping[str, Source], donor: str) -> dict[str, Holder]:
    """Every model by its tokens; CheckpointError with all whose tokens are not to be found."""
    found: dict[str, Holder] = {}
    problems: list[Problem] = []
    names, seen = sources[donor].specs, dict[bytes, Tokenizer]()
    for model, source in sources.items():
        assert not isinstance(source, Placed)
        nested, folder = of(source), home(source)
        settings = config(Path(config_source(source).folder))
        inside = nested is not None and Path(nested.folder) == folder
        text = nested.files.get(tokenizers.FILE) if nested and inside else None
        where = recipe.where(*(("base",) if model == "base" else ("models", model)))
        try:
            held = text.encode() if text else tokenizers.content(folder)
            tokenizer = seen.get(held) or tokenizers.understood(folder, held)
        except CheckpointError as error:
            problems += [Problem(p.message, f"{where}: {p.where}", p.hint) for p in error.problems]
            continue
        seen[held] = tokenizer  # once, in however many folders it lies
        specs = source.specs if model == donor else naming.aligned(source.specs, names)
        settings = nested.changed(settings) if nested else settings
        found[model] = Holder(model, source, folder, tokenizer, len(held), specs, settings)
        if not found[model].rows:
            hint = "leave `vocabulary` out where models read no text"
            problems.append(Problem(f"model '{model}' has no embedding of tokens", where, hint))
    if problems:
        raise CheckpointError(problems)
    return found


def placed(
    recipe: Recipe, sources: Mapping[str, Source], donor: str, outside: Stored | None
) -> tuple[Mapping[str, Source], Vocabulary | None, list[str]]:
    """The sources with vocabulary rows placed as the recipe asks, the vocabulary, and warnings;
    where it asks for none the sources, and what a nested recipe among them gives its result.
    `outside` are the files of the tokenizer that it names, where that is no model's.

    Raises:
        CheckpointError: a model has no tokenizer.json; tokenizers that cannot be reconciled; a
            token of the recipe that no model has; all of them at once.
    """
    if recipe.vocabulary is None:
        nested = of(sources[donor])
        return sources, nested and replace(nested, outside=None), []
    work = Placing(recipe, holders(recipe, sources, donor), donor, outside)
    return work.sources(), work.vocabulary(), work.warnings


def _lender(recipe: Recipe, stored: Stored) -> Holder:
    """A tokenizer that is no model's."""
    folder, named = Path(stored.folder), recipe.vocabulary and recipe.vocabulary.outside
    try:
        held = tokenizers.content(folder)
        tokenizer = tokenizers.understood(folder, held)
        return Holder(str(named), stored, folder, tokenizer, len(held), {}, config(folder))
    except CheckpointError as error:
        at = recipe.where("vocabulary", "source", "tokenizer")
        told = [Problem(p.message, f"{at}: {p.where}", p.hint) for p in error.problems]
        raise CheckpointError(told) from error


def compared(
    recipe: Recipe, sources: Mapping[str, Source], donor: str, jobs: Sequence[TensorJob],
    tokens: Vocabulary | None,
) -> tuple[list[str], list[Problem]]:  # fmt: skip
    """Models that read texts otherwise than the tokenizer that is written: a warning where that
    does no harm to weights, a problem where rows of different tokens would be merged."""
    asked, warnings, problems = recipe.vocabulary, [], []
    written = sources[donor]
    here = Path(tokens.folder) if asked and tokens else home(written)
    for model, source in sources.items():
        if asked is None and model == donor and isinstance(source, Adapted) and source.resized:
            problems.append(_resized(recipe, model, source))
            continue
        folder = home(source)
        same = tokenizers.alike(here / tokenizers.FILE, folder / tokenizers.FILE)
        if asked is not None or (same and of(written) is None and of(source) is None):
            told = [*tokenizers.retold(here, folder)]
        else:
            ours, theirs = _ids(written), _ids(source)
            crossed = _crossed(ours, theirs, model, jobs)
            if crossed:
                problems.append(_permuted(recipe, model, crossed))
                continue
            told = [*tokenizers.differences(here, folder, ours, theirs)]
        if told:
            text = "; ".join(told)
            warnings.append(f"'{model}' will read texts otherwise than it learned: {text}")
    return warnings, problems


def _ids(source: Source) -> Mapping[str, int]:
    """The id of each token of a model, empty where there is no tokenizer.json to understand."""
    nested, folder = of(source), home(source)
    if nested and tokenizers.FILE in nested.files and Path(nested.folder) == folder:
        return tokenizers.read(folder, nested.files[tokenizers.FILE]).ids
    return tokenizers.known(folder)


def _crossed(
    ours: Mapping[str, int], theirs: Mapping[str, int], model: str, jobs: Sequence[TensorJob]
) -> list[tuple[str, int, int]]:
    """Tokens whose rows the merge would take for another's: each with the id written, and the
    model's."""
    rows = [
        height(job.output)
        for job in jobs
        if naming.by_token(job.output.name) and any(i.model == model for i in job.models)
    ]
    moved = tokenizers.moved(ours, theirs) if rows else []
    return [each for each in moved if max(each[1:]) < max(rows)]


def _permuted(recipe: Recipe, model: str, crossed: Sequence[tuple[str, int, int]]) -> Problem:
    token, here, there = crossed[0]
    more = f" and {len(crossed) - 1} more have other ids" if len(crossed) > 1 else ""
    return Problem(
        f"the token {token!r} has id {here} in the tokenizer that is written and {there} in that of"
        f" '{model}'{more}: rows of different tokens would be merged",
        recipe.where(*(("base",) if model == "base" else ("models", model))),
        "place the rows by token, `vocabulary: {source: union}` (or base, or a model's name)",
    )


def _resized(recipe: Recipe, model: str, source: Adapted) -> Problem:
    name = source.resized[0]
    has, had = (each.specs[name].shape[0] for each in (source, source.model))
    return Problem(
        f"its adapter has {has} rows of '{name}', and what it is on {had}",
        recipe.where("models", model, "adapter"),
        "place the rows by token, `vocabulary: {source: union}` (or base, or a model's name)",
    )


def tied(source: Source, name: str, held: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """What a model has in the place of a tensor that it does not store, if that is tied."""
    rows = source.rows.get(name) if isinstance(source, Placed) else None
    return rows.spec if rows else naming.tied_to(name, held)


class Placing:
    """One recipe's vocabulary as it is worked out: tokens first, then each model's rows."""

    def __init__(
        self, recipe: Recipe, models: Mapping[str, Holder], donor: str, outside: Stored | None
    ) -> None:
        assert recipe.vocabulary is not None
        self.recipe, self.asked, self.models, self.donor = recipe, recipe.vocabulary, models, donor
        named = donor if self.asked.source == "union" else str(self.asked.source)
        self.outside = outside
        self.lender = _lender(recipe, outside) if outside else models[named]
        self.problems: list[Problem] = [*self._apart()]
        self.warnings = [
            f"the tokenizer of '{name}' changes or splits texts otherwise than that of"
            f" '{self.lender.name}', which is written"
            for name, model in models.items()
            if not model.tokenizer.splits_as(self.lender.tokenizer)
        ]
        self.brought: dict[str, int] = {}
        self.raise_problems()
        self.additions = [*self._added(), *self._wanted()]
        self.raise_problems()
        self.tokenizer = union.extended(self.lender.tokenizer, self.additions)
        self.ids = self.tokenizer.ids
        least, multiple = 1 + max(self.ids.values()), self.asked.pad_to_multiple_of
        if least > 4 * (len(self.ids) + self.lender.rows):
            raise CheckpointError(
                f"it gives a token the id {least - 1}, far beyond its {len(self.ids)} tokens",
                where=str(self.lender.folder / tokenizers.FILE), hint="save the tokenizer again",
            )  # fmt: skip
        tall = [self.lender.rows, *sorted(special.sizes(self.lender.settings))]
        rows = next((n for n in (tall if outside else tall[:1]) if n >= least), least)
        self.rows = -(-least // multiple) * multiple if multiple else rows
        self.at: list[str | None] = [None] * self.rows
        for token, i in self.ids.items():
            self.at[i] = token
        self.own = {name: self._own(model) for name, model in models.items()}
        self.counts: dict[str, dict[str, int]] = {}
        self._known: dict[tuple[str, ...], Mapping[str, NDArray[int32]]] = {}

    def raise_problems(self) -> None:
        """CheckpointError with all that was found, if anything was."""
        if self.problems:
            raise CheckpointError(self.problems)

    def where(self, *loc: str) -> str:
        """The place of a key of `vocabulary` in the recipe."""
        return self.recipe.where("vocabulary", *loc)

    # --- tokens

    def _apart(self) -> Iterator[Problem]:
        """Models whose tokens are not the lender's in another order."""
        for name, model in self.models.items():
            joined = self.asked.source == "union"
            why = tokenizers.apart(self.lender.tokenizer, model.tokenizer, joined=joined)
            if why:
                hint = (
                    "leave it out: mowmerge places rows by the token's string"
                    if "stand for" in why
                    else "name whose tokens the output has: `vocabulary: {source: NAME}`"
                )
                yield Problem(why, f"{self.where('source')}: model '{name}'", hint)

    def _added(self) -> Iterator[Addition]:
        """What a union adds: each model's tokens that none before it has, in order of id."""
        if self.asked.source != "union":
            return
        taken = set(self.lender.tokenizer.ids)
        for model in self.models.values():
            new = sorted(model.ids.keys() - taken, key=model.ids.__getitem__)
            self.brought[model.name] = len(new)
            taken.update(new)
            yield from (Addition(token, model.tokenizer) for token in new)

    def _wanted(self) -> Iterator[Addition]:
        """Tokens that the recipe names and the lender lacks: another model's, or new ones."""
        union_ = self.asked.source == "union"
        for token, about in self.asked.tokens.items():
            having = [m for m in self.models.values() if token in m.ids]
            if token in self.lender.tokenizer.ids or (having and union_):
                continue
            row = about.source
            if having:
                yield Addition(token, having[0].tokenizer, verbatim=True)
                self.brought[having[0].name] = self.brought.get(having[0].name, 0) + 1
            elif row == "zero" or (isinstance(row, Row) and row.other):
                self.warnings.append(f"the token '{token}', which no model has, is added")
                yield Addition(token, None, verbatim=True)
            else:
                near = sorted({t for m in self.models.values() for t in m.tokenizer.added})
                new = "a new one takes another's row: {model: NAME, token: STRING}"
                hint = did_you_mean(token, near) or new
                where = self.where("tokens", token)
                self.problems.append(Problem(f"no model has the token '{token}'", where, hint))

    # --- rows

    def _own(self, model: Holder) -> NDArray[int32]:
        """The model's own row for each of the output's; for those without a token its row of that
        number, where it has no token there either."""
        import numpy

        ids = model.ids
        found = numpy.fromiter(
            (NONE if token is None else ids.get(token, NONE) for token in self.at),
            dtype=numpy.int32, count=self.rows,
        )  # fmt: skip
        spare = numpy.zeros(self.rows, dtype=bool)
        spare[: model.rows] = True
        taken = numpy.fromiter(ids.values(), dtype=numpy.int64, count=len(ids))
        spare[taken[taken < self.rows]] = False
        spare &= ~self.worded
        found[spare] = numpy.flatnonzero(spare)
        return found

    @cached_property
    def worded(self) -> NDArray[bool_]:
        """Which rows are a token's."""
        import numpy

        return numpy.fromiter((t is not None for t in self.at), dtype=bool, count=self.rows)

    def sources(self) -> dict[str, Source]:
        """Every model with its rows placed."""
        names = dict.fromkeys(n for m in self.models.values() for n in m.specs if m.has(n))
        self.tensors = tuple(names)
        found: dict[str, Source] = {}
        for name, model in self.models.items():
            lenders = [model, *(m for m in self.models.values() if m is not model)]
            placed = {
                own: self._rows(model, tensor, own, lenders)
                for tensor in names
                if (own := self._called(model, tensor))
            }
            used = 1 + max((n for rows in placed.values() for n, _ in rows.inputs), default=0)
            taken = tuple(m.source for m in lenders[:used])
            found[name] = Placed(model.source, taken, placed)
        self.raise_problems()
        return found

    def _called(self, model: Holder, tensor: str) -> str:
        """What the model's own is called; empty where it has none. A tied head is one of its own
        where the output has one: rows that it lacks are of others' heads, not embeddings."""
        if model.has(tensor):
            return model.specs[tensor].name
        tied = tensor not in model.specs and self.models[self.donor].has(tensor)
        return tensor if tied and model.lent(tensor) else ""

    def _rows(self, model: Holder, tensor: str, name: str, lenders: Sequence[Holder]) -> Rows:
        """How a model's tensor is placed, or what is tied to it."""
        import numpy

        own = model.lent(tensor)
        assert own is not None
        dtype = own.dtype
        lent = {m.name: spec for m in lenders if (spec := m.lent(tensor))}
        lent = {n: s for n, s in lent.items() if after(s) == after(own)} | {model.name: own}
        lines = self._lines(model, tuple(lent))
        used = {n: line for n, line in lines.items() if n == model.name or (line > NONE).any()}
        order = [m.name for m in lenders]
        index = numpy.stack(list(used.values()))
        shape = list(own.shape)
        shape[axis(own)] = self.rows
        several = {lent[n].dtype for n in used}
        narrow = DTYPES[own.dtype].bits < 32 and bool(((index > NONE).sum(0) > 1).any())
        if model.name != self.donor and (len(several) > 1 or narrow):
            dtype = "F64" if "F64" in several else "F32"
        spec = replace(own, name=name, shape=tuple(shape), dtype=dtype)
        return Rows(spec, tuple((order.index(n), lent[n].name) for n in used), index)

    def _lines(self, model: Holder, having: tuple[str, ...]) -> Mapping[str, NDArray[int32]]:
        """Which row of each model that has a tensor takes part in each of this model's rows."""
        key = (model.name, *having)
        if key not in self._known:
            lines = Lines(self, model, having)
            self._known[key] = lines.lines
            self.counts.setdefault(model.name, lines.counts)
        return self._known[key]

    # --- what is told

    def vocabulary(self) -> Vocabulary:
        """The output's vocabulary; `sources` comes first."""
        lender, donor = self.lender, self.models[self.donor]
        nested = of(lender.source)
        held = nested.files if nested and Path(nested.folder) == lender.folder else None
        files = union.files(lender.folder, lender.tokenizer, self.tokenizer, held)
        changes = special.resized(donor.settings, donor.rows, self.rows)
        if lender is not donor:
            words = {i: token for token, i in donor.tokenizer.ids.items()}

            def moved(i: int) -> int | None:
                return self.ids.get(words.get(i, ""))

            renamed, lost = special.renamed(donor.settings, lender.settings, moved)
            changes |= renamed
            for key in lost:
                self.warnings.append(f"config.json: {key} is dropped, since its token is")
            file = special.generation(donor.folder, moved)
            if file and not (lender.folder / special.GENERATION).is_file():
                files[special.GENERATION] = file
        read = {id(m.tokenizer): m.size for m in (*self.models.values(), lender)}
        return Vocabulary(
            source=lender.name,
            tokens=len(self.ids),
            rows=self.rows,
            padding=self.rows - int(self.worded.sum()),
            added=len(self.additions),
            models={
                name: self._share(model, self.brought.get(name, 0))
                for name, model in self.models.items()
            },
            tensors=self.tensors,
            folder=str(lender.folder),
            files=files,
            extended=bool(self.additions) or bool(nested and nested.extended),
            config=changes,
            parsed=PARSED * sum(read.values()),
            outside=self.outside,
        )

    def _share(self, model: Holder, added: int) -> Share:
        own = self.own[model.name][self.worded]
        shared = int((own > NONE).sum())
        still = int((self.own[model.name] == counted(self.rows))[self.worded].sum())
        return Share(
            tokens=len(model.ids), shared=shared, added=added, moved=shared - still,
            left=len(model.ids) - shared, missing=self.counts.get(model.name, {}),
        )  # fmt: skip
