"""A pass that goes no further than the hidden states that a classifier looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class _Reached(Exception):
    """Ends a pass of which only the first layers were wanted."""


def until(where: nn.Module, run: Callable[[], Any]) -> Tensor | None:
    """The hidden states that a module gives while `run` runs, which then ends; None if it is not
    reached."""
    found: list[Tensor] = []

    def keep(module: nn.Module, given: Any, result: Any) -> None:
        found.append(states(result))
        raise _Reached

    hook = where.register_forward_hook(keep)
    try:
        run()
    except _Reached:
        return found[0]
    finally:
        hook.remove()
    return None


def states(result: Any) -> Tensor:
    """The hidden states of what a layer or a model returned."""
    if isinstance(result, dict):
        result = result.get("last_hidden_state", next(iter(result.values())))
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found.detach()


def layer_stack(backbone: nn.Module) -> nn.ModuleList:
    """The first list of layers of a backbone: the encoder's where it has two."""
    lists = (m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m))
    return next(m for m in lists if len({type(layer) for layer in m}) == 1 or len(m) > 1)
