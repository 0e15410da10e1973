"""What the Hub, or the way to it, refused: as an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator

from mowmerge.errors import CheckpointError, MowmergeError, SourceError

WRITE = "run `hf auth login`, or set HF_TOKEN, with a token that may write"


def is_passing(error: BaseException) -> bool:
    """Whether it may go well a moment later: no connection, too many requests, a server's fault."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return any("TransportError" in _family(each) for each in _chain(error))


def refusal(error: BaseException, repo: str, endpoint: str) -> MowmergeError:
    """The error for what huggingface_hub raised; its types are told apart by name and status."""
    names = {name for each in _chain(error) for name in _family(each)}
    status, words = _status(error), _words(error)
    said = f": {words}" if words else ""
    if "OfflineModeIsEnabled" in names:
        return SourceError(
            "HF_HUB_OFFLINE is set, and a push needs the network",
            hint="unset it; `--dry-run` needs none",
        )
    if "Invalid metadata in README.md" in str(error):
        return CheckpointError(
            f"the Hub refuses the card: {' '.join(str(error).split())}", where="README.md",
            hint="mend its front matter; `--dry-run` shows the card",
        )  # fmt: skip
    if status is None and any("TransportError" in name for name in names):
        reason = str(list(_chain(error))[-1]) or type(error).__name__
        return SourceError(
            f"{endpoint} cannot be reached: {reason}",
            hint="what was uploaded is kept there for a while: run this again",
        )
    if status in (402, 403):
        return SourceError(f"you may not write to '{repo}'{said}", hint=f"{WRITE} there")
    if status == 401 or "RepositoryNotFoundError" in names:
        return SourceError(f"there is no '{repo}' that this token may write to{said}", hint=WRITE)
    if status == 412 or (status == 409 and "commit" in str(error)):
        return SourceError(
            f"'{repo}' changed while this was uploaded, and nothing was committed{said}",
            hint="look at what is there now, and run this again: no file is sent twice",
        )
    if status == 429:
        hint = "wait some minutes and run this again: no file is sent twice"
        return SourceError(f"the Hub takes no more requests for now{said}", hint=hint)
    if status is not None and status >= 500:
        return SourceError(
            f"the Hub failed ({status}){said}", hint="run this again later: no file is sent twice"
        )
    if status:
        return SourceError(f"the Hub refuses ({status}){said}", hint="nothing was committed")
    reason = "; ".join(f"{type(each).__name__}: {each}" for each in _chain(error))
    return SourceError(f"the upload failed: {reason}", hint="nothing was committed")


def _status(error: BaseException) -> int | None:
    found = (getattr(getattr(e, "response", None), "status_code", None) for e in _chain(error))
    return next((status for status in found if isinstance(status, int)), None)


def _words(error: BaseException) -> str:
    """What the server said, in one line."""
    found = (getattr(each, "server_message", None) for each in _chain(error))
    return " ".join(next((str(words) for words in found if words), "").split())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _family(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]
