"""The card: licence by rule, lineage, languages and data, figures, and what a user wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from zoo import Zoo

from mowmerge.hub.card import Results, card, private
from mowmerge.hub.licence import propagated


def said(*licences: str | dict[str, str] | None) -> list[dict[str, Any]]:
    """Inputs a, b, ... with these licences."""
    return [
        {"name": name, "source": f"org/{name}", "revision": "0" * 40,
         **(each if isinstance(each, dict) else {"license": each} if each else {})}
        for name, each in zip("abcdef", licences, strict=False)
    ]  # fmt: skip


LLAMA = {"license": "other", "license_name": "llama-x", "license_link": "https://llama.example/x"}
RULE: list[tuple[list[dict[str, Any]], dict[str, str], bool]] = [
    (said("mit", "mit"), {"license": "mit"}, False),
    (said("gemma", "Gemma"), {"license": "gemma"}, False),
    (said(LLAMA, LLAMA), LLAMA, False),
    (said("mit", "apache-2.0", "bsd-3-clause"), {"license": "apache-2.0"}, False),
    (said("mit", "cc0-1.0"), {"license": "mit"}, False),
    (said("apache-2.0", LLAMA), LLAMA, True),
    (said("mit", "cc-by-nc-4.0"),
     {"license": "other", "license_name": "cc-by-nc-4.0",
      "license_link": "https://huggingface.co/org/b"}, True),
    (said("gemma", "llama3", "mit"),
     {"license": "other", "license_name": "gemma-and-llama3", "license_link": "README.md"}, True),
    (said("mit", {**LLAMA, "license_link": "LICENSE"}),
     {**LLAMA, "license_link": "https://huggingface.co/org/b/blob/main/LICENSE"}, True),
    (said("mit", None), {}, True),
    (said("mit", "unknown"), {}, True),
    (said("other", "other"), {}, True),
    ([], {}, True),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "front", "warned"), RULE)
def test_the_licence_follows_by_the_rule(
    inputs: list[dict[str, Any]], front: dict[str, str], warned: bool
) -> None:
    found, warnings = propagated(inputs)
    assert (found, bool(warnings)) == (front, warned)


def test_warnings_name_who_says_what() -> None:
    _, (warning,) = propagated(said("mit", None, "unknown"))
    assert "b, c did not say" in warning
    _, (warning,) = propagated(said("mit", "gemma"))
    assert "a mit, b gemma" in warning


def readme(zoo: Zoo, name: str, **front: Any) -> None:
    (zoo.folder / name / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# {name}\n")


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.fixture
def out(zoo: Zoo) -> Path:
    """A merge of two cards' models: of a llama, by ties."""
    for name, tensors in zoo.family("llama", 2).items():
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        zoo.save(name, tensors, config=config)
    readme(zoo, "base", license="mit", language="en")
    readme(zoo, "a", license="apache-2.0", language=["en", "de"], datasets=["org/x"])
    readme(zoo, "b", license="mit", datasets=["org/y", "org/x"], tags=["z"])
    zoo.merge({"method": "ties"}, hashes=True)
    return zoo.folder / "out"


def test_front_matter_unites_what_the_inputs_say(out: Path) -> None:
    made = card(out, "org/demo")
    assert made.warnings == ()
    assert front(made.text) == {
        "library_name": "transformers", "license": "apache-2.0", "language": ["en", "de"],
        "datasets": ["org/x", "org/y"], "pipeline_tag": "text-generation",
        "tags": ["merge", "mowmerge", "ties"],
    }  # fmt: skip
    assert "| a | `a` (not published) |  | apache-2.0 |" in made.text
    assert 'AutoModelForCausalLM.from_pretrained("org/demo")' in made.text
    assert "[arXiv:2306.01708](https://arxiv.org/abs/2306.01708) | variant |" in made.text
    for row in ("needs base | yes", "needs data | no", "needs labels | no", "heads | merged",
                "uses test inputs | no", "needs to be told the task | no",
                "methods as published | variant (ties)"):  # fmt: skip
        assert f"| {row} |" in made.text


def test_what_a_merge_wrote_is_what_a_push_completes(out: Path) -> None:
    written = (out / "README.md").read_text()
    assert card(out).text == written
    assert (
        card(out, "org/demo").text.replace("org/demo", "...").replace("# demo", "# recipe")
        == written
    )


def test_figures_are_those_of_the_report(zoo: Zoo) -> None:
    zoo.save("base", {"w": torch.zeros(4), "v": torch.zeros(12)})
    zoo.save("a", {"w": torch.full((4,), 3.0), "v": torch.zeros(12)})
    zoo.save("b", {"w": torch.full((4,), -1.0), "v": torch.full((12,), 2.0)})
    zoo.merge({"method": "linear"})
    text = (zoo.folder / "out" / "README.md").read_text()
    assert "| a | `a` (not published) |  | not stated | 6 |" in text  # sqrt(4 * 9)
    assert "| b | `b` (not published) |  | not stated | 7.211 |" in text  # sqrt(4 + 48)
    assert "signs that conflict at 25% of the entries" in text  # 4 of 16


def test_what_a_user_wrote_stays(out: Path) -> None:
    file = out / "README.md"
    text = file.read_text().replace("license: apache-2.0", "license: mit\nthumbnail: x.png")
    head, mark, rest = text.partition("<!-- mowmerge writes")
    file.write_text(f"{head}![picture](x.png)\n\n{mark}{rest}\n## Thanks\n\nto all\n")
    made = card(out, "org/demo")
    assert (front(made.text)["license"], front(made.text)["thumbnail"]) == ("mit", "x.png")
    assert "![picture](x.png)\n\n<!-- mowmerge writes from here -->\n# demo\n" in made.text
    assert made.text.endswith("## Thanks\n\nto all\n")
    file.write_text("# All my own\n")
    made = card(out, "org/demo")
    assert made.text.endswith("---\n\n# All my own\n")
    assert front(made.text)["license"] == "apache-2.0"


def test_a_licence_of_the_users_own_is_one_statement_and_no_warning(zoo: Zoo, out: Path) -> None:
    readme(zoo, "b", **LLAMA)
    zoo.merge({"method": "ties"}, force=True)
    assert {k: v for k, v in front(card(out).text).items() if "license" in k} == LLAMA
    assert len(card(out).warnings) == 1
    (out / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    made = card(out)
    assert [v for k, v in front(made.text).items() if "license" in k] == ["mit"]
    assert made.warnings == ()


def test_results_are_a_table_and_an_index(out: Path) -> None:
    figure = {
        "task_type": "text-classification", "dataset_type": "org/x", "dataset_name": "X",
        "metric_type": "accuracy", "metric_value": 0.75,
    }  # fmt: skip
    made = card(
        out, "org/demo", Results([figure], ["| task | merged |", "|---|---|", "| X | 0.75 |"])
    )
    (index,) = front(made.text)["model-index"]
    assert index["name"] == "demo"
    (result,) = index["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.75}]
    assert "## Results\n" in made.text and "| X | 0.75 |" in made.text
    (out / "README.md").write_text(made.text)
    again = card(out, "org/demo", Results([{**figure, "metric_value": 0.5}], []))
    assert front(again.text)["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5


def test_trained_routers_and_kept_heads_are_told(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": "wemoe"})
    report = zoo.folder / "out" / "report.json"
    section = {
        "trained": True,
        "objective": "task",
        "steps": 9,
        "kept_step": 8,
        "metrics": {"accuracy": 0.5},
    }
    report.write_text(json.dumps({**json.loads(report.read_text()), "router": section}))
    text = card(zoo.folder / "out").text
    assert "trained routers choose. Objective task, step 8 of 9, accuracy 0.5." in text
    for name in "ab":
        tensors = {"w": torch.ones(2), "classifier.weight": torch.ones(3, 2)}
        zoo.save(name, tensors)
    assert "| needs data | yes |" in text and "| needs to be told the task | no |" in text
    content = {"method": "linear", "models": {n: f"./{n}" for n in "ab"}}
    zoo.merge({**content, "heads": {"match": "classifier.*"}}, "headed")
    text = (zoo.folder / "headed/README.md").read_text()
    assert 'mowmerge.load(folder, task="...")' in text and "| heads | per_task |" in text
    assert "| needs to be told the task | for the head |" in text


def test_a_card_that_cannot_be_read_says_nothing(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    (zoo.folder / "base" / "README.md").write_bytes(b"\xff\xfe")
    (zoo.folder / "a" / "README.md").write_text("---\nlicense: [mit\n---\n")
    (zoo.folder / "b" / "README.md").write_text("---\n- mit\n---\n")
    zoo.merge({"method": "linear"})
    assert "license" not in front((zoo.folder / "out" / "README.md").read_text())


def test_nested_inputs_are_listed_by_their_path(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    inner = {"method": "linear", "models": {"x": "./a", "y": "./b"}}
    zoo.merge({"method": "linear", "base": "./base", "models": {"n": {"source": inner}}})
    rows = json.loads((zoo.folder / "out" / "report.json").read_text())["inputs"]
    assert [row["name"] for row in rows] == ["base", "n.x", "n.y"]


@pytest.mark.parametrize(("text", "kept", "cut"), [
    ("base: /home/me/base\n", "base: base\n", ["/home/me/base"]),
    ("a: '~/x y/z'\n", "a: 'z'\n", ["~/x y/z"]),
    ("a: /m\nb: https://h/m\nc: ./m/m\n", "a: m\nb: https://h/m\nc: ./m/m\n", ["/m"]),
    ('a: "C:\\\\me\\\\b"\n', 'a: "b"\n', ["C:\\me\\b"]),
    ("a: org/x\nb: ../y\n", "a: org/x\nb: ../y\n", []),
])  # fmt: skip
def test_paths_of_this_machine_are_cut_to_their_last_part(
    text: str, kept: str, cut: list[str]
) -> None:
    assert private(text) == (kept, cut)
