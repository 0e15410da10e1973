"""What adapter_config.json says: whether values are of the kinds that peft writes, and patterns."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

PREFIX = "base_model.model."  # of every name in the file


def by_pattern(patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's path or its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def malformed(config: Mapping[str, Any]) -> str:
    """The first key whose value is of another kind than peft writes; empty where all are."""
    return next((k for k, fits in _KINDS.items() if k in config and not fits(config[k])), "")


def _number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value)


def _names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(n, str) for n in value))


def _numbers_by_pattern(value: Any) -> bool:
    if value is None or not isinstance(value, dict):
        return value is None
    try:
        return all(re.compile(pattern) and _number(each) for pattern, each in value.items())
    except re.error:
        return False


def _rows(value: Any) -> bool:
    given = list(value.values()) if isinstance(value, dict) else [value or []]
    return all(isinstance(rows, list) and all(isinstance(n, int) for n in rows) for rows in given)


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "r": _number, "lora_alpha": _number, "rank_pattern": _numbers_by_pattern,
    "alpha_pattern": _numbers_by_pattern, "modules_to_save": _names, "target_parameters": _names,
    "trainable_token_indices": _rows,
}  # fmt: skip
