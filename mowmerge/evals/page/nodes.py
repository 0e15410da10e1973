"""Elements of the page, escaped by the library that writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

Node: TypeAlias = "Element | str | float | int | None"
STEPS = 9  # of the colour scale


def node(tag: str, *children: Node, **attributes: Node) -> Element:
    """An element. `class_` is class, `stroke_width` is stroke-width; None is left out."""
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), _plain(value))
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child is not None:
            _append(made, _plain(child))
    return made


def _append(made: Element, text: str) -> None:
    if len(made):
        made[-1].tail = (made[-1].tail or "") + text
    else:
        made.text = (made.text or "") + text


def _plain(value: Node) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(root: Element) -> str:
    """The HTML of an element."""
    return tostring(root, encoding="unicode", method="html")


def step(value: float | None, low: float, high: float) -> str:
    """The class of a value's colour: c0 at low and below, c8 at high and above."""
    if value is None:
        return "none"
    share = (value - low) / (high - low) if high > low else 1.0
    return f"c{min(STEPS - 1, max(0, int(share * STEPS)))}"


def section(id: str, title: str, note: str, *children: Node) -> Element:
    """A section with its heading and a line that says how to read it."""
    return node(
        "section", node("h2", title), node("p", note, class_="note") if note else None, *children,
        id=id,
    )  # fmt: skip


def grid(figures: Sequence[Element], kind: str = "panels") -> Element:
    """Panels side by side, as many as there is room for."""
    return node("div", *figures, class_=kind)


def table(
    heads: Sequence[Node],
    rows: Sequence[Sequence[Node]],
    caption: str,
    *,
    kind: str = "",
    least: int = 0,
    strong: Callable[[Sequence[Node]], bool] = lambda row: False,
) -> Element:
    """A table that scrolls sideways where it must, at least that many pixels wide; the first column
    heads its row."""
    head = node("tr", *(node("th", each, scope="col") for each in heads))
    body = [
        node("tr", node("th", row[0], scope="row"), *(_cell(each) for each in row[1:]),
             class_="subject" if strong(row) else None)
        for row in rows
    ]  # fmt: skip
    made = node(
        "table", node("caption", caption), node("thead", head), node("tbody", *body),
        class_=kind or None, style=f"min-width:{least}px" if least else None,
    )  # fmt: skip
    return node("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(content: Node) -> Element:
    return content if isinstance(content, Element) and content.tag == "td" else node("td", content)
