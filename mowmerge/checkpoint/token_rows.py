"""Which rows of which modules an adapter's config says are trained: trainable_token_indices."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

KEY = "trainable_token_indices"


def numbers(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The rows that are named of a module, whose own name or its end the config has."""
    given = config.get(KEY)
    if isinstance(given, Mapping):
        fits = [name for name in given if _ends(module, name)]
        given = given[max(fits, key=len)] if fits else ()
    return tuple(given or ())


def unsaved(config: Mapping[str, Any], modules: Collection[str]) -> str:
    """What the config names and none of the modules with rows has; empty where there is nothing.

    Of modules that are tied peft saves one: then another has rows of the same numbers.
    """
    given = config.get(KEY) or {}
    if not isinstance(given, Mapping):
        return "" if modules else "the embedding"
    held = {numbers(config, module) for module in modules}
    lacking = (
        name
        for name, rows in given.items()
        if not any(_ends(module, name) for module in modules) and tuple(rows) not in held
    )
    return next(lacking, "")


def _ends(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")
