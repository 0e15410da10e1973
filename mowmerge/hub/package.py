"""What a push would upload: the files of an output folder that belong to it, and the card."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.source import CARD
from mowmerge.checkpoint.verify import SUMS, UNHASHED, Advance, verify
from mowmerge.errors import CheckpointError, SourceError
from mowmerge.hub.card import Results, card, private

SCORES = ".eval_results/mowmerge.yaml"
TEXTS = ("recipe.yaml", "recipe.lock.yaml", "report.json")  # may name folders of this machine


@dataclass(frozen=True)
class File:
    """One file to upload: its name in the repository, its size and digest, and where its bytes are:
    on disk, or here."""

    name: str
    nbytes: int
    sha256: str
    content: Path | bytes


@dataclass(frozen=True)
class Package:
    """All that would be uploaded, in order of name, and what its sender should know."""

    card: str
    files: tuple[File, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def package(
    folder: Path,
    repo: str,
    results: Results | None = None,
    begin: Callable[[int], Advance] = lambda total: lambda nbytes: None,
) -> Package:
    """The verified folder as it will be on the Hub. Needs no network and changes nothing here.

    Every file of SHA256SUMS is taken, with the files that mowmerge writes beside it; others are
    left out and named, but for hidden ones. The card is completed. From the recipe and the report
    folders of this machine are cut, and SHA256SUMS follows.

    Raises:
        SourceError: there is no such folder, or `repo` is no name for a repository.
        CheckpointError: it is not whole; every fault is named.
    """
    _check(repo)
    found = verify(folder, begin=begin)
    if found.problems:
        raise CheckpointError(found.problems)
    made = card(folder, repo, results)
    ours = [name for name in UNHASHED if name not in (CARD, SUMS) and (folder / name).is_file()]
    files = {CARD: _held(CARD, made.text.encode())}
    sums, cut = dict(found.sums), []
    for name in [*sums, *ours]:
        files[name] = _stored(folder, name, sums.get(name))
        if name in TEXTS:
            text, lost = private((folder / name).read_text(encoding="utf-8"))
            if lost:
                files[name] = _held(name, text.encode())
                cut += lost
        if name in sums:
            sums[name] = files[name].sha256
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    files[SUMS] = _held(SUMS, lines.encode())
    if results and results.benchmarks:
        files[SCORES] = _held(SCORES, _scores(results.benchmarks))
    shown = tuple(name for name in found.unlisted if not _hidden(name))
    warnings = [*made.warnings]
    if cut:
        where = ", ".join(sorted(set(cut)))
        warnings.append(f"of these paths only the last part is published: {where}")
    return Package(made.text, tuple(files[name] for name in sorted(files)), shown, tuple(warnings))


def _scores(benchmarks: Sequence[Mapping[str, Any]]) -> bytes:
    """What the Hub reads onto the page of a model and the leaderboards of benchmarks."""
    import yaml

    return yaml.safe_dump([dict(each) for each in benchmarks], sort_keys=False).encode()


def _check(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SourceError(
            f"'{repo}' is no name for a repository: {error}", hint="name it org/name"
        ) from error
    if "/" not in repo:
        raise SourceError(f"'{repo}' does not say whose it is", hint="name it org/name")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _held(name: str, data: bytes) -> File:
    return File(name, len(data), hashlib.sha256(data).hexdigest(), data)


def _stored(folder: Path, name: str, digest: str | None) -> File:
    file = folder / name
    if digest is None:
        return _held(name, file.read_bytes())
    return File(name, file.stat().st_size, digest, file)
