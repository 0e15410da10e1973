"""Puts a package into a repository of the Hub: large files first, then one commit.

Each attempt looks at what is there, sends what differs and commits on top of what it saw; so a
second attempt, a second later or the next day, sends what the first did not, and finds out when it
has nothing left to do.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mowmerge import __version__
from mowmerge.checkpoint.source import CARD
from mowmerge.checkpoint.verify import SUMS, parsed
from mowmerge.errors import MowmergeError, SourceError
from mowmerge.hub.package import SCORES, File, Package
from mowmerge.hub.refusals import WRITE, is_passing, refusal

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

PAUSES = (1, 2, 4)  # seconds before another attempt
BARE = (".gitattributes", CARD)  # what a repository may hold and still count as empty
IDENTITY = ("recipe.yaml", "report.json")  # the first of these tells whose a repository is


@dataclass(frozen=True)
class Target:
    """Where a package goes: org/name, a branch ("" for main), whether as a pull request, whether a
    repository that is made is private, and whether other content may be replaced."""

    repo: str
    revision: str = ""
    pr: bool = False
    private: bool = False
    force: bool = False


@dataclass(frozen=True)
class Pushed:
    """The commit, where it is to be seen, the pull request if it is one, and which files were sent
    and which removed; none if all was there."""

    commit: str
    url: str
    pr_url: str | None
    sent: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class _There:
    """What a branch holds: its head, main's head, and its files by name."""

    head: str
    main: str
    files: Mapping[str, RepoFile]

    def has(self, file: File) -> bool:
        """Whether the file is there with these bytes."""
        found = self.files.get(file.name)
        if found is None or found.size != file.nbytes:
            return False
        return found.lfs.sha256 == file.sha256 if found.lfs else found.blob_id == _git_sha1(file)


def push(package: Package, target: Target, tell: Callable[[str], None]) -> Pushed:
    """Uploads a package in one commit; `tell` is given a line now and then.

    Raises:
        SourceError: no token, no permission, no network, a name that holds something else, or a
            branch that moved meanwhile. Nothing was committed.
        CheckpointError: the Hub refuses the card.
    """
    from huggingface_hub import HfApi, get_token

    api = HfApi()
    if get_token() is None:
        raise SourceError("there is no token, and a push needs one", hint=WRITE)

    for pause in (*PAUSES, None):
        try:
            return _attempt(api, package, target, tell)
        except MowmergeError:
            raise
        except Exception as error:
            told = refusal(error, target.repo, api.endpoint)
            if pause is None or not is_passing(error):
                raise told from error
            tell(f"{told.problems[0].message}; once more in {pause} s")
            time.sleep(pause)
    raise AssertionError  # the last attempt returns or raises


def _attempt(api: HfApi, package: Package, target: Target, tell: Callable[[str], None]) -> Pushed:
    """Looks, refuses or sends what differs, and commits it."""
    from huggingface_hub import CommitOperationDelete

    there = _look(api, target, tell)
    same = _same(there, package)
    if not same:
        _refuse_other(there, target)
    changed = [file for file in package.files if not there.has(file)]
    removed = _stale(api, there, package, target.repo, same)
    if not changed and not removed:
        url = f"{api.endpoint}/{target.repo}/tree/{there.head}"
        return Pushed(there.head, url, None, (), ())
    additions = [_addition(file) for file in changed]
    where: dict[str, Any] = {"revision": target.revision or None, "create_pr": target.pr}
    api.preupload_lfs_files(target.repo, additions, **where)
    try:
        done = api.create_commit(
            target.repo, [*(CommitOperationDelete(name) for name in removed), *additions],
            commit_message=f"Push with mowmerge {__version__}", parent_commit=there.head, **where,
        )  # fmt: skip
    except Exception as error:
        if target.pr and is_passing(error):
            raise SourceError(
                "no answer came when the pull request was opened: there may be one",
                hint=f"look at {api.endpoint}/{target.repo}/discussions before another try",
            ) from error
        raise
    if not target.pr:
        _confirm(api, package, target, done.oid)
    sent = tuple(file.name for file in changed)
    return Pushed(done.oid, done.commit_url, done.pr_url, sent, tuple(removed))


def _look(api: HfApi, target: Target, tell: Callable[[str], None]) -> _There:
    """What the branch holds; a repository or a branch that is not there is made."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = target.repo, target.revision
    try:
        info = api.model_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        if target.pr:
            raise
        api.create_repo(repo, private=target.private or None, exist_ok=True)
        tell(f"made {api.endpoint}/{repo}")
        info = api.model_info(repo)
    if target.private and not info.private:
        raise SourceError(
            f"'{repo}' is public, and --private was asked for",
            hint="make it private in its settings, or leave --private out",
        )
    head = info
    if revision:
        try:
            head = api.model_info(repo, revision=revision)
        except RevisionNotFoundError:
            if target.pr:
                raise
            api.create_branch(repo, branch=revision, exist_ok=True)
            head = api.model_info(repo, revision=revision)
    return _There(str(head.sha), str(info.sha), _files(api, repo, str(head.sha)))


def _files(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile]:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, recursive=True, revision=commit)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _same(there: _There, package: Package) -> bool:
    """Whether what is there is an earlier push of the same merge: its recipe is this one."""
    files = {file.name: file for file in package.files}
    known = next((files[name] for name in IDENTITY if name in files), None)
    return known is not None and there.has(known)


def _refuse_other(there: _There, target: Target) -> None:
    """SourceError where a branch holds what is not this merge, unless that is what was asked for:
    a pull request changes nothing, and a branch that is still where main is was made for this."""
    fresh = bool(target.revision) and there.head == there.main
    other = sorted(name for name in there.files if name not in BARE)
    if not other or target.pr or target.force or fresh:
        return
    shown = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
    raise SourceError(
        f"'{target.repo}' holds something else: {len(other)} file(s) ({shown}), and no recipe.yaml"
        " that is this one",
        hint="choose another name, a branch (--revision NAME), a pull request (--pr), or --force",
    )


def _stale(api: HfApi, there: _There, package: Package, repo: str, same: bool) -> list[str]:
    """What the commit removes: scores that an earlier push gave and this one has not; of an earlier
    push of this merge what that one listed and this one has not; of anything else all that would
    stay beside it, but hidden files."""
    ours = {file.name for file in package.files}
    scores = [SCORES] if SCORES in there.files and SCORES not in ours else []
    extra = sorted(n for n in there.files if n not in ours and not n.startswith("."))
    if same and extra:
        listed: Mapping[str, str] = {}
        if SUMS in there.files:
            file = api.hf_hub_download(repo, SUMS, revision=there.head)
            listed, _ = parsed(Path(file).read_text(encoding="utf-8", errors="replace"))
        return [*scores, *(name for name in extra if name in listed)]
    return [*scores, *extra]


def _addition(file: File) -> Any:
    """The file as huggingface_hub takes it, with the digest that was verified."""
    from huggingface_hub import CommitOperationAdd

    held = file.content if isinstance(file.content, bytes) else str(file.content)
    addition = CommitOperationAdd(file.name, held)
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    return addition


def _confirm(api: HfApi, package: Package, target: Target, commit: str) -> None:
    """Looks again: the Hub leaves out what a .gitignore there names."""
    there = _There(commit, commit, _files(api, target.repo, commit))
    absent = [file.name for file in package.files if not there.has(file)]
    if absent:
        raise SourceError(
            f"the commit {commit[:12]} is there without {', '.join(absent)}",
            hint="does a .gitignore of the repository name them?",
        )


def _git_sha1(file: File) -> str:
    """The digest that git has for the file's bytes."""
    digest = hashlib.sha1(f"blob {file.nbytes}\0".encode(), usedforsecurity=False)
    data = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    digest.update(data)
    return digest.hexdigest()
