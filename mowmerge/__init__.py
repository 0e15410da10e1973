"""mowmerge turns many fine-tuned checkpoints of a model into one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mowmerge.api import (
        Result,
        Trained,
        check,
        evaluate,
        extract,
        inspect,
        load,
        merge,
        push,
        train_router,
    )
    from mowmerge.methods.registry import merge_method

__all__ = [
    "Result", "Trained", "__version__", "check", "evaluate", "extract", "inspect", "load", "merge",
    "merge_method", "push", "train_router",
]  # fmt: skip

_HOMES = {"merge_method": "mowmerge.methods.registry"}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import mowmerge` is instant."""
    if name not in __all__:
        raise AttributeError(f"module 'mowmerge' has no attribute '{name}'")
    return getattr(import_module(_HOMES.get(name, "mowmerge.api")), name)
