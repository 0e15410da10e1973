"""Writes the pages that are read off the code: methods, command line, report, both schemas."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mowmerge.cli import COMMANDS
from mowmerge.evals import schema as report_schema
from mowmerge.evals import thresholds
from mowmerge.evals.compare import Change, Comparison
from mowmerge.methods import registry
from mowmerge.recipe.schema import json_schema

HERE = Path(__file__).parent
NOTE = "<!-- made by docs/generate.py -->\n\n"


def pages() -> dict[str, str]:
    """File name -> content of every generated page."""
    return {
        "methods.md": NOTE + methods(),
        "cli.md": NOTE + cli(),
        "report-fields.md": NOTE + report_fields(),
        "recipe.schema.json": json.dumps(json_schema(), indent=1) + "\n",
        "report.schema.json": json.dumps(report_schema.json_schema(), indent=1) + "\n",
    }


def methods() -> str:
    """Every method: what it computes, takes and promises."""
    specs = [registry.get(name) for name in registry.names()]
    lines = ["# Methods", "", "| method | needs | scope | laws | paper |", "|---|---|---|---|---|"]
    for spec in specs:
        base = "base, " if spec.needs_base else ""
        count = str(spec.count) if spec.count else f"{spec.at_least}+"
        count += ", tasks" if spec.fit else ""
        defaults = {p.name: p.default for p in spec.parameters.values()}
        laws = ", ".join(sorted(spec.laws))
        lines.append(
            f"| [{spec.name}](#{spec.name}) | {base}{count} | {spec.scope(defaults)} | {laws} |"
            f" {spec.paper} |"
        )
    lines += [
        "", "Scope is the smallest unit on which the result is exact, with default parameters.",
        "Laws: identity (one model, returned), idempotent (equal models, returned), permutation",
        "(the order of models does not matter), scale (values times c give the result times c),",
        "propagates (a NaN or Inf in is one out: the engine need not look for it in the inputs).",
    ]  # fmt: skip
    for spec in specs:
        lines += ["", f"## {spec.name}", "", "```text", spec.doc, "```", ""]
        lines += ["| parameter | values | default | per model |", "|---|---|---|---|"]
        for p in spec.parameters.values():
            values = ", ".join(p.choices) or f"{p.kind} {p.range}".strip()
            default = str(p.default).lower() if isinstance(p.default, bool) else p.default
            lines.append(f"| {p.name} | {values} | {default} | {'yes' if p.per_model else ''} |")
    return "\n".join(lines) + "\n"


def cli() -> str:
    """Every command: its arguments and options."""
    lines = ["# Command line"]
    for command in COMMANDS:
        doc = inspect.getdoc(command) or ""
        lines += [
            "",
            f"## mowmerge {command.__name__.replace('_', '-')}",
            "",
            doc.split("\n")[0],
            "",
        ]
        lines += ["| argument or option | default | meaning |", "|---|---|---|"]
        lines += [_option(*row) for row in _parameters(command)]
    lines += ["", "Exit codes: 0 done, 1 a bug, 2 usage, 3 recipe, 4 checkpoint, 5 source or Hub,"]
    return "\n".join(
        [*lines, "6 disk, memory or permission, 7 below --fail-under, 130 interrupted.", ""]
    )


def report_fields() -> str:
    """Every field of report.json, part by part, and every figure that can be asked for."""
    lines = [
        "# The fields of report.json",
        "",
        "What a figure cannot be is null, and `absent` says why. [The schema](report.schema.json)"
        " says the same to machines; [the report](report.md) explains it.",
    ]
    for part, title in _parts().items():
        doc = " ".join((inspect.getdoc(part) or "").split())
        lines += ["", f"## {title}", "", doc, "", "| field | type | meaning |", "|---|---|---|"]
        lines += [
            f"| {name} | {_type(field.annotation)} | {field.description} |"
            for name, field in part.model_fields.items()
        ]
    lines += ["", "## Figures for --fail-under", "", "| figure | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in thresholds.FIGURES.items()]
    lines += ["| `TASK` | the subject's score on a task, where higher is better |"]
    lines += ["| `TASK.normalized` | the score / the expert's score |"]
    return "\n".join(lines) + "\n"


def _parts() -> dict[type[report_schema.Part], str]:
    """Every part of the report and of a comparison, with its heading."""
    found: dict[type[report_schema.Part], str] = {}
    for root, named in ((report_schema.Report, "report.json"), (Comparison, "--compare --json")):
        found[root] = named
        for name, field in root.model_fields.items():
            for part in re.findall(r"[\w.]+", str(field.annotation)):
                held = getattr(report_schema, part.rpartition(".")[2], None)
                held = Change if part.endswith(".Change") else held
                if isinstance(held, type) and issubclass(held, report_schema.Part):
                    found.setdefault(held, name)
    return found


def _type(annotation: Any) -> str:
    """A type in JSON's words."""
    text = re.sub(r"(?:\w+\.)+", "", str(annotation)).replace("NoneType", "null")
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    return text.replace("tuple[float, float]", "[low, high]").replace("|", "or")


def _parameters(command: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command).parameters
    return [(name, get_args(hints[name])[1], p.default) for name, p in signature.items()]


def _option(name: str, info: Any, default: Any) -> str:
    shown = name.upper() if type(info).__name__ == "ArgumentInfo" else None
    given = [info.default, *(info.param_decls or ())]  # the first flag stands as the default
    flags = [d for d in given if isinstance(d, str) and d.startswith("-")]
    shown = shown or ", ".join(flags) or "--" + name.replace("_", "-")
    value = "" if default in (None, False, True) else str(default).lower()
    value = "required" if default is inspect.Parameter.empty else value
    return f"| `{shown}` | {value} | {info.help} |"


if __name__ == "__main__":
    for file, text in pages().items():
        (HERE / file).write_text(text, encoding="utf-8")
