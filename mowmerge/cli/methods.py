"""`mowmerge methods`: what can be merged with, and what each method takes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mowmerge.methods.registry import MethodSpec, Parameter


def methods(
    name: Annotated[str | None, typer.Argument(help="Describe this method only.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the methods, or describe one: what it computes, needs and takes."""
    from mowmerge.methods.registry import get, names

    if name is not None:
        spec = get(name)
        print(json.dumps(described(spec), indent=2) if json_ else _page(spec))
        return
    specs = [get(each) for each in names()]
    if json_:
        print(json.dumps({"methods": [described(spec) for spec in specs]}, indent=2))
    else:
        print(_table([[spec.name, _needs(spec), spec.summary] for spec in specs]))


def described(spec: MethodSpec) -> dict[str, Any]:
    """A method as plain data."""
    base = "required" if spec.needs_base else "optional" if spec.wants_base else "unused"
    return {
        "name": spec.name,
        "family": spec.family,
        "origin": spec.origin,
        "summary": spec.summary,
        "paper": spec.paper,
        "base": base,
        "models": {"exactly": spec.count, "at_least": spec.count or spec.at_least},
        "parameters": [
            {
                "name": p.name,
                "kind": p.kind,
                "range": p.range or None,
                "choices": list(p.choices),
                "default": p.default,
                "per_model": p.per_model,
                "help": p.help,
            }
            for p in spec.parameters.values()
        ],
        "fitted": spec.fit,
        "laws": {law: dict(wanted) for law, wanted in spec.laws.items()},
        "exempt": dict(spec.exempt),
        "doc": spec.doc,
    }


def _page(spec: MethodSpec) -> str:
    rows = [["parameter", "values", "default", "per model", "meaning"]]
    for p in spec.parameters.values():
        each = "yes" if p.per_model else "no"
        rows.append([p.name, _values(p), _word(p.default), each, p.help])
    laws = [
        law + (f" (with {_given(wanted)})" if wanted else "") for law, wanted in spec.laws.items()
    ]
    parts = [f"{spec.name} ({_needs(spec)})", spec.doc]
    parts += [_table(rows)] if len(rows) > 1 else []
    parts += [f"Fitted on the recipe's tasks: {spec.fit}"] if spec.fit else []
    parts += [f"Laws: {', '.join(laws) or 'none'}\nPaper: {spec.paper}"]
    return "\n\n".join(parts)


def _needs(spec: MethodSpec) -> str:
    """`base, 2 models, tasks`: what the method must be given."""
    count = f"{spec.count}" if spec.count else f"{spec.at_least}+"
    models = f"{count} model" if count == "1" else f"{count} models"
    needs = f"base, {models}" if spec.needs_base else models
    return f"{needs}, tasks" if spec.fit else needs


def _values(p: Parameter) -> str:
    return " | ".join(p.choices) if p.choices else f"{p.kind} {p.range}".strip()


def _given(wanted: Any) -> str:
    return ", ".join(f"{name}: {_word(value)}" for name, value in wanted.items())


def _word(value: Any) -> str:
    """A value as YAML spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(rows: list[list[str]]) -> str:
    """Columns in line, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
