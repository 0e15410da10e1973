"""Whether an output folder is what was written: its sums, its files, its tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mowmerge.checkpoint import heads
from mowmerge.checkpoint.dynamic import held
from mowmerge.checkpoint.header import read_header
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.checkpoint.source import Kind, config, find
from mowmerge.checkpoint.writer import NOT_HASHED
from mowmerge.errors import MowmergeError, Problem, SourceError, unreadable
from mowmerge.plan import Stored
from mowmerge.tensors import DTYPES, torch

SUMS = "SHA256SUMS"
UNHASHED = (*NOT_HASHED, SUMS, "router_log.csv")  # ours, and in no line of the sums
CHUNK = 1 << 22  # bytes hashed at a time
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_SIBLING = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Verified:
    """What was found: the files that SHA256SUMS lists with their digests, files that it does not
    list and mowmerge did not write, tensors and bytes that were looked at, and what is wrong."""

    sums: Mapping[str, str]
    unlisted: tuple[str, ...]
    tensors: int
    nbytes: int
    problems: tuple[Problem, ...]


def verify(
    folder: Path,
    *,
    finite: bool = False,
    begin: Callable[[int], Advance] = lambda total: lambda nbytes: None,
) -> Verified:
    """Everything that is wrong with a merged folder, at once; `problems` is empty where nothing is.

    Every file of SHA256SUMS is there with its digest; the config is there, but in a merge of bare
    weights, whose sums list none; every shard is complete and holds what the index says of it; a
    dynamic checkpoint has what its manifest promises and the code that loads it. With `finite`
    every floating tensor is also read, a few MB at a time, for NaN and Inf. `begin` is given the
    bytes to read and returns what is told of those that were.

    Raises:
        SourceError: there is no such folder.
    """
    if not folder.is_dir():
        raise SourceError(f"there is no folder '{folder}'", hint="name a merged folder")
    sums, problems = _listed(folder)
    problems += _whole(folder, sums)
    stored, encoder, found = _weights(folder)
    looked = [one for one in (stored, encoder) if one]
    problems += found
    sizes = {name: (folder / name).stat().st_size for name in sums if (folder / name).is_file()}
    floats = [s for one in looked for s in one.specs.values() if s.kind == "float"]
    advance = begin(sum(sizes.values()) + finite * sum(spec.nbytes for spec in floats))
    problems += _differing(folder, sums, sizes, advance)
    for one in looked if finite else ():
        problems += _not_finite(one, advance)
    there = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    unlisted = sorted(n for n in there if n not in sums and n not in UNHASHED)
    tensors = sum(len(one.tensors) for one in looked)
    said = tuple(dict.fromkeys(problems))
    return Verified(sums, tuple(unlisted), tensors, sum(sizes.values()), said)


def _listed(folder: Path) -> tuple[dict[str, str], list[Problem]]:
    """SHA256SUMS by file name, and the lines that are not to be understood."""
    file = folder / SUMS
    if not file.is_file():
        hint = f"was it merged with --no-hash? `(cd {folder} && sha256sum * > {SUMS})` writes it"
        return {}, [Problem(f"there is no {SUMS}, so nothing can be compared", str(folder), hint)]
    sums, odd = parsed(file.read_text(encoding="utf-8", errors="replace"))
    wrong = "not a digest and a file of this folder"
    return sums, [Problem(wrong, f"{file}:{number}") for number in odd]


def parsed(text: str) -> tuple[dict[str, str], list[int]]:
    """SHA256SUMS as digests by file name, and the numbers of lines that are not such."""
    sums: dict[str, str] = {}
    odd: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        found = _LINE.fullmatch(line)
        path = PurePosixPath(found[2]) if found else None
        if found is None or path is None or path.is_absolute() or ".." in path.parts:
            odd.append(number)
        else:
            sums[path.as_posix()] = found[1]
    return sums, odd


def _differing(
    folder: Path, sums: Mapping[str, str], sizes: Mapping[str, int], advance: Advance
) -> Iterator[Problem]:
    """The listed files that are gone, or are other bytes."""
    for name, digest in sums.items():
        if name not in sizes:
            yield Problem(f"{name} is not there", str(folder), f"{SUMS} lists it: merge again")
            continue
        try:
            found = _sha256(folder / name, advance)
        except OSError as error:
            yield from _refused(error)
            continue
        if found != digest:
            hint = f"it changed after it was written: merge again, or if you changed it, {SUMS} too"
            yield Problem(f"{name} is not what {SUMS} says", str(folder), hint)


def _refused(error: OSError) -> tuple[Problem, ...]:
    """That a file may not be read; any other failure is none of the folder's."""
    if found := unreadable(error):
        return found.problems
    raise error


def _sha256(file: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _whole(folder: Path, sums: Mapping[str, str]) -> list[Problem]:
    """What a loader would miss beside the weights: the config, and the code that it names. A merge
    of weights without a config has none, and no line for it among its sums."""
    try:
        settings = config(folder)
    except MowmergeError as error:
        return list(error.problems)
    except OSError as error:
        return list(_refused(error))
    if _is_adapter(folder) or (sums and not settings and "config.json" not in sums):
        return []
    if not settings:
        hint = f"merge with a base that has one, or put one there and its line into {SUMS}"
        return [Problem("there is no config.json, or an empty one", str(folder), hint)]
    named = settings.get("auto_map") or {}
    modules = {str(place).partition(".")[0] for place in named.values() if "--" not in str(place)}
    if settings.get("model_type") == "mowmerge" and not modules:
        where = str(folder / "config.json")
        return [Problem("a dynamic checkpoint whose config names no modeling code", where)]
    return [
        Problem(f"the modeling code {name}.py is not there", str(folder), "merge again")
        for name in sorted(_imported(folder, modules))
        if not (folder / f"{name}.py").is_file()
    ]


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _imported(folder: Path, modules: set[str]) -> set[str]:
    """These modules and all that they import from beside them."""
    found: set[str] = set()
    waiting = set(modules)
    while waiting:
        name = waiting.pop()
        found.add(name)
        file = folder / f"{name}.py"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        waiting |= set(_SIBLING.findall(text)) - found
    return found


def _weights(folder: Path) -> tuple[Stored | None, Stored | None, list[Problem]]:
    """The folder's weights and its encoder's, if any, where they are whole, and what is wrong with
    them otherwise."""
    problems: list[Problem] = []
    for file in sorted(folder.glob("heads/*.safetensors")):
        try:
            read_header(file)
        except MowmergeError as error:
            problems += error.problems
        except OSError as error:
            problems += _refused(error)
    try:
        if config(folder).get("model_type") == "mowmerge":
            whole = held(folder)
            stored, encoder = whole.stored, whole.encoder
        else:
            kind: Kind = "adapter" if _is_adapter(folder) else "checkpoint"
            stored, encoder = find(str(folder), kind=kind), None
    except MowmergeError as error:
        return None, None, [*problems, *error.problems]
    except OSError as error:
        return None, None, [*problems, *_refused(error)]
    for index in sorted(folder.glob("*.safetensors.index.json")):
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, location in stored.tensors.items():
            if placed.get(name) != Path(location.file).name:
                what = f"tensor '{name}' is in {Path(location.file).name}"
                says = placed.get(name) or "no file"
                problems.append(Problem(f"{what}, and the index says {says}", str(index)))
    return stored, encoder, problems


def _not_finite(stored: Stored, advance: Advance) -> Iterator[Problem]:
    """The floating tensors that hold NaN or Inf."""
    reader = StoredReader(stored)
    for name, spec in stored.specs.items():
        if spec.kind != "float":
            continue
        bad = 0
        for _, data in heads.pieces(reader, name):
            values = torch.frombuffer(data, dtype=DTYPES[spec.dtype].torch)
            bad += values.numel() - int(torch.isfinite(values).sum())
            advance(len(data))
        if bad:
            file = stored.tensors[name].file
            yield Problem(f"tensor '{name}' has {bad:,} values that are NaN or Inf", file)
