"""The recipe's `vocabulary:`: whose tokens the output has, and where rows that lack come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
    model_validator,
)

from mowmerge.recipe.fields import Count, Strict

Rule = Literal["base", "mean", "zero"]
TAGS = (
    "<rule>",
    "<row>",
    "<name>",
    "<tokenizer>",
)  # stand in the places of pydantic's findings, and in no recipe


def _rule_or_row(value: Any) -> Any:
    if not isinstance(value, Mapping | Row) and value not in get_args(Rule):
        raise ValueError("must be base, mean, zero, or a row such as {model: NAME, token: STRING}")
    return value


class Row(Strict):
    """The row of a token: {token: "<unk>"} is the model's own, {model: chat} that model's row of
    the token itself, {model: chat, token: "<s>"} or {model: chat, id: 1} another one of its."""

    model: str | None = Field(
        default=None,
        description="Whose row: a model of the recipe, or base; absent the model's own.",
    )
    token: str | None = Field(
        default=None, description="The row of which token; absent that of the token itself."
    )
    id: StrictInt | None = Field(default=None, ge=0, description="The row's number, for a token.")

    @model_validator(mode="after")
    def _one(self) -> Row:
        if self.token is not None and self.id is not None:
            raise ValueError("names a token and an id, which are two ways to say one")
        if self.model is None and not self.other:
            raise ValueError("names neither a model nor a token")
        return self

    @property
    def other(self) -> bool:
        """Whether it names another token."""
        return self.token is not None or self.id is not None


Choice = Annotated[
    Annotated[Rule, Tag(TAGS[0])] | Annotated[Row, Tag(TAGS[1])],
    Discriminator(lambda value: TAGS[not isinstance(value, str)]),
    BeforeValidator(_rule_or_row),
]


class Outside(Strict):
    """The tokenizer of a checkpoint that is not merged; its rows are not read."""

    tokenizer: str = Field(min_length=1, description="Hub id (org/name@revision) or path.")


def _name_or_outside(value: Any) -> Any:
    if not isinstance(value, Mapping | Outside) and not (isinstance(value, str) and value):
        raise ValueError("must be union, base, a model's name, or {tokenizer: SOURCE}")
    return value


Whose = Annotated[
    Annotated[str, Tag(TAGS[2])] | Annotated[Outside, Tag(TAGS[3])],
    Discriminator(lambda value: TAGS[2 + (not isinstance(value, str))]),
    BeforeValidator(_name_or_outside),
]


class Token(Strict):
    """What is different for one token: where models that lack it take its row from."""

    source: Choice | None = Field(
        default=None,
        description="base | mean | zero, or a row: {model: NAME, token: STRING}; absent `missing`.",
    )
    force: StrictBool = Field(
        default=False, description="Models that have the token take that row as well."
    )

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, value: Any) -> Any:
        """A rule or a row alone is its source."""
        given = isinstance(value, Mapping) and not value.keys() & {"source", "force"}
        return {"source": value} if isinstance(value, str) or (given and value) else value


class Vocabulary(Strict):
    """Rows of embeddings and heads, placed by token: the output's tokens, and rows that lack.

    Rules for the row of a token that a model lacks: `base` is the base's row, or the mean where
    the base lacks it too; `mean` is the mean over the models that have it; `zero` is zeros.
    """

    source: Whose = Field(
        default="union",
        description="union: the base's tokens (without a base the first model's), then those that"
        " other models add; base, or the name of a model: that one's tokens; {tokenizer: SOURCE}:"
        " those of a tokenizer that is no model's.",
    )
    missing: Choice = Field(
        default="base",
        description="The row of a token that a model lacks: base | mean | zero, or {token: STRING}:"
        " the model's own row of that token.",
    )
    unseen: Literal["mean", "zero"] = Field(
        default="mean",
        description="Where `missing` finds no model that has the token: the mean of all the model's"
        " own rows, or zeros.",
    )
    tokens: Mapping[str, Token] = Field(
        default_factory=dict,
        description="Exceptions by token; one that the source lacks is added to it.",
    )
    pad_to_multiple_of: Count | None = Field(
        default=None,
        description="Rows are a multiple of this; absent as many as the source has, or more.",
    )

    @property
    def outside(self) -> str | None:
        """The source of a tokenizer that is no model's."""
        return self.source.tokenizer if isinstance(self.source, Outside) else None
