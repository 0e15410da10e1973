"""The README.md of an output folder: lineage for the Hub; inputs, figures and recipe for a reader.

The card is a function of the folder: recipe.yaml, report.json, config.json and the names of its
files. It is written when a merge ends and again, with the repository's name and results, for a
push. What a user writes outside of its two marks, and keys of the front matter, stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.source import CARD, config
from mowmerge.errors import CheckpointError
from mowmerge.hub import sections
from mowmerge.hub.licence import propagated
from mowmerge.hub.lineage import parents, parted, union

BEGIN, END = "<!-- mowmerge writes from here -->", "<!-- to here -->"
PIPELINES = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering", "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
}  # fmt: skip


@dataclass(frozen=True)
class Results:
    """What an evaluation says: the fields of huggingface_hub.EvalResult for each figure, the lines
    of a Markdown table, and the entries of .eval_results for benchmarks of the Hub."""

    figures: Sequence[Mapping[str, Any]]
    lines: Sequence[str]
    benchmarks: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Card:
    """The text of README.md, and what its reader should be warned of before it is published."""

    text: str
    warnings: tuple[str, ...]


def card(folder: Path, repo: str = "", results: Results | None = None) -> Card:
    """The card of an output folder; `repo` is where it will be, org/name.

    Raises:
        CheckpointError: README.md, report.json or config.json is there and cannot be read.
    """
    held, rest = _existing(folder / CARD)
    report, settings = _report(folder / "report.json"), config(folder)
    files = {p.name for p in folder.iterdir()}
    rows = report.get("inputs", [])
    licence, warnings = propagated(rows)
    recipe = folder / "recipe.yaml"
    text = private(recipe.read_text(encoding="utf-8"))[0] if recipe.is_file() else ""
    front = _front(report, settings, licence, _task_types(text))
    if results:
        held = {key: value for key, value in held.items() if key != "model-index"}
        front["model-index"] = _index(repo or str(report.get("recipe", folder.name)), results)
    if "license" in held and held["license"] != licence.get("license"):
        warnings = []
    about = sections.About(repo, report, settings, files, text, results.lines if results else ())
    merged = {**front, **held}
    if set(held) & {"license", "license_name"}:  # a licence is one statement, never half of each
        named = ("license", "license_name", "license_link")
        merged = {k: v for k, v in merged.items() if k not in named or k in held}
    return Card(_joined(merged, _placed(rest, sections.body(about))), tuple(warnings))


def private(text: str) -> tuple[str, list[str]]:
    """A YAML or JSON text without the folders of this machine, and what was cut from it: of an
    absolute path among its values the last part stays."""
    import yaml

    try:
        found = [value for value in _strings(yaml.safe_load(text)) if _is_absolute(value)]
    except yaml.YAMLError:
        return text, []
    for value in sorted(set(found), key=len, reverse=True):
        for form in (value, json.dumps(value)[1:-1]):  # as it is, and as JSON escapes it
            text = re.sub(rf"(?<![\w.:/~\\-]){re.escape(form)}", _last(value), text)
    return text, sorted(set(found))


def _strings(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return [each for item in value for each in _strings(item)]
    return [value] if isinstance(value, str) else []


def _is_absolute(value: str) -> bool:
    drive = len(value) > 2 and value[1] == ":" and value[2] in "\\/"
    return (value.startswith(("/", "~/")) or drive) and "\n" not in value


def _last(path: str) -> str:
    parts = path.replace("\\", "/").rstrip("/").split("/")
    return parts[-1] or "/"


def _front(
    report: Mapping[str, Any],
    settings: Mapping[str, Any],
    licence: Mapping[str, str],
    tasks: set[str],
) -> dict[str, Any]:
    """The front matter as the folder alone gives it; what is not known is left out."""
    rows = report.get("inputs", [])
    pipeline = _pipeline(settings, rows)
    front: dict[str, Any] = {"library_name": "transformers"}
    base = parents(rows)
    if base:
        front |= {"base_model": base, "base_model_relation": "merge"}
    front |= licence
    for key in ("language", "datasets"):
        if found := union(rows, key):
            front[key] = found
    if pipeline:
        front["pipeline_tag"] = pipeline
    merge = ["merge"] if "models" in report else []
    front["tags"] = [*merge, "mowmerge", *sections.methods(report), *sorted(tasks - {pipeline})]
    return front


def _task_types(recipe: str) -> set[str]:
    """The types of the tasks that a recipe names."""
    import yaml

    held = yaml.safe_load(recipe)
    tasks = held.get("tasks") if isinstance(held, dict) else None
    return {str(task["type"]) for task in (tasks or {}).values() if "type" in task}


def _pipeline(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the model's class says it is for, or what all the inputs' cards say."""
    named = str((settings.get("architectures") or [""])[0])
    by_class = next((tag for end, tag in PIPELINES.items() if named.endswith(end)), "")
    said = {row.get("pipeline_tag") for row in rows}
    agreed = said.pop() if len(said) == 1 else None
    return by_class or str(agreed or "")


def _index(name: str, results: Results) -> Any:
    """model-index, as huggingface_hub writes it."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    figures = [EvalResult(**figure) for figure in results.figures]
    return eval_results_to_model_index(name.rpartition("/")[2], figures)


def _existing(file: Path) -> tuple[dict[str, Any], str]:
    """The front matter and the text of the README.md that is there."""
    import yaml

    if not file.is_file():
        return {}, f"{BEGIN}\n{END}\n"
    try:
        return parted(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", " ")
        raise CheckpointError(
            f"the front matter is not valid YAML: {reason}", where=str(file),
            hint="mend it, or remove README.md: a new one is made",
        ) from error  # fmt: skip


def _placed(rest: str, body: str) -> str:
    """The text with what stands between the marks replaced; without marks it is all a user's."""
    before, begin, tail = rest.partition(BEGIN)
    _, end, after = tail.partition(END)
    return f"{before}{BEGIN}\n{body}\n{END}{after}" if begin and end else rest


def _joined(front: Mapping[str, Any], rest: str) -> str:
    import yaml

    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n{rest if rest.startswith(chr(10)) else chr(10) + rest}"


def _report(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(file)) from error
    return held if isinstance(held, dict) else {}
