"""The page's sections about what was merged, what it costs, and what the figures rest on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import fsum, sqrt
from xml.etree.ElementTree import Element

from mowmerge.evals import words
from mowmerge.evals.page import charts
from mowmerge.evals.page.nodes import Node, grid, node, section, table
from mowmerge.evals.schema import LayerPart, Merge, Report

Figure = Callable[[LayerPart], float | None]


def merge(report: Report) -> Element | None:
    """What the merge did, layer by layer: similarity, conflicts, what moved, what is dynamic."""
    made = report.merge
    if made is None or not made.layers:
        return None
    stacks = list(dict.fromkeys(part.stack for part in made.layers if part.layer is not None))
    panels = [panel for stack in stacks for panel in _stack(made, stack)]
    facts = (
        f"{made.method} of {', '.join(made.experts)}; {words.size(made.read_bytes)} read,"
        f" {words.size(made.written_bytes)} written in {words.seconds(made.seconds)}, planned for"
        f" {words.size(made.peak_bytes)} of memory."
    )
    panels += _similarity(made)
    return section("merge", "What the merge did", facts, grid(panels), _everything(made))


def _stack(made: Merge, stack: str) -> list[Element]:
    parts = [part for part in made.layers if part.stack == stack and part.layer is not None]
    layers = sorted({part.layer for part in parts if part.layer is not None})
    roles = list(dict.fromkeys(part.role for part in parts))
    held = {(part.role, part.layer): part for part in parts}
    aside = stack if len({part.stack for part in made.layers if part.layer is not None}) > 1 else ""
    places = [str(layer) for layer in layers]

    def series(figure: Figure) -> dict[str, list[float | None]]:
        rows = {
            role: [figure(held[role, n]) if (role, n) in held else None for n in layers]
            for role in roles
        }
        return {role: row for role, row in rows.items() if any(v is not None for v in row)}

    drawn: list[Element] = []
    for title, figure in (
        ("Cosine between task vectors", lambda p: p.cosine),
        ("Elements whose signs disagree", lambda p: p.sign_conflict),
        ("Elements that the merge moved", lambda p: p.kept),
        ("Change of a weight, root mean square", _rms),
    ):
        rows = series(figure)
        if rows:
            drawn.append(charts.panel(title, charts.lines(title, rows, places), aside))
    drawn.append(_changed(parts, layers, aside))
    if any(part.dynamic for part in made.layers):
        dynamic = series(lambda p: p.dynamic)
        title = "What was made dynamic"
        picture = charts.cells(f"{title}: percent of the elements, by role and layer", dynamic,
                               places, 0.0, 1.0)  # fmt: skip
        codecs = ", ".join(f"{codec} ({n})" for codec, n in made.codecs.items())
        drawn.append(charts.panel(title, picture, codecs or aside))
    return drawn


def _rms(part: LayerPart) -> float | None:
    """sqrt(mean over experts and elements of squared changes)."""
    if not part.norms or not part.elements:
        return None
    squares = [norm * norm for norm in part.norms.values()]
    return sqrt(fsum(squares) / len(squares) / part.elements)


def _changed(parts: Sequence[LayerPart], layers: Sequence[int], aside: str) -> Element:
    """How far each expert moved in each layer, as a share of the farthest."""
    squares: dict[tuple[str, int], list[float]] = defaultdict(list)
    for part in parts:
        for model, norm in part.norms.items():
            squares[model, part.layer or 0].append(norm * norm)
    norms = {key: sqrt(fsum(held)) for key, held in squares.items()}
    most = max(norms.values(), default=0.0) or 1.0
    models = list(dict.fromkeys(model for model, _ in norms))
    values: dict[str, list[float | None]] = {
        model: [norms[model, n] / most if (model, n) in norms else None for n in layers]
        for model in models
    }
    title = "Where each expert moved"
    picture = charts.cells(f"{title}: norm of its task vector by layer, percent of the largest",
                           values, [str(n) for n in layers], 0.0, 1.0)  # fmt: skip
    return charts.panel(title, picture, aside or f"norm, largest {most:.3g}")


def _similarity(made: Merge) -> list[Element]:
    """How unlike the experts are in each block, as the method's survey measured it."""
    blocks = list(dict.fromkeys(block for of in made.similarity.values() for block in of))
    if not blocks:
        return []
    values: dict[str, list[float | None]] = {}
    for role, of in made.similarity.items():
        most = max(1 - value for value in of.values()) or 1.0
        values[role] = [(1 - of[b]) / most if b in of else None for b in blocks]
    title = "How unlike the experts are"
    places = [str(n) for n in range(len(blocks))]
    drawn = charts.cells(f"{title}: 1 - similarity of each block, percent of the component's most",
                         values, places, 0.0, 1.0)  # fmt: skip
    return [charts.panel(title, drawn, "% of the most unlike")]


def _everything(made: Merge) -> Element | None:
    """The same figures as text, tensors outside of layers too."""
    rows: list[list[Node]] = []
    for part in made.layers:
        place = f"{part.stack} {part.layer}" if part.layer is not None else "outside the layers"
        rows.append([
            f"{place}, {part.role}", str(part.tensors), f"{part.elements:,}",
            words.percent(part.dynamic, 0), words.percent(part.copied, 0),
            _number(part.cosine), _number(part.sign_conflict), _number(part.kept),
        ])  # fmt: skip
    heads: list[Node] = [
        "where", "tensors", "elements", "dynamic", "copied", "cosine", "sign conflict", "moved",
    ]  # fmt: skip
    told = table(heads, rows, "Means weighted by elements", kind="figures")
    return node("details", node("summary", "Every layer in figures"), told)


def _number(value: float | None) -> str:
    return words.NONE if value is None else words.minus(f"{value:.3f}")


def costs(report: Report) -> Element:
    """What each row costs, and how many experts' worth that is."""
    note = (
        "A static merge costs what one expert does; a dynamic one holds more and mixes weights for"
        " each input. Latency is of one item alone, throughput of full batches."
    )
    missing = words.uncosted(report)
    if not report.costs:
        return section("costs", "What it costs", missing)
    rows: list[list[Node]] = []
    for cost in report.costs:
        ratios = cost.ratios
        rows.append([
            f"{cost.row} (earlier)" if cost.earlier else cost.row,
            _cost(f"{cost.parameters / 1e6:,.3g} M", ratios.get("parameters")),
            _cost(words.size(cost.bytes_on_disk), ratios.get("bytes_on_disk")),
            _cost(words.size(cost.peak_bytes), ratios.get("peak_bytes")),
            _cost(words.seconds(cost.latency), ratios.get("latency")),
            _cost(f"{cost.throughput:,.4g} /s", ratios.get("throughput")),
        ])  # fmt: skip
    heads: list[Node] = ["", "parameters", "on disk", "peak memory", "latency", "throughput"]
    made = table(
        heads,
        rows,
        "As measured, and as a multiple of one expert",
        kind="figures",
        strong=lambda row: str(row[0]).removesuffix(" (earlier)") == report.subject,
    )
    said = [node("li", line) for line in (*words.conditions(report), missing) if line]
    under = node("ul", *said, class_="under") if said else None
    return section("costs", "What it costs", note, made, under)


def _cost(said: str, ratio: float | None) -> Element:
    return node("td", said, node("div", words.times(ratio), class_="aside") if ratio else None)


def forgetting(report: Report) -> Element | None:
    """What was lost, or won, of what the base can do."""
    if not report.forgetting:
        return None
    rows: list[list[Node]] = [
        [f.row, f.on, str(len(f.tasks)), *words.gap(f.signed, f.interval, f.unit),
         words.percent(f.relative), ", ".join(f.worse_than_base) or "none"]
        for f in report.forgetting
    ]  # fmt: skip
    heads: list[Node] = [
        "", "on", "tasks", "points", "interval", "of the base's score", "worse than the base on",
    ]  # fmt: skip
    made = table(heads, rows, "Mean difference from the base; below 0 is forgotten",
                 least=700, strong=lambda row: row[0] == report.subject)  # fmt: skip
    return section("forgetting", "Against the base", "", made)


def rests(report: Report) -> Element:
    """Flags, models, data, settings: what somebody needs to doubt or to repeat it."""
    flags: list[list[Node]] = []
    names = list(dict.fromkeys(name for held in report.flags.values() for name in held))
    for row, held in report.flags.items():
        flags.append([row, *(words.flag(held.get(name)) for name in names)])
    models: list[list[Node]] = [
        [name, m.source, m.revision[:12], m.dtype, node("span", m.sha256, class_="hash")]
        for name, m in report.models.items()
    ]
    data: list[list[Node]] = [
        [
            name,
            words.source(d.source),
            d.split,
            f"{d.n:,}",
            d.metric,
            node("span", d.sha256, class_="hash"),
        ]
        for name, d in report.data.items()
    ]
    heads: list[Node] = ["", *(name.replace("_", " ") for name in names)]
    model_heads: list[Node] = ["", "source", "revision", "dtype", "sha256 of the weights"]
    data_heads: list[Node] = ["", "source", "split", "items", "metric", "sha256 of the items"]
    settings: list[list[Node]] = [[name, words.flag(v)] for name, v in report.run.settings.items()]
    return section(
        "provenance", "What the figures rest on", "",
        table(heads, flags, "Flags by row", least=90 * len(heads)) if flags else None,
        table(data_heads, data, "Data", least=980),
        table(model_heads, models, "Models", least=900) if models else None,
        table(["setting", "value"], settings, "Settings") if settings else None,
        node("h3", "To repeat it"), node("pre", report.run.command) if report.run.command else None,
    )  # fmt: skip
