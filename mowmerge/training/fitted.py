"""What a fit pass gives, and how it is kept for a merge that is cut off afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mowmerge.plan import Plan
from mowmerge.recipe import coefficients
from mowmerge.recipe.coefficients import Coefficients


@dataclass(frozen=True)
class Fitted:
    """A plan with its coefficients in place, what they are, how the fit went by task, how long."""

    plan: Plan
    coefficients: Coefficients
    tasks: Mapping[str, Mapping[str, Any]]
    seconds: float


def kept(found: Fitted) -> dict[str, Any]:
    """A fit as plain data, from which `again` makes it without fitting."""
    return {
        "coefficients": found.coefficients.model_dump(mode="json"),
        "warnings": list(found.plan.warnings),
        "tasks": found.tasks,
        "seconds": found.seconds,
    }


def again(plan: Plan, data: Mapping[str, Any]) -> Fitted:
    """The fit of that plan that was kept."""
    found = Coefficients.model_validate(data["coefficients"])
    done = placed(replace(plan, warnings=()), found, data["warnings"])
    return Fitted(done, found, data["tasks"], data["seconds"])


def placed(plan: Plan, found: Coefficients, warnings: Sequence[str]) -> Plan:
    """The plan with its coefficients in place, and more warnings."""
    rows = found.tensors
    jobs = [coefficients.applied(j, rows[j.output.name]) if j.output.name in rows else j
            for j in plan.jobs]  # fmt: skip
    return replace(plan, jobs=tuple(jobs), fit=None, warnings=(*plan.warnings, *warnings))
