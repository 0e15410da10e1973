"""Models on the Hub: from the cache without network, and from a Hub that is served here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from zoo import Ran, Zoo, load, raw, rewrite

from tests.tokenized import EMBED, firsts, listed, rows, save, words

# --- the Hub's cache


SHA = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"


def cached(zoo: Zoo, model: Path, repo: str, refs: Mapping[str, str]) -> None:
    """Puts a folder into a Hub cache under HF_HOME, as huggingface_hub lays it out."""
    home = zoo.folder / "hf" / "hub" / f"models--{repo.replace('/', '--')}"
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    for ref, sha in refs.items():
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / ref).write_text(sha)
        snapshot = home / "snapshots" / sha
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


def hub(zoo: Zoo, *args: str, **env: str) -> Ran:
    """Merges with a Hub cache in the zoo; asserts that the exit is no traceback."""
    base = {
        "HF_HOME": str(zoo.folder / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "", "HF_HUB_CACHE": str(zoo.folder / "hf/hub"),
        "HF_HUB_OFFLINE": "0", "no_proxy": "*",
    }  # fmt: skip
    ran = zoo.cli("merge", "recipe.yaml", *args, env=base | env)
    assert "Traceback" not in ran.err
    return ran


OFFLINE = {"HF_HUB_OFFLINE": "1"}
FAR = {"HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize("shards", [1, 2])
def test_models_are_taken_from_the_cache_without_network(zoo: Zoo, shards: int) -> None:
    zoo.family("llama", 2, shards=shards)
    wanted, _ = zoo.merge({"method": "linear"}, "wanted")
    cached(zoo, zoo.folder / "base", "org/base", {"main": SHA})
    cached(zoo, zoo.folder / "a", "org/a", {"main": OTHER, "v1": SHA})
    recipe = {"base": "org/base", "models": {"a": "org/a@v1", "b": "./b"}, "method": "linear"}
    zoo.recipe(recipe)
    for env in (OFFLINE, FAR):
        dry = hub(zoo, "--dry-run", "--json", **env)
        assert (dry.rc, dry.err) == (0, "")
        assert {t["name"] for t in json.loads(dry.out)["tensors"]} == set(wanted)
    assert hub(zoo, "out", "-q", **OFFLINE) == Ran(0, "", "")
    assert raw(load(zoo.folder / "out")) == raw(wanted)
    card = (zoo.folder / "out" / "README.md").read_text()
    assert "base_model:\n- org/base\n- org/a\nbase_model_relation: merge\n" in card
    link = f"[org/a](https://huggingface.co/org/a/tree/{SHA})"
    assert f"| a | {link} | {SHA[:12]} |" in card
    lock = (zoo.folder / "out" / "recipe.lock.yaml").read_text()
    for line in (f"base: org/base@{SHA}\n", f"a: {{source: org/a@{SHA}}}", "b: {source: ./b}"):
        assert line in lock
    zoo.recipe(lock)
    assert hub(zoo, "again", "-q", "--locked", **OFFLINE) == Ran(0, "", "")


def test_of_a_tokenizer_the_cache_needs_no_weights(zoo: Zoo) -> None:
    said = words(listed(["<unk>", "x", "y"]))
    save(zoo, "a", said, rows(1, 2, 3))
    save(zoo, "other", words(listed(["y", "<unk>"])), rows(0, 0))
    (zoo.folder / "other/model.safetensors").unlink()
    cached(zoo, zoo.folder / "other", "org/other", {"v1": SHA})
    vocabulary = {"source": {"tokenizer": "org/other@v1"}}
    zoo.recipe({"models": {"a": "./a"}, "method": "passthrough", "vocabulary": vocabulary})
    assert hub(zoo, "out", "-q", **OFFLINE) == Ran(0, "", "")
    assert firsts(load(zoo.folder / "out")[EMBED]) == [3, 1]
    lock = (zoo.folder / "out/recipe.lock.yaml").read_text()
    assert f"tokenizer: org/other@{SHA}" in lock
    card = (zoo.folder / "out/README.md").read_text()
    assert "base_model:" not in card


def test_a_commit_names_a_snapshot(zoo: Zoo) -> None:
    zoo.family("llama", 1)
    cached(zoo, zoo.folder / "a", "org/a", {"main": SHA})
    zoo.recipe({"models": {"a": f"org/a@{SHA}"}, "method": "passthrough"})
    assert hub(zoo, "--dry-run", **OFFLINE).rc == 0


@pytest.mark.parametrize("lacking", ["all", "revision", "shard", "weights"])
def test_what_the_cache_lacks_is_named_with_the_command_that_gets_it(
    zoo: Zoo, lacking: str
) -> None:
    zoo.family("llama", 1, shards=2 if lacking == "shard" else 1)
    if lacking == "shard":
        (zoo.folder / "a" / "model-00002-of-00002.safetensors").unlink()
    if lacking == "weights":
        (zoo.folder / "a" / "model.safetensors").unlink()
    if lacking != "all":
        cached(zoo, zoo.folder / "a", "org/a", {"other" if lacking == "revision" else "main": SHA})
    zoo.recipe({"models": {"a": "org/a@main"}, "method": "passthrough"})
    for env in (OFFLINE, *([FAR] if lacking == "all" else [])):  # it asks again and again otherwise
        for args in (("out",), ("out", "--dry-run")):
            ran = hub(zoo, *args, **env)
            assert ran.rc == 5, ran.err
            assert "recipe.yaml:3: " in ran.err
            assert "-> where there is a network: `hf download org/a --revision main`" in ran.err
            assert not (zoo.folder / "out").exists()


# --- a Hub


class Hub(BaseHTTPRequestHandler):
    """Serves `models` (repository -> folder) as the Hub does, and logs what was asked for."""

    models: Mapping[str, Path]
    log: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        span = self.headers.get("Range", "")
        self.log.append(f"{self.command} {path} {span}".strip())
        repo = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        if repo not in self.models:
            self.reply(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="not found")
            return
        files = {
            file.relative_to(self.models[repo]).as_posix(): file
            for file in sorted(self.models[repo].rglob("*")) if file.is_file()
        }  # fmt: skip
        if parts[0] != "api":
            self.send_file(files.get("/".join(parts[4:])), span)
        elif parts[4:5] == ["tree"]:
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag(file)[:40]}
                for name, file in files.items()
            ]
            self.reply(200, json.dumps(rows).encode(), Content_Type="application/json")
        elif parts[4:] in ([], ["revision", "main"], ["revision", SHA]):
            info = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
            self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        else:
            self.reply(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="no revision")

    def send_file(self, file: Path | None, span: str) -> None:
        if file is None:
            self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="no entry")
            return
        content, headers = file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": SHA}
        size, status = len(content), 200
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1 if last else size]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{size}"
            status = 206
        headers["Content-Length"] = str(len(content))
        self.reply(status, content, **{k.replace("-", "_"): v for k, v in headers.items()})


def etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def served(zoo: Zoo) -> Iterator[tuple[Zoo, list[str], dict[str, str]]]:
    """Three models on a local Hub, the request log, and the environment that points there."""
    zoo.family("llama", 2, shards=2)
    folder = zoo.folder / "a"
    for extra in ("onnx/model.onnx", "onnx/model.safetensors", "original/consolidated.pth",
                  "pytorch_model.bin", "model.gguf", "README.md", "images/plot.png"):  # fmt: skip
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"not needed" * 1000)
    single = zoo.save("single", load(zoo.folder / "b"))
    (single / "consolidated.safetensors").write_bytes(b"not needed" * 1000)
    for index in single.glob("*.index.json"):
        index.unlink()
    log: list[str] = []
    models = {"org/base": zoo.folder / "base", "org/a": folder, "org/b": single}
    handler = type("Handler", (Hub,), {"models": models, "log": log})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield zoo, log, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


REMOTE = {"base": "org/base", "models": {"a": "org/a@main", "b": "org/b"}, "method": "ties"}


def test_only_what_is_needed_is_downloaded(served: tuple[Zoo, list[str], dict[str, str]]) -> None:
    zoo, log, env = served
    wanted, _ = zoo.merge(REMOTE | {"base": "./base", "models": {"a": "./a", "b": "./b"}}, "wanted")
    zoo.recipe(REMOTE)
    dry = hub(zoo, "--dry-run", "--json", **env)
    assert (dry.rc, dry.err) == (0, "")
    shards = [line for line in log if line.endswith(".safetensors") or ".safetensors " in line]
    assert len(shards) >= 5
    assert all("bytes=0-" in line for line in shards if line.startswith("GET"))
    assert not list((zoo.folder / "hf").rglob("*.safetensors"))
    assert hub(zoo, "out", "-q", **env) == Ran(0, "", "")
    assert raw(load(zoo.folder / "out")) == raw(wanted)
    asked = {line.split(SHA)[1].split()[0].strip("/") for line in log if "/resolve/" in line}
    assert {name for name in asked if not name.endswith((".json", ".jinja", "LICENSE", ".md"))} == {
        "model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    }  # fmt: skip
    plan = json.loads(dry.out)
    assert plan["write_bytes"] == (zoo.folder / "out" / "model.safetensors").stat().st_size
    again = hub(zoo, "--dry-run", "--json", **env)
    assert json.loads(again.out) == plan
    seen = len(log)
    assert hub(zoo, "--dry-run", "--json", **OFFLINE).out == again.out
    assert len(log) == seen


def test_what_is_not_on_the_hub(served: tuple[Zoo, list[str], dict[str, str]]) -> None:
    zoo, _, env = served
    zoo.recipe({"models": {"a": "org/nothing", "b": "org/b@v9"}, "method": "linear"})
    ran = hub(zoo, "out", **env)
    assert ran.rc == 5
    assert "recipe.yaml:3: there is no 'org/nothing' on the Hub" in ran.err
    assert "recipe.yaml:4: there is no 'org/b' at revision 'v9' on the Hub" in ran.err
    assert ran.err.count("\n  -> check the spelling") == 2


@pytest.mark.parametrize("kind", ["config", "fp8", "adapter", "pickle"])
def test_what_is_refused_here_is_refused_there_before_a_download(
    served: tuple[Zoo, list[str], dict[str, str]], kind: str
) -> None:
    zoo, log, env = served
    folder = zoo.folder / "single"
    if kind == "config":
        (folder / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    elif kind == "fp8":
        header = {"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
        rewrite(folder / "model.safetensors", lambda h: (h.clear(), h.update(header)), b"\0" * 4)
    else:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        (folder / "consolidated.safetensors").unlink()
        if kind == "adapter":
            (folder / "adapter_config.json").write_text("{}")
            (folder / "adapter_model.safetensors").write_text("")
    zoo.recipe({"models": {"b": "org/b"}, "method": "passthrough"})
    ran = hub(zoo, "--dry-run", **env)
    words = {"adapter": "merge_and_unload", "pickle": "--allow-pickle"}
    assert (ran.rc, words.get(kind, "is quantised") in ran.err) == (4, True), ran.err
    assert not [line for line in log if line.startswith("GET") and ".bin" in line]
