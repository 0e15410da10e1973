"""Pictures, and a head that names their class."""

from __future__ import annotations

from mowmerge.evals.classes import answer, encode, score, truths
from mowmerge.evals.loading import load

FAMILY = "head"
WHOLE = False
__all__ = ["FAMILY", "WHOLE", "answer", "encode", "load", "score", "truths"]
