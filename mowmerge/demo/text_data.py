"""Five classification tasks on English text that packages of Debian install.

Glosses of WordNet by part of speech, by the kind of thing a noun names and by what a verb is
about (wordnet-base), fortunes by file (fortunes), and terms of the Free On-line
Dictionary of Computing by subject (dict-foldoc).
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path

from mowmerge.errors import SourceError

Sample = tuple[str, str]  # text, label

SPLITS = {"test": 400, "validation": 200, "train": 3400}  # at most; train takes what is left
LENGTHS = range(20, 301)  # characters


@dataclass(frozen=True)
class Source:
    """Where a task's text is under the root, which package puts it there, and how it is read."""

    package: str
    place: str
    labels: Mapping[str, str]  # as the files name them -> as the task names them
    read: Callable[[Path, Sequence[str]], Iterator[Sample]]


def _glosses(file: Path) -> Iterator[Sample]:
    """Each definition in a data file of WordNet, without its examples, by lexical file number."""
    for line in file.read_text("utf-8").splitlines():
        fields, bar, gloss = line.partition(" | ")
        if bar and not line.startswith(" "):
            yield re.split(r'(?:^|[;:,]?\s*)"', gloss)[0].strip(" ;"), fields.split()[1]


def _parts(folder: Path, parts: Sequence[str]) -> Iterator[Sample]:
    """Definitions by part of speech: noun, verb, adj, adv."""
    for part in parts:
        for text, _ in _glosses(folder / f"data.{part}"):
            yield text, part


def _nouns(folder: Path, numbers: Sequence[str]) -> Iterator[Sample]:
    """Definitions of nouns by the lexical files of these numbers."""
    yield from (sample for sample in _glosses(folder / "data.noun") if sample[1] in numbers)


def _verbs(folder: Path, numbers: Sequence[str]) -> Iterator[Sample]:
    """Definitions of verbs by the lexical files of these numbers."""
    yield from (sample for sample in _glosses(folder / "data.verb") if sample[1] in numbers)


def _fortunes(folder: Path, names: Sequence[str]) -> Iterator[Sample]:
    """Each fortune of these files, by file."""
    for name in names:
        for text in (folder / name).read_text("utf-8").split("\n%\n"):
            yield text, name


def _terms(file: Path, subjects: Sequence[str]) -> Iterator[Sample]:
    """The first paragraph of each dictionary entry of these subjects, links without braces."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        entries = re.finditer(r"^ {3}<([^>\n]+)> (.+?)(?=\n\n|\Z)", opened.read(), re.M | re.S)
    for entry in entries:
        subject = entry[1].split(",")[0]
        if subject in subjects:
            yield re.sub(r"[{}]", "", entry[2]), subject


def _own(*names: str) -> dict[str, str]:
    """Labels that are named as the files name them."""
    return dict(zip(names, names, strict=True))


WORDNET, FORTUNES = "usr/share/wordnet", "usr/share/games/fortunes"
SOURCES: Mapping[str, Source] = {
    "pos": Source(
        "wordnet-base", WORDNET,
        {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}, _parts,
    ),
    "nouns": Source(
        "wordnet-base", WORDNET,
        {"04": "act", "05": "animal", "06": "artifact", "08": "body", "10": "communication",
         "13": "food", "15": "location", "18": "person", "20": "plant", "27": "substance"}, _nouns,
    ),
    "verbs": Source(
        "wordnet-base", WORDNET,
        {"29": "body", "31": "cognition", "32": "communication", "38": "motion", "39": "perception",
         "40": "possession"}, _verbs,
    ),
    "fortunes": Source(
        "fortunes", FORTUNES,
        _own("art", "computers", "definitions", "politics", "science", "songs-poems", "work",
             "zippy"), _fortunes,
    ),
    "foldoc": Source(
        "dict-foldoc", "usr/share/dictd/foldoc.dict.dz",
        _own("communications", "company", "hardware", "jargon", "language", "networking",
             "operating system", "programming"), _terms,
    ),
}  # fmt: skip


def splits(task: str, root: Path = Path("/")) -> dict[str, list[Sample]]:
    """The task's samples in splits that share no text, in an order that their sha256 decides.

    Texts are of one line and of 20 to 300 characters; one that bears two labels is left out. No
    label takes more than its even share, so that chance is at most a little above 1 / labels.

    Raises:
        SourceError: a file is not there, or holds no such text; the hint names the package.
    """
    source = SOURCES[task]
    labels: dict[str, set[str]] = defaultdict(set)
    try:
        for text, label in source.read(root / source.place, list(source.labels)):
            labels[" ".join(text.split())].add(source.labels[label])
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _lacking(task, root, str(error)) from error
    share = sum(SPLITS.values()) // len(source.labels)
    pool: dict[str, list[Sample]] = {label: [] for label in source.labels.values()}
    for text in sorted(labels, key=lambda text: _digest(text)[:16]):
        label, *more = labels[text]
        if not more and len(text) in LENGTHS and len(pool[label]) < share:
            pool[label].append((text, label))
    if empty := [label for label, samples in pool.items() if not samples]:
        raise _lacking(task, root, f"there is nothing under '{empty[0]}'")
    rest = sorted(chain(*pool.values()), key=lambda sample: _digest(sample[0])[16:])
    found = {}
    for split, most in SPLITS.items():
        found[split], rest = rest[:most], rest[most:]
    return found


def _digest(text: str) -> bytes:
    """32 bytes of chance, the same everywhere: one half picks samples, the other orders them."""
    return sha256(text.encode()).digest()


def _lacking(task: str, root: Path, why: str) -> SourceError:
    """Which text is not there or no good, and what to install."""
    source = SOURCES[task]
    return SourceError(
        f"the text of task '{task}' cannot be read: {why}",
        where=str(root / source.place),
        hint=f"apt-get install {source.package}, or unpack the package elsewhere"
        f" (dpkg -x {source.package}_*.deb ROOT) and give --root ROOT",
    )
