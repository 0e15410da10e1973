"""The page's pictures as inline SVG: each with a title, a description and its figures as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from xml.etree.ElementTree import Element

from mowmerge.evals.page.nodes import Node, node, step
from mowmerge.evals.schema import Pair

WIDTH = 340.0  # of a panel, in units that are pixels where it has its full size
ROW = 21.0
NAMES = 118.0  # left of the bars
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar")


@dataclass(frozen=True)
class Bar:
    """A row of a chart: its value, interval, the text at its end, and whether it stands out."""

    name: str
    value: float | None
    interval: Pair | None
    says: str
    strong: bool = False


def panel(title: str, drawn: Element, note: str = "") -> Element:
    """A picture under its title."""
    said = node("span", note, class_="aside") if note else None
    return node("figure", node("figcaption", title, said), drawn, class_="panel")


def svg(height: float, title: str, desc: str, *children: Node, width: float = WIDTH) -> Element:
    """The frame of a picture."""
    return node(
        "svg", node("title", title), node("desc", desc), *children,
        viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=f"{title}. {desc}",
    )  # fmt: skip


def label(
    x: float, y: float, said: str, anchor: str = "start", kind: str = "label", room: int = 19
) -> Element:
    """Text; what is too long is cut, and whole in its title."""
    if len(said) <= room:
        return node("text", said, x=x, y=y, text_anchor=anchor, class_=kind)
    cut = said[: room - 1] + "…"
    return node("text", node("title", said), cut, x=x, y=y, text_anchor=anchor, class_=kind)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
    """A line."""
    return node("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def described(bars: Sequence[Bar]) -> str:
    """The figures of a chart in words."""
    return "; ".join(f"{bar.name}: {bar.says}" for bar in bars)


def bars(title: str, rows: Sequence[Bar], top: float, reference: float | None) -> Element:
    """Bars from 0 with their intervals, and a line at the reference."""
    right = WIDTH - 46
    scale = (right - NAMES) / top
    drawn: list[Node] = []

    def at(value: float) -> float:
        return NAMES + min(max(value, 0.0), top) * scale

    for i, row in enumerate(rows):
        y = i * ROW + 4
        kind = "strong" if row.strong else ""
        drawn.append(label(NAMES - 8, y + 12, row.name, "end", f"label {kind}"))
        if row.value is not None:
            drawn.append(node("rect", x=NAMES, y=y + 2, width=at(row.value) - NAMES, height=12.0,
                              rx=1.5, class_=f"bar {kind}"))  # fmt: skip
        drawn += whisker(row.interval, at, y + 8)
        drawn.append(label(WIDTH, y + 12, row.says, "end", f"value {kind}"))
    height = len(rows) * ROW + 6
    if reference is not None:
        x = NAMES + reference * scale
        drawn.append(line(x, 0, x, height, "reference"))
    return svg(height, title, described(rows), *drawn)


def whisker(interval: Pair | None, at: Callable[[float], float], y: float) -> list[Node]:
    """An interval as a line with ends."""
    if interval is None:
        return []
    low, high = (at(end) for end in interval)
    return [
        line(low, y, high, y, "whisker"),
        line(low, y - 3, low, y + 3, "whisker"),
        line(high, y - 3, high, y + 3, "whisker"),
    ]


def forest(title: str, rows: Sequence[Bar], low: float, high: float) -> Element:
    """Differences with their intervals around a line at 0; filled where more than chance."""
    left, right = NAMES + 6, WIDTH - 74
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return left + (value - low) / span * (right - left)

    drawn: list[Node] = [line(at(0), 0, at(0), len(rows) * ROW + 6, "zero")]
    for i, row in enumerate(rows):
        y = i * ROW + 12
        kind = "sure" if row.strong else "unsure"
        side = "" if not row.strong else " up" if (row.value or 0) > 0 else " down"
        drawn.append(label(NAMES - 8, y + 4, row.name, "end"))
        drawn += whisker(row.interval, at, y)
        if row.value is not None:
            drawn.append(node("circle", cx=at(row.value), cy=y, r=4.5, class_=f"dot {kind}{side}"))
        drawn.append(
            label(WIDTH, y + 4, row.says, "end", "value" + (" strong" if row.strong else ""))
        )
    return svg(len(rows) * ROW + 6, title, described(rows), *drawn)


def cells(
    title: str,
    values: Mapping[str, Sequence[float | None]],
    columns: Sequence[str],
    low: float,
    high: float,
    *,
    own: Mapping[str, str] | None = None,
    unit: str = "",
) -> Element:
    """A heat map in a panel: names at the left, columns numbered or named below, hundredths in the
    cells where they fit, a frame around a row's own column."""
    names = 84.0
    wide = min(30.0, (WIDTH - names) / max(1, len(columns)))
    tall = min(22.0, max(12.0, wide))
    drawn: list[Node] = []
    for i, (name, row) in enumerate(values.items()):
        drawn.append(label(names - 6, i * tall + tall / 2 + 4, name, "end", room=13))
        for j, value in enumerate(row):
            kind = step(value, low, high)
            x, y = names + j * wide, i * tall
            said = f"{name}, {columns[j]}: " + ("absent" if value is None else f"{value:.3g}{unit}")
            box = node("rect", node("title", said), x=x + 0.75, y=y + 0.75, width=wide - 1.5,
                       height=tall - 1.5, rx=1.5, class_=f"cell {kind}")  # fmt: skip
            drawn.append(box)
            if value is not None and wide >= 24:
                shown = f"{round(100 * value)}".replace("-", "\N{MINUS SIGN}")
                drawn.append(label(x + wide / 2, y + tall / 2 + 3.5, shown, "middle", f"in {kind}"))
            if own and own.get(name) == columns[j]:
                drawn.append(node("rect", x=x + 0.5, y=y + 0.5, width=wide - 1, height=tall - 1,
                                  rx=2, class_="own"))  # fmt: skip
    bottom = len(values) * tall
    drawn += _columns(columns, names, wide, bottom)
    longest = max((len(each) for each in columns), default=0)
    below = 18.0 if _fits(columns, wide) or _numbers(columns) else min(longest, 13) * 4.6 + 12
    desc = "; ".join(
        f"{name}: " + ", ".join("absent" if v is None else f"{v:.2g}" for v in row)
        for name, row in list(values.items())[:24]
    )
    return svg(bottom + below, title, desc, *drawn)


def _fits(columns: Sequence[str], wide: float) -> bool:
    return max((len(each) for each in columns), default=0) * 6.2 < wide


def _numbers(columns: Sequence[str]) -> bool:
    return all(each.isdigit() for each in columns)


def _columns(columns: Sequence[str], left: float, wide: float, y: float) -> list[Node]:
    """Names under the columns: level where they fit, numbers thinned out, else slanted."""
    if _numbers(columns) or _fits(columns, wide):
        every = max(1, ceil(26 / wide)) if _numbers(columns) else 1
        return [
            label(left + (j + 0.5) * wide, y + 13, name, "middle", "tick")
            for j, name in enumerate(columns)
            if j % every == 0
        ]
    found: list[Node] = []
    for j, name in enumerate(columns):
        x = left + (j + 0.5) * wide + 3
        said = label(x, y + 10, name, "end", "tick", room=13)
        said.set("transform", f"rotate(-40 {x:.1f} {y + 10:.1f})")
        found.append(said)
    return found


def lines(
    title: str, series: Mapping[str, Sequence[float | None]], places: Sequence[str]
) -> Element:
    """A line a series over the layers, its name at its end, a shape of its own for each."""
    known = [v for row in series.values() for v in row if v is not None]
    low, high = min([0.0, *known]), max(known, default=1.0)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    left, right, top, bottom = 40.0, WIDTH - 78, 8.0, 150.0
    pace = (right - left) / max(1, len(places) - 1)

    def at(value: float) -> float:
        return bottom - (value - low) / ((high - low) or 1) * (bottom - top)

    drawn: list[Node] = []
    for tick in ticks:
        drawn.append(line(left, at(tick), right, at(tick), "rule"))
        drawn.append(label(left - 6, at(tick) + 4, f"{tick:.3g}", "end", "tick"))
    every = max(1, ceil(len(places) / 9))
    for j, place in enumerate(places):
        if j % every == 0:
            drawn.append(label(left + j * pace, bottom + 15, place, "middle", "tick"))
    drawn.append(label((left + right) / 2, bottom + 30, "layer", "middle", "tick"))
    ends = _apart({name: at(_last(row)) for name, row in series.items() if _any(row)})
    for k, (name, row) in enumerate(series.items()):
        points = [(left + j * pace, at(v)) for j, v in enumerate(row) if v is not None]
        if not points:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append(node("polyline", points=path, class_=f"line s{k % 7}"))
        if len(points) <= 40:
            drawn += [shape(k, x, y) for x, y in points]
        drawn.append(label(right + 10, ends[name] + 4, name, "start", f"series s{k % 7}", room=12))
    desc = "; ".join(
        f"{name}: " + ", ".join("absent" if v is None else f"{v:.3g}" for v in row[:24])
        for name, row in series.items()
    )
    return svg(bottom + 36, title, desc, *drawn)


def _any(row: Sequence[float | None]) -> bool:
    return any(value is not None for value in row)


def _last(row: Sequence[float | None]) -> float:
    return next(value for value in reversed(row) if value is not None)


def _apart(places: Mapping[str, float], gap: float = 13.0) -> dict[str, float]:
    """The heights of labels, moved down as far as they need to be read."""
    found: dict[str, float] = {}
    below = float("-inf")
    for name, y in sorted(places.items(), key=lambda item: item[1]):
        below = max(y, below + gap)
        found[name] = below
    return found


def shape(k: int, x: float, y: float) -> Element:
    """The mark of a series: its colour is not all that tells it."""
    kind = f"mark s{k % 7}"
    r = 3.2
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "triangle": [(0, -r - 1), (r + 1, r), (-r - 1, r)],
        "diamond": [(0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)],
        "cross": [(-r, -1.0), (r, -1.0), (r, 1.0), (-r, 1.0)],
        "bar": [(-1.0, -r), (1.0, -r), (1.0, r), (-1.0, r)],
    }.get(SHAPES[k % 7])
    if corners is None:
        hollow = " hollow" if SHAPES[k % 7] == "ring" else ""
        return node("circle", cx=x, cy=y, r=r, class_=kind + hollow)
    return node("polygon", points=" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners),
                class_=kind)  # fmt: skip


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that hold low and high between them."""
    span = (high - low) or 1.0
    raw = span / 4
    power = 10.0 ** floor(log10(raw))
    pace = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = floor(low / pace + 1e-9)
    count = ceil(high / pace - 1e-9) - first
    return [round((first + i) * pace, 12) for i in range(max(1, count) + 1)]


def reliability(title: str, found: Sequence[tuple[float, float, float, float, int]]) -> Element:
    """Accuracy by confidence beside the diagonal; below it, where the items are.

    found: low, high, mean confidence, accuracy and count of each bin.
    """
    left, right, top, bottom = 40.0, WIDTH - 14, 6.0, 200.0
    most = max((n for *_, n in found), default=1)

    def x(value: float) -> float:
        return left + value * (right - left)

    def y(value: float) -> float:
        return bottom - value * (bottom - top)

    drawn: list[Node] = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        drawn.append(line(left, y(tick), right, y(tick), "rule"))
        drawn.append(label(left - 6, y(tick) + 4, f"{tick:g}", "end", "tick"))
        drawn.append(label(x(tick), bottom + 52, f"{tick:g}", "middle", "tick"))
    for low, high, _, accuracy, n in found:
        said = f"confidence {low:.2f} to {high:.2f}: {n} items, {100 * accuracy:.1f} % right"
        tall = 30 * n / most
        drawn.append(node("rect", node("title", said), x=x(low) + 0.75, y=y(accuracy),
                          width=x(high) - x(low) - 1.5, height=bottom - y(accuracy),
                          class_="bar"))  # fmt: skip
        drawn.append(node("rect", x=x(low) + 0.75, y=bottom + 38 - tall, height=tall,
                          width=x(high) - x(low) - 1.5, class_="count"))  # fmt: skip
    drawn.append(line(x(0), y(0), x(1), y(1), "reference"))
    drawn += [
        node("circle", cx=x(c), cy=y(a), r=3.0, class_="dot strong") for _, _, c, a, _ in found
    ]
    drawn.append(label((left + right) / 2, bottom + 68, "confidence; below: where items are",
                       "middle", "tick", room=60))  # fmt: skip
    desc = "; ".join(f"confidence {c:.2f}: {100 * a:.0f} % of {n} right" for _, _, c, a, n in found)
    return svg(bottom + 74, title, desc, *drawn)
