"""One module for each type of task; the evaluator knows none of them in particular.

WHOLE      whether one answer is a whole task's, and says nothing of an item's time.
load       (recipe, task) -> its items; checks all that needs no model.
FAMILY     which model is asked: one with a "head" for the task, an "lm", or a "clip".
encode     (tools, places) -> what a model is given for these items; may run on another thread.
answer     (loaded, way, places, given) -> each item's answer, as JSON has it.
truths     (job, classes) -> what is true of each item; `classes` is the label map of a head.
score      (job, truths, answers) -> the metric's value and each item's part in it.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def of(name: str) -> ModuleType:
    """The module of a type."""
    return import_module(f"{__name__}.{name.replace('-', '_')}")
