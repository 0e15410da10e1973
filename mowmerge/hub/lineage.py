"""What a merge knows of its inputs: where each came from, and what its own card says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.source import CARD
from mowmerge.plan import Adapted, Plan, Source, unplaced

_KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


def inputs(plan: Plan, within: str = "") -> list[dict[str, Any]]:
    """A row for each model and adapter that is read: name, source, revision where it is the Hub's,
    and licence, languages, data sets and pipeline of its card. No row names a folder of this
    machine."""
    sources = [*plan.sources.items(), *([("encoder", plan.encoder)] if plan.encoder else [])]
    return [row for name, origin in sources for row in _rows(f"{within}{name}", origin)]


def _rows(name: str, origin: Source) -> list[dict[str, Any]]:
    origin = unplaced(origin)
    if isinstance(origin, Plan):
        return inputs(origin, f"{name}.")
    if isinstance(origin, Adapted):
        adapters = [row for adapter in origin.adapters for row in _rows(f"{name}+", adapter)]
        return [*_rows(name, origin.model), *adapters]
    hub = {"revision": origin.revision} if origin.revision else {}
    source = origin.origin.partition("@")[0] if hub else Path(origin.folder).resolve().name
    return [{"name": name, "source": source, **hub, **_said(Path(origin.folder) / CARD)}]


def parents(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hub ids of the inputs, each once, in the recipe's order."""
    return list(dict.fromkeys(row["source"] for row in rows if row.get("revision")))


def union(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """All that the inputs' cards list under a key, each once."""
    return list(dict.fromkeys(each for row in rows for each in _list(row.get(key))))


def _said(card: Path) -> dict[str, Any]:
    """The front matter's keys that matter here; nothing where it cannot be read."""
    import yaml

    try:
        front, _ = parted(card.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    plain = {key: front[key] for key in _KEPT if isinstance(front.get(key), str | list)}
    return {k: [str(e) for e in v] if isinstance(v, list) else v for k, v in plain.items() if v}


def parted(text: str) -> tuple[dict[str, Any], str]:
    """A card's front matter and the text below it; yaml.YAMLError where that is no YAML."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    found = REGEX_YAML_BLOCK.search(text)
    if found is None:
        return {}, text
    front = yaml.safe_load(found[2])
    return (front if isinstance(front, dict) else {}), text[found.end() :]


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []
