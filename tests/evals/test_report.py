"""The report: its schema, what it keeps of each item, and the page that shows it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest

from mowmerge.errors import ResourceError, SourceError
from mowmerge.evals import markdown, page, report
from mowmerge.evals.schema import json_schema
from mowmerge.evals.score import Evaluation
from tests.evals.reporting import NASTY, TASKS, evaluation, made, score

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """What a page is made of; fails where an element is closed that was not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "srcset", "xlink:href", "poster", "data", "action")
        self.links += [value or "" for name, value in attrs if name in names]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_report_is_what_its_schema_says(tmp_path: Path) -> None:
    found, _ = made(tmp_path)
    told = json.loads(found.model_dump_json())
    jsonschema.Draft202012Validator.check_schema(json_schema())
    jsonschema.validate(told, json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**told, "surprise": 1}, json_schema())
    assert found.subject == "merged"
    assert found.rows[:3] == ["base", "expert", "merged"]
    assert {name: d.held_out for name, d in found.data.items()} == {
        "sky": False,
        "sea": False,
        "old": True,
    }
    assert [t.rival for t in found.tests if t.task == "old"] == ["base", NASTY]
    assert {f.on for f in found.forgetting} == {"held-out tasks", "experts' tasks"}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found, items = made(tmp_path)
    report.write(found, items, tmp_path / "out")
    assert report.read(tmp_path / "out") == report.read(tmp_path / "out" / "report.json") == found
    held = report.read_items(tmp_path / "out", found)
    assert held is not None
    mine = evaluation()
    sky = next(s for s in mine.scores if (s.row, s.task) == ("merged", "sky"))
    row = held["sky"]["rows"]["merged"]
    assert row["predicted"] == sky.predicted
    assert row["items"] == sky.items
    assert row["value"] == sky.value
    assert row["true"] == sky.true  # not the first row's: the fixture draws anew for each
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.json", "items.json", "report.md", "report.html",
    }  # fmt: skip
    (tmp_path / "out" / "items.json").write_text(items + " ")
    assert report.read_items(tmp_path / "out", found) is None


def test_the_same_scores_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        report.write(*made(tmp_path / "zoo"), tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_report_does_not_go_into_a_sealed_folder(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("")
    with pytest.raises(ResourceError, match="seal"):
        report.write(*made(tmp_path / "zoo"), tmp_path)


@pytest.mark.parametrize("text", ["{}", "no json", '{"version": 1, "tensors": []}'])
def test_what_is_no_report_is_a_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(SourceError, match="no evaluation report"):
        report.read(tmp_path)
    with pytest.raises(SourceError, match="no report"):
        report.read(tmp_path / "gone.json")


def test_the_page_needs_nothing_and_names_everything(tmp_path: Path) -> None:
    found, _ = made(tmp_path)
    text = page.render(found)
    parsed = Page(text)
    assert parsed.open == []
    assert len(text.encode()) < 1_000_000
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(parsed.tags)
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"https?:|@import|url\(", text)
    said = "\n".join(parsed.texts)
    for name in (*TASKS, *found.rows, *found.models):
        assert name in said
    assert NASTY not in text
    ids = re.findall(r'<section id="(\w+)"', text)
    assert ids == ["scores", "normalised", "rivals", "matrix", "routing", "calibration", "merge",
                   "costs", "forgetting", "provenance"]  # fmt: skip
    assert [link[1:] for link in parsed.links] == ids
    assert parsed.tags.count("svg") == text.count('role="img"') == text.count("<desc>")
    assert parsed.tags.count("th") > 0
    assert "Made by mowmerge" in said


def test_the_heat_map_has_each_score_and_its_colour(tmp_path: Path) -> None:
    found, _ = made(tmp_path)
    text = page.render(found)
    part = next(s for s in found.scores if (s.row, s.task) == ("base", "sky"))
    cell = re.search(r'<td title="base on sky: [^"]*" class="(c\d)">([\d.]+)', text)
    assert cell is not None
    assert cell[2] == f"{100 * part.value:.1f}"
    assert part.normalised is not None
    assert 0.6 <= part.normalised < 0.7
    low = min(int(10 * s.normalised) / 10 for s in found.scores if s.normalised)
    assert cell[1] == f"c{int((part.normalised - low) / (1 - low) * 9)}"
    absent = re.search(r"<th[^>]*>expert</th>(?:<td[^>]*>[^/]*(?:</sup>)?</td>)*", text)
    assert absent is not None


def test_markdown_is_short_and_has_every_figure(tmp_path: Path) -> None:
    found, _ = made(tmp_path)
    text = markdown.render(found)
    assert len(text.splitlines()) < 100
    for row in found.rows:
        assert row.replace("<", "&lt;") in text
    assert "<script" not in text
    part = next(s for s in found.scores if (s.row, s.task) == ("merged", "sea"))
    assert part.interval is not None
    low, high = part.interval
    assert f"| **{100 * part.value:.1f}** | {100 * low:.1f} to {100 * high:.1f} |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| task | n |")}
    assert widths == {
        line.count("|") for line in text.splitlines() if line.startswith("| sky | 120")
    }


def test_a_report_of_scores_alone_is_whole_too(tmp_path: Path) -> None:
    bare, _ = made(tmp_path, Evaluation([score("merged", "sky", 0.9, "x")]))
    assert bare.merge is None
    assert Page(page.render(bare)).open == []
    assert "recipe scores" in markdown.render(bare)
    assert bare.summary[0].absent["normalised"] == "sky: no expert was scored on it"


def test_no_merge_no_report(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no merge"):
        made(tmp_path, Evaluation([score("base", "sky", 0.9, "x")]))


def test_many_layers_tasks_and_models_stay_below_a_megabyte(tmp_path: Path) -> None:
    found, _ = made(tmp_path)
    assert found.merge is not None
    layers = [part for part in found.merge.layers if part.layer == 0]
    deep = [
        part.model_copy(
            update={"layer": n, "role": role, "norms": {f"e{k}": 1.0 for k in range(8)}}
        )
        for n in range(80)
        for role in ("attention", "mlp", "norm", "other")
        for part in layers[:1]
    ]
    merge = found.merge.model_copy(update={"layers": deep})
    wide = {"slots": [str(k) for k in range(20)], "mean": [0.05] * 20}
    gates = [
        found.gates[0].model_copy(update={"gate": f"layer.{n}", "task": f"t{t}", **wide})
        for n in range(80)
        for t in range(20)
    ]
    text = page.render(found.model_copy(update={"merge": merge, "gates": gates}))
    assert len(text.encode()) < 1_000_000


def test_a_row_whose_answers_were_kept_has_no_costs_and_it_says_so(tmp_path: Path) -> None:
    found, _ = made(tmp_path)
    some = found.model_copy(update={"costs": found.costs[:2]})
    for text in (page.render(some), markdown.render(some)):
        assert "--no-cache measures anew): merged, " in text
    for text in (page.render(found), markdown.render(found)):
        assert "--no-cache" not in text
