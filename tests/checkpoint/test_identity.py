"""Digests of inputs: cached for as long as a file is what it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mowmerge.checkpoint import identity
from mowmerge.errors import CheckpointError

OLD = 10**18  # a time of change, in ns, that is long past
NAME = "ab" * 32


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = tmp_path / "w.safetensors"
    found.write_bytes(b"one")
    os.utime(found, ns=(OLD, OLD))
    return found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_digest_is_taken_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity.sha256(file) == digest(b"one")

    def never(*args: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(hashlib, "file_digest", never)
    assert identity.sha256(file) == digest(b"one")
    link = file.with_name("link")
    link.symlink_to(file)
    assert identity.sha256(link) == digest(b"one")


@pytest.mark.parametrize("what", ["size", "time", "inode"])
def test_another_file_has_another_digest(file: Path, what: str) -> None:
    identity.sha256(file)
    content = b"three" if what == "size" else b"two"
    other = file.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(OLD, OLD + (what == "time")))
    if what == "inode":
        other.replace(file)
    else:
        file.write_bytes(content)
        os.utime(file, ns=(OLD, OLD + (what == "time")))
    assert identity.sha256(file) == digest(content)


def test_a_file_just_written_is_not_trusted_to_its_time(file: Path) -> None:
    file.write_bytes(b"two")
    seen = identity.of(file)
    assert identity.sha256(file) == digest(b"two")
    file.write_bytes(b"six")
    os.utime(file, ns=(seen[1], seen[1]))
    assert identity.of(file) == seen
    assert identity.sha256(file) == digest(b"six")


def test_the_hubs_cache_has_digests_as_names(file: Path) -> None:
    one, hub = digest(b"one"), "models--org--a"
    for home, name, wanted in ((hub, NAME, NAME), (hub, "ab" * 20, one), ("else", NAME, one)):
        blobs = file.parent / home / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        file.with_name("link").unlink(missing_ok=True)
        (blobs / name).write_bytes(b"one")
        file.with_name("link").symlink_to(blobs / name)
        assert identity.sha256(file.with_name("link")) == wanted


def test_a_cache_of_no_use_is_done_without(file: Path) -> None:
    (file.parent / "cache").write_text("a file")
    assert identity.sha256(file) == digest(b"one")
    (file.parent / "cache").unlink()
    identity.sha256(file)
    kept = next((file.parent / "cache/mowmerge/hashes").iterdir())
    for text in ("", "[]", '{"identity": 1}'):
        kept.write_text(text)
        assert identity.sha256(file) == digest(b"one")


def test_a_file_that_is_gone_is_said(file: Path) -> None:
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        identity.sha256(file)
