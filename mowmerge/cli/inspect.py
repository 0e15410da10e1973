"""`mowmerge inspect`: what a dynamic recipe would build, or what a dynamic checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mowmerge.cli import output


def inspect(
    target: Annotated[str, typer.Argument(help="A recipe (- reads stdin), or a merged folder.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value: parameters.blocks=3.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .bin and .pt files (weights_only).")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a dynamic recipe would make dynamic and weigh, or what a dynamic checkpoint holds.

    Examples:

      mowmerge inspect recipe.yaml --set parameters.blocks=3

      mowmerge inspect merged/demo --json
    """
    from mowmerge import api
    from mowmerge.planner import Options

    if set_ and Path(target).is_dir():
        raise typer.BadParameter("a folder takes no overrides", param_hint="--set")
    told = api.inspect(target, overrides=set_ or (), options=Options(allow_pickle=allow_pickle))
    if json_:
        print(json.dumps(told))
        return
    print("\n\n".join(_page(target, told)))
    output.warn(told.get("warnings", ()))


def _page(target: str, told: Mapping[str, Any]) -> list[str]:
    """The paragraphs that say it."""
    if told.get("dynamic") is False:
        static = f"'{told['method']}' is a static method"
        return [f"{static}: `mowmerge merge {target} --dry-run` shows the plan"]
    survey = told.get("survey") or {}
    table = [_similarity(survey)] if "dissimilarity" in survey else []
    if "codes" not in told:
        return [*table, f"nothing would be dynamic: {output.size(told['write_bytes'])}"]
    experts = ", ".join(told["experts"])
    head = f"{told['method']} of {len(told['experts'])} experts: {experts}"
    rest = [f"the rest: {told['rest']}"] if told.get("rest") else []
    return [head, *table, _codes(told["codes"]), *rest, _weights(told), _routing(told)]


def _similarity(survey: Mapping[str, Any]) -> str:
    """1 - similarity of each block, by component; a star where it becomes dynamic."""
    found, chosen = survey["dissimilarity"], survey["dynamic"]
    blocks = list(dict.fromkeys(block for of in found.values() for block in of))
    rows = [["1 - similarity", *found]]
    for block in blocks:
        cells = [
            f"{of[block]:.3e}{' *' if block in chosen[role] else ''}" if block in of else ""
            for role, of in found.items()
        ]
        rows.append([block, *cells])
    return f"{output.table(rows)}\n* becomes dynamic"


def _codes(codes: Sequence[Mapping[str, Any]]) -> str:
    rows = [["dynamic", "layers", "tensors", "codec", "size"]]
    for row in codes:
        layers = f"{row['stack']} {_ranges(row['layers'])}".strip()
        rows.append(
            [row["role"], layers, str(row["tensors"]), row["codec"], output.size(row["bytes"])]
        )
    return output.table(rows)


def _ranges(numbers: Sequence[int]) -> str:
    """0..3,5 for 0, 1, 2, 3 and 5, as a recipe writes layers."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def _weights(told: Mapping[str, Any]) -> str:
    sizes = {kind: output.size(n) for kind, n in told["bytes"].items() if n}
    total = sizes.pop("total")
    listed = ", ".join(f"{kind} {n}" for kind, n in sizes.items())
    return f"{listed}: {total}, {told['multiple']:.2f} times its anchor"


def _routing(told: Mapping[str, Any]) -> str:
    """Gates, routers and heads, a line each."""
    trained = {True: "trained", False: "not trained", None: ""}[told.get("trained", False)]
    lines = []
    scopes: dict[tuple[str, float, int], int] = {}
    for gate in told["gates"].values():
        key = (gate["scope"], gate["offset"], gate["slots"])
        scopes[key] = scopes.get(key, 0) + 1
    for (scope, offset, slots), count in scopes.items():
        rest = f", offset {offset:g}" if offset else ""
        lines.append(f"{count} gate(s) of scope {scope}, {slots} slots{rest}")
    for name, router in told["routers"].items():
        lines.append(f"router {name}: {_router(router, trained)}")
    if "encoder" in told:
        lines.append(f"classifiers look at an encoder of its own, which reads {_reads(told)}")
    for head in told["heads"]:
        lines.append(f"head {head['expert']}: {head['class']}, {head['labels']} labels")
    return "\n".join(lines)


def _reads(told: Mapping[str, Any]) -> str:
    read = told["encoder"]
    return " x ".join(map(str, read["size"])) + " pixels" if read["size"] else str(read["reads"])


def _router(router: Mapping[str, Any], trained: str) -> str:
    if router["kind"] == "projection":
        return "projections of each token, nothing to train"
    place = f"after layer {router['layer']}" if router["layer"] else ""
    words = [f"{router['kind']}, {router['width']} -> {router['outputs']}", place, trained]
    return ", ".join(filter(None, words))
