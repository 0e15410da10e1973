"""The text zoo's tasks, read from tiny files in the formats of Debian's packages."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mowmerge.demo import text_data
from mowmerge.demo.text_data import SOURCES, SPLITS, splits
from mowmerge.errors import SourceError

INSTALLED = Path("/")
WORDNET = "  1 This software and database is being provided to you\n"


def gloss(number: str, text: str) -> str:
    """A line of WordNet's database: what is before the bar is not read but for the file number."""
    return f"00001740 {number} n 01 thing 0 001 ~ 00001930 n 0000 | {text}  \n"


def write(root: Path, place: str, content: str | bytes) -> None:
    file = root / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def tiny(root: Path, each: int = 4) -> Path:
    """A root under which every task has `each` texts of every label."""
    for part in ("noun", "verb", "adj", "adv"):
        kinds = SOURCES[{"noun": "nouns", "verb": "verbs"}.get(part, "pos")].labels
        lines = [
            gloss(number, f'{part} number {i} of the kind called {kind}; "as in this"')
            for number, kind in kinds.items()
            for i in range(each)
        ]
        write(root, f"usr/share/wordnet/data.{part}", WORDNET + "".join(lines))
    for name in SOURCES["fortunes"].labels:
        texts = [f"Wise words\n\tnumber {i} in the file\n\t\t-- {name}" for i in range(each)]
        write(root, f"usr/share/games/fortunes/{name}", "\n%\n".join([*texts, ""]))
    terms = [
        f"{subject} {i}\n\n   <{subject}, x> A {{term}} of {subject},\n   {{link}} {i}.\n\nMore."
        for subject in SOURCES["foldoc"].labels
        for i in range(each)
    ]
    write(root, "usr/share/dictd/foldoc.dict.dz", gzip.compress("\n\n".join(terms).encode()))
    return root


def held(found: dict[str, list[text_data.Sample]]) -> dict[str, str]:
    return dict(sample for samples in found.values() for sample in samples)


@pytest.mark.parametrize(
    ("task", "text", "label"),
    [
        ("pos", "adj number 1 of the kind called adjective", "adjective"),
        ("nouns", "noun number 3 of the kind called food", "food"),
        ("verbs", "verb number 0 of the kind called motion", "motion"),
        ("fortunes", "Wise words number 2 in the file -- zippy", "zippy"),
        ("foldoc", "A term of operating system, link 0.", "operating system"),
    ],
)
def test_each_format_is_read(tmp_path: Path, task: str, text: str, label: str) -> None:
    found = held(splits(task, tiny(tmp_path)))
    assert found[text] == label
    assert set(found.values()) == set(SOURCES[task].labels.values())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("move fast; on foot", "move fast; on foot"),
        ('move fast; "run, run"; "he ran; fast"', "move fast"),
        ('move fast: "run"', "move fast"),
        ('"only an example"', ""),
    ],
)
def test_a_definition_ends_where_the_examples_begin(
    tmp_path: Path, line: str, expected: str
) -> None:
    write(tmp_path, "data.verb", WORDNET + gloss("38", line))
    assert list(text_data._glosses(tmp_path / "data.verb")) == [(expected, "38")]


def test_what_is_long_short_or_of_two_labels_is_left_out(tmp_path: Path) -> None:
    tiny(tmp_path)
    both = "said of both, and so of neither"
    for name in ("art", "work"):
        file = f"usr/share/games/fortunes/{name}"
        old = (tmp_path / file).read_text()
        write(tmp_path, file, f"{old}too short\n%\n{'long ' * 61}\n%\n{both}\n%\n")
    texts = held(splits("fortunes", tmp_path))
    assert len(texts) == 4 * 8
    assert all(len(text) in text_data.LENGTHS for text in texts) and both not in texts


def test_splits_share_nothing_and_labels_are_even(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_data, "SPLITS", {"test": 20, "validation": 10, "train": 50})
    tiny(tmp_path, each=40)
    found = splits("fortunes", tmp_path)
    assert {split: len(samples) for split, samples in found.items()} == text_data.SPLITS
    assert len(held(found)) == 80
    assert set(Counter(held(found).values()).values()) == {10}
    again = splits("fortunes", tmp_path)
    assert found == again


@pytest.mark.parametrize("task", SOURCES)
@pytest.mark.parametrize("spoil", [None, b"", b"\xff\xfe"])
def test_text_that_is_not_there_is_named_with_its_package(
    tmp_path: Path, task: str, spoil: Any
) -> None:
    if spoil is not None:
        for file in tiny(tmp_path).rglob("*"):
            if file.is_file():
                file.write_bytes(spoil)
    with pytest.raises(SourceError, match=f"text of task '{task}'") as caught:
        splits(task, tmp_path)
    assert f"apt-get install {SOURCES[task].package}," in caught.value.problems[0].hint
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("task", SOURCES)
def test_the_text_of_debian(task: str) -> None:
    if not (INSTALLED / SOURCES[task].place).exists():
        pytest.skip(f"the Debian package {SOURCES[task].package} is not installed")
    found = splits(task)
    assert len(held(found)) == sum(map(len, found.values()))
    assert len(found["test"]) == SPLITS["test"] >= 300
    assert len(found["train"]) > 1500
    labels = Counter(label for _, label in found["test"])
    assert set(labels) == set(SOURCES[task].labels.values())
    assert max(labels.values()) < 2 * len(found["test"]) / len(labels)
