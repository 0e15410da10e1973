"""The licence that a merge of licensed models may name. A rule, and no legal advice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PERMISSIVE = ("cc0-1.0", "unlicense", "mit", "isc", "bsd-2-clause", "bsd-3-clause", "apache-2.0")
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Terms:
    """A licence as front matter has it: `name` and `link` say which where `id` is `other`."""

    id: str
    name: str = ""
    link: str = ""

    @property
    def known(self) -> bool:
        """Whether it says which licence it is."""
        return bool(self.name) if self.id == "other" else self.id not in ("", "unknown")

    @property
    def shown(self) -> str:
        """What people call it."""
        return self.name if self.id == "other" and self.name else self.id or "not stated"

    @property
    def front(self) -> dict[str, str]:
        """The keys of the front matter."""
        named = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in named.items() if value}


def terms(given: Mapping[str, Any]) -> Terms:
    """What one input says of its licence."""
    ids = given.get("license") or ""
    id = (ids if isinstance(ids, str) else "-or-".join(ids)).strip().lower()
    return Terms(id, str(given.get("license_name") or ""), str(given.get("license_link") or ""))


def propagated(inputs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """The front matter's licence keys for a merge of these inputs, and warnings.

    All inputs say the same: that. All are permissive: the most demanding of them, by the order of
    PERMISSIVE. Some are not: `other`, with the names of those that are not and a link. One says
    nothing: no licence.
    """
    said = {str(given["name"]): terms(given) for given in inputs}
    silent = [name for name, each in said.items() if not each.known]
    if silent or not said:
        who = ", ".join(silent) or "the inputs"
        return {}, [f"the card names no licence: {who} did not say; add `license:` to README.md"]
    distinct = list(dict.fromkeys(said.values()))
    if len({(each.id, each.name) for each in distinct}) == 1:
        return distinct[0].front, []
    if all(each.id in PERMISSIVE for each in distinct):
        return {"license": max((each.id for each in distinct), key=PERMISSIVE.index)}, []
    strict = [given for given in inputs if terms(given).id not in PERMISSIVE]
    names = list(dict.fromkeys(_slug(terms(given).shown) for given in strict))
    link = _link(strict[0]) if len(names) == 1 else "README.md"
    told = ", ".join(f"{name} {each.shown}" for name, each in said.items())
    warning = (
        f"the inputs' licences differ ({told}): the card says `other`,"
        f" {' and '.join(names)}; whether they may be combined is yours to find out"
    )
    return Terms("other", "-and-".join(names), link).front, [warning]


def _link(given: Mapping[str, Any]) -> str:
    """Where an input's licence can be read: its own link, or its page on the Hub."""
    link, source = str(given.get("license_link") or ""), str(given.get("source") or "")
    if link.startswith(("http://", "https://")):
        return link
    if not given.get("revision"):
        return "README.md"
    return f"{HUB}/{source}/blob/main/{link}" if link else f"{HUB}/{source}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
