"""A Hub in one file: repositories with branches and commits, LFS objects, tokens, and faults.

It speaks the endpoints that huggingface_hub uses to create, upload, commit, list and download, over
plain HTTP and without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"writer": True, "reader": False}  # token -> whether it may write
Files = dict[str, bytes]


@dataclass
class Repo:
    """A model's repository: its commits, its branches, and which of its files are in LFS."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    objects: Files = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Puts files on a branch; the new head."""
        parent = self.branches.get(branch, "")
        digest = hashlib.sha1(f"{parent}{len(self.commits)}".encode()).hexdigest()
        self.commits[digest], self.parents[digest] = dict(files), parent
        self.branches[branch] = digest
        return digest

    def at(self, revision: str) -> str | None:
        """The commit that a branch or a digest names."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, branch: str = "main") -> Files:
        """What a branch holds, but for .gitattributes."""
        held = self.commits[self.branches[branch]]
        return {name: data for name, data in held.items() if name != ".gitattributes"}


@dataclass
class Fault:
    """What happens to the requests that a pattern finds: a status, "drop" (half of the body is
    read, then the line is cut), "lose" (done, but no answer), or a call before it is served.

    `times` is how often; `after` how many go well first."""

    pattern: str
    does: int | str | Callable[[], object]
    times: int = 1
    after: int = 0


@dataclass
class Hub:
    """The server's state: what it holds, what it was asked, what goes wrong."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def repo(self, name: str, files: Files | None = None, *, private: bool = False) -> Repo:
        """A new repository."""
        made = self.repos[name] = Repo(private)
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return made

    def asked(self, pattern: str) -> list[str]:
        """The requests that a pattern finds."""
        return [line for line in self.log if re.search(pattern, line)]

    def fault(self, line: str) -> int | str | Callable[[], object] | None:
        """What is to happen to this request."""
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, line):
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault.does
        return None


@contextmanager
def served() -> Iterator[Hub]:
    """An empty Hub on a port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        line = f"{self.command} {unquote(parts.path)}"
        self.hub.log.append(line)
        fault = self.hub.fault(line)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "drop":
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        if callable(fault):
            fault()
        try:
            if isinstance(fault, int):
                raise Refused(fault, message=f"a fault of {fault}")
            status, content, headers = self._answer(self.command, unquote(parts.path))
        except Refused as error:
            told = json.dumps({"error": error.message}).encode()
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            status, content = error.status, told
        if fault == "lose":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, method: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        for pattern, handle in ROUTES:
            if found := re.fullmatch(pattern, f"{method} {path}"):
                done = handle(self, *found.groups())
                return done if isinstance(done, tuple) else (200, json.dumps(done).encode(), {})
        raise Refused(404, message=f"no such endpoint: {method} {path}")

    def json(self) -> Any:
        return json.loads(self.body)

    def may(self, *, write: bool = False) -> bool:
        """Whether the token is known, or writes; refuses a wrong one."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, message="Invalid credentials in Authorization header")
        if write and not TOKENS.get(token, False):
            raise Refused(403 if token else 401, message="your token may not write here")
        return bool(token)

    def found(self, name: str, revision: str = "main") -> tuple[Repo, str]:
        known, repo = self.may(), self.hub.repos.get(name)
        if repo is None or (repo.private and not known):
            raise Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    # --- what is asked for

    def create(self) -> Any:
        self.may(write=True)
        asked = self.json()
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            raise Refused(409, message="You already created this model repo")
        self.hub.repo(name, private=asked.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{name}"}

    def info(self, name: str, revision: str | None) -> Any:
        repo, commit = self.found(name, revision or "main")
        siblings = [{"rfilename": file} for file in repo.commits[commit]]
        return {"id": name, "sha": commit, "private": repo.private, "siblings": siblings}

    def tree(self, name: str, revision: str) -> Any:
        repo, commit = self.found(name, revision)
        return [
            {"type": "file", "path": file, "size": len(data), "oid": git_sha1(data), **lfs(data)}
            if file in repo.lfs
            else {"type": "file", "path": file, "size": len(data), "oid": git_sha1(data)}
            for file, data in repo.commits[commit].items()
        ]

    def branch(self, name: str, branch: str) -> Any:
        self.may(write=True)
        repo, commit = self.found(name)
        repo.branches.setdefault(branch, commit)
        return {}

    def validate(self) -> Any:
        import yaml

        front = yaml.safe_load(self.json()["content"].split("---\n")[1])
        if not isinstance(front.get("license", "mit"), str):
            told = {"errors": [{"message": '"license" must be a string'}]}
            return 400, json.dumps(told).encode(), {}
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str) -> Any:
        self.may(write="create_pr" not in self.query)
        repo, commit = self.found(name, revision)
        ignored = repo.commits[commit].get(".gitignore", b"").decode().split()
        rows = []
        for file in self.json()["files"]:
            big = file["path"].endswith(".safetensors")
            held = repo.commits[commit].get(file["path"])
            oid = None if held is None else sha256(held) if big else git_sha1(held)
            rows.append({
                "path": file["path"], "uploadMode": "lfs" if big else "regular", "oid": oid,
                "shouldIgnore": file["path"] in ignored,
            })  # fmt: skip
        return {"files": rows}

    def batch(self, name: str) -> Any:
        repo, _ = self.found(name)
        rows: list[dict[str, Any]] = []
        for asked in self.json()["objects"]:
            at = f"{self.hub.url}/lfs/{name}/{asked['oid']}"
            actions = {"upload": {"href": at}, "verify": {"href": f"{at}/verify"}}
            rows.append(asked if asked["oid"] in repo.objects else {**asked, "actions": actions})
        return {"transfer": "basic", "objects": rows}

    def put(self, name: str, oid: str) -> Any:
        if sha256(self.body) != oid:
            raise Refused(400, message="the bytes are not those of the digest")
        self.hub.repos[name].objects[oid] = self.body
        return {}

    def verify(self, name: str, oid: str) -> Any:
        if len(self.hub.repos[name].objects[oid]) != self.json()["size"]:
            raise Refused(400, message="another size")
        return {}

    def commit(self, name: str, revision: str) -> Any:
        request = "create_pr" in self.query
        self.may(write=not request)
        repo, head = self.found(name, revision)
        rows = [json.loads(line) for line in self.body.splitlines()]
        parent = rows[0]["value"].get("parentCommit", head)
        if parent != head and not request:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for row in rows[1:]:
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = repo.objects[value["oid"]]
                repo.lfs.add(value["path"])
            else:
                del files[value["path"]]
        pull = f"refs/pr/{sum(b.startswith('refs/pr/') for b in repo.branches) + 1}"
        if request:
            repo.branches[pull] = parent
        made = repo.commit(files, pull if request else revision)
        url = f"{self.hub.url}/{name}"
        shown = f"{url}/discussions/{pull.rpartition('/')[2]}" if request else None
        return {"commitUrl": f"{url}/commit/{made}", "commitOid": made, "pullRequestUrl": shown}

    def resolve(self, name: str, revision: str, file: str) -> Any:
        repo, commit = self.found(name, revision)
        data = repo.commits[commit].get(file)
        if data is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        tag = sha256(data) if file in repo.lfs else git_sha1(data)
        return 200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}


ID = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., Any]]] = [
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{ID}(?:/revision/(.+))?", _Handler.info),
    (rf"GET /api/models/{ID}/tree/(.+)", _Handler.tree),
    (rf"POST /api/models/{ID}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{ID}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{ID}/commit/(.+)", _Handler.commit),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"PUT /lfs/{ID}/(\w+)", _Handler.put),
    (rf"POST /lfs/{ID}/(\w+)/verify", _Handler.verify),
    (rf"(?:GET|HEAD) /{ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def lfs(data: bytes) -> dict[str, Any]:
    """How a tree lists a file that is in LFS."""
    return {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}}
