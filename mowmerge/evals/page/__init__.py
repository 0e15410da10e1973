"""The report as one HTML page that needs nothing beside it: no network, no script."""

from __future__ import annotations

from importlib.resources import files

from mowmerge.evals import words
from mowmerge.evals.page import facts, matrix, sections
from mowmerge.evals.page.nodes import Node, node, text
from mowmerge.evals.schema import Report

NAMED = {
    "scores": "scores", "normalised": "beside the experts", "rivals": "more than chance?",
    "matrix": "every expert", "routing": "routing", "calibration": "calibration",
    "merge": "the merge", "costs": "costs", "forgetting": "against the base",
    "provenance": "provenance",
}  # fmt: skip


def render(report: Report) -> str:
    """The page."""
    made = [
        sections.heat(report), sections.bars(report), sections.rivals(report),
        matrix.matrix(report),
        sections.routing(report), sections.calibration(report), facts.merge(report),
        facts.costs(report), facts.forgetting(report), facts.rests(report),
    ]  # fmt: skip
    found = [each for each in made if each is not None]
    links = [node("a", NAMED[each.attrib["id"]], href=f"#{each.attrib['id']}") for each in found]
    run = report.run
    kicker = "mowmerge evaluation" + (f" · merged by {run.method}" if run.method else "")
    head: list[Node] = [
        node("p", kicker, class_="kicker"),
        node("h1", words.title(report)),
        node("p", words.headline(report), class_="lead"),
        node("ul", *(node("li", line) for line in words.verdicts(report)), class_="verdicts"),
    ]
    failures = [node("li", line) for line in report.failures]
    warned = node(
        "div", node("p", "What went wrong"), node("ul", *failures), class_="failures", role="note"
    )
    body = node(
        "body",
        node("main", node("header", *head), warned if failures else None, sections.tiles(report),
             node("nav", *links, aria_label="Sections"), *found),
        node("footer", node("h2", "How to read it"),
             node("ol", *(node("li", line) for line in words.reading(report))),
             node("p", f"Made by mowmerge {run.mowmerge}; every figure is in report.json, every"
                  f" prediction in {report.items}.")),
    )  # fmt: skip
    style = files(__package__).joinpath("style.css").read_text("utf-8")
    title = f"{words.title(report)}: mowmerge evaluation"
    meta = [
        node("meta", charset="utf-8"),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("meta", name="description", content=words.headline(report)),
    ]
    whole = node("html", node("head", *meta, node("title", title), node("style", style)), body,
                 lang="en")  # fmt: skip
    return "<!doctype html>\n" + text(whole) + "\n"
