"""The chat template of an output: the one most models have, that of a model, or a text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from mowmerge.checkpoint.tokenizers import template
from mowmerge.checkpoint.tokens import home
from mowmerge.errors import CheckpointError
from mowmerge.plan import Source


def chosen(asked: str | None, sources: Mapping[str, Source], where: str) -> str | None:
    """The text of the template that is asked for; None where none is, and the donor's stays.

    `auto` is the text that most models have, the first of those that as many have; None where no
    model has one.

    Raises:
        CheckpointError: the model that is named has none.
    """
    if asked is None or "{" in asked:
        return asked
    names = [asked] if asked != "auto" else list(sources)
    held = [template(home(sources[name])) for name in names]
    texts = [text.strip() for text in held if isinstance(text, str) and text.strip()]
    if not texts and asked == "auto":
        return None
    if not texts:
        told, hint = f"model '{asked}' has no chat template", "write the template itself"
        raise CheckpointError(told, where=where, hint=f"{hint}, or leave it out")
    return Counter(texts).most_common(1)[0][0]


def write(text: str, folder: Path) -> None:
    """Makes it the one template of a folder's tokenizer."""
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        held = json.loads(settings.read_text("utf-8"))
        if held.pop("chat_template", None) is not None:
            changed = json.dumps(held, indent=2, ensure_ascii=False) + "\n"
            settings.write_text(changed, encoding="utf-8")
