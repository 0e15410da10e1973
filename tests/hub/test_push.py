"""A folder is put on a Hub that is served here: whole, in one commit, whatever goes wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import Fault, Files, Hub, served
from huggingface_hub import constants
from zoo import Ran, Zoo

from mowmerge.checkpoint.verify import verify
from mowmerge.hub.card import Results
from mowmerge.hub.package import package

# huggingface_hub's own upload, of which its HTTP library says so
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SHARDS = {"method": "linear", "output": {"shard_size": "8kB"}}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with served() as made:
        yield made


@pytest.fixture
def out(zoo: Zoo) -> Path:
    """A merged folder in three shards."""
    zoo.family("llama", 2)
    zoo.merge(SHARDS, hashes=True)
    return zoo.folder / "out"


def env(zoo: Zoo, hub: Hub, **extra: str) -> dict[str, str]:
    home = str(zoo.folder / "hf")
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": "writer", "HF_HOME": home,
        "HF_HUB_CACHE": f"{home}/hub", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*", **extra,
    }  # fmt: skip


def push(zoo: Zoo, hub: Hub, *args: str, to: str = "org/demo", **extra: str) -> Ran:
    """Pushes in this process, without waiting; huggingface_hub has read the environment already."""
    given = env(zoo, hub, **extra)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HF_HUB_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "no_proxy"):
            patch.setenv(name, given.get(name, ""))
        patch.setattr(constants, "ENDPOINT", given["HF_ENDPOINT"])
        patch.setattr(constants, "HF_HUB_CACHE", given["HF_HUB_CACHE"])
        patch.setattr(constants, "HF_TOKEN_PATH", f"{given['HF_HOME']}/token")
        patch.setattr(constants, "HF_HUB_OFFLINE", given["HF_HUB_OFFLINE"] == "1")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr(time, "sleep", lambda seconds: None)
        return zoo.here("push", "out", to, *args)


def fresh(zoo: Zoo, hub: Hub, *args: str, **extra: str) -> Ran:
    """Pushes in a process of its own."""
    ran = zoo.cli("push", "out", "org/demo", *args, env=env(zoo, hub, **extra))
    assert "Traceback" not in ran.err, ran.err
    return ran


def on_disk(folder: Path) -> Files:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def same(hub: Hub, out: Path, branch: str = "main", repo: str = "org/demo") -> bool:
    """Whether a branch holds the folder's files byte for byte, but for the card."""
    there, here = hub.repos[repo].files(branch), on_disk(out)
    return {**there, "README.md": b""} == {**here, "README.md": b""}


# --- what is pushed


def test_a_push_makes_the_repository_and_one_commit(zoo: Zoo, hub: Hub, out: Path) -> None:
    ran = fresh(zoo, hub)
    repo = hub.repos["org/demo"]
    head = repo.branches["main"]
    assert (ran.rc, ran.out) == (0, f"{hub.url}/org/demo/commit/{head}\n"), ran.err
    assert same(hub, out)
    assert len(repo.commits) == 2 and not repo.private
    uploads = [i for i, line in enumerate(hub.log) if line.startswith("PUT")]
    commits = [i for i, line in enumerate(hub.log) if "/commit/" in line]
    assert len(uploads) == 3 and len(commits) == 1 and max(uploads) < commits[0]
    assert f"made {hub.url}/org/demo" in ran.err


def test_what_was_pushed_is_read_back_and_verifies(zoo: Zoo, hub: Hub, out: Path) -> None:
    assert push(zoo, hub).rc == 0
    code = (
        "import sys; from mowmerge.checkpoint.source import find;"
        " from huggingface_hub import snapshot_download as get;"
        " print(find('org/demo').folder); print(get('org/demo'))"
    )
    ran = zoo.python(code, env=env(zoo, hub))
    assert ran.rc == 0, ran.err
    found, whole = (Path(line) for line in ran.out.split())
    assert {p.name for p in found.glob("*.safetensors")} == {
        p.name for p in out.glob("*.safetensors")
    }
    assert verify(whole, finite=True).problems == ()
    assert {**on_disk(whole), "README.md": b"", ".gitattributes": b""} == {
        **on_disk(out), "README.md": b"", ".gitattributes": b""
    }  # fmt: skip


def test_a_second_push_has_nothing_to_do(zoo: Zoo, hub: Hub, out: Path) -> None:
    first = json.loads(push(zoo, hub, "--json").out)
    assert first["sent"] == sorted(on_disk(out)) and first["removed"] == []
    seen = len(hub.log)
    again = json.loads(push(zoo, hub, "--json").out)
    assert (again["sent"], again["commit"]) == ([], first["commit"])
    assert not [line for line in hub.log[seen:] if not line.startswith("GET")]


def test_a_dry_run_needs_no_network_and_is_exact(zoo: Zoo, hub: Hub, out: Path) -> None:
    dry = fresh(zoo, hub, "--dry-run", "--json", HF_HUB_OFFLINE="1", HF_TOKEN="")
    assert (dry.rc, hub.log) == (0, [])
    told = json.loads(dry.out)
    shown = push(zoo, hub, "--dry-run", HF_HUB_OFFLINE="1", HF_TOKEN="")
    assert shown.out.startswith(told["card"])
    assert push(zoo, hub).rc == 0
    there = hub.repos["org/demo"].files()
    assert there["README.md"].decode() == told["card"]
    assert {f["path"]: f["bytes"] for f in told["files"]} == {n: len(d) for n, d in there.items()}
    assert told["bytes"] == sum(map(len, there.values()))
    assert 'from_pretrained("org/demo")' in told["card"]


def test_a_dynamic_checkpoint_carries_its_code_and_routers(zoo: Zoo, hub: Hub) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": "wemoe"}, hashes=True)
    assert push(zoo, hub).rc == 0
    assert same(hub, zoo.folder / "out")
    assert {"modeling.py", "codecs.py", "router.safetensors"} <= set(hub.repos["org/demo"].files())


def test_no_path_of_this_machine_is_published(zoo: Zoo, hub: Hub) -> None:
    zoo.family("llama", 2)
    models = {n: f"{zoo.folder}/{n}" for n in "ab"}
    zoo.merge({"method": "linear", "models": models, "base": f"{zoo.folder}/base"}, hashes=True)
    ran = push(zoo, hub)
    assert ran.rc == 0
    assert f"of these paths only the last part is published: {zoo.folder}/a" in ran.err
    there = hub.repos["org/demo"].files()
    assert not [name for name, data in there.items() if str(zoo.folder).encode() in data]
    assert json.loads(there["recipe.yaml"])["models"] == {"a": "a", "b": "b"}
    folder = zoo.folder / "back"
    folder.mkdir()
    for name, data in there.items():
        (folder / name).write_bytes(data)
    assert verify(folder).problems == ()
    assert json.loads(push(zoo, hub, "--json").out)["sent"] == []


def test_files_of_others_stay_here_and_are_named(zoo: Zoo, hub: Hub, out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    (out / ".DS_Store").write_text("mine")
    ran = push(zoo, hub)
    assert ran.rc == 0
    assert "warning: left out, since SHA256SUMS lists it not: notes.txt\n" in ran.err
    assert ".DS_Store" not in ran.err
    assert not {"notes.txt", ".DS_Store"} & set(hub.repos["org/demo"].files())


# --- faults on the way


STEPS = {
    "preparing": ["GET /api/models/org/demo$", "/api/repos/create", "/commit/"],
    "uploading": ["/tree/", "/validate-yaml", "/preupload/", "/batch", "^PUT", "/verify"],
}


@pytest.mark.parametrize("does", [500, 429, "drop"])
@pytest.mark.parametrize("steps", list(STEPS))
def test_one_fault_at_each_step_is_survived(
    zoo: Zoo, hub: Hub, out: Path, steps: str, does: int | str
) -> None:
    hub.faults = [Fault(pattern, does) for pattern in STEPS[steps]]
    ran = push(zoo, hub)
    assert ran.rc == 0, ran.err
    assert [fault.times for fault in hub.faults] == [0] * len(hub.faults)
    assert same(hub, out) and len(hub.repos["org/demo"].commits) == 2
    assert "once more in" in ran.err


def test_a_commit_whose_answer_was_lost_is_not_made_twice(zoo: Zoo, hub: Hub, out: Path) -> None:
    hub.faults = [Fault("/commit/", "lose")]
    ran = push(zoo, hub, "--json")
    assert ran.rc == 0, ran.err
    assert same(hub, out)
    assert len(hub.repos["org/demo"].commits) == 2
    assert json.loads(ran.out)["commit"] == hub.repos["org/demo"].branches["main"]


def test_the_second_try_sends_only_what_the_first_did_not(zoo: Zoo, hub: Hub, out: Path) -> None:
    hub.faults = [Fault("PUT /lfs", 403, times=9, after=2)]
    ran = push(zoo, hub)
    assert ran.rc == 5, ran.err
    repo = hub.repos["org/demo"]
    assert repo.files() == {} and len(repo.objects) == 2
    first, hub.faults = len(hub.log), []
    assert push(zoo, hub).rc == 0
    assert same(hub, out)
    assert len([line for line in hub.log[first:] if line.startswith("PUT")]) == 1


@pytest.mark.parametrize(("status", "words"), [
    (500, "the Hub failed (500): a fault of 500"),
    (429, "the Hub takes no more requests for now: a fault of 429"),
])  # fmt: skip
def test_a_fault_that_stays_ends_with_a_message_and_no_commit(
    zoo: Zoo, hub: Hub, out: Path, status: int, words: str
) -> None:
    hub.faults = [Fault("/commit/", status, times=99)]
    ran = push(zoo, hub)
    assert (ran.rc, ran.out) == (5, "")
    assert f"error: {words}" in ran.err
    assert "no file is sent twice" in ran.err
    assert len(hub.asked("/commit/")) == 4 and len(hub.asked("^PUT")) == 3
    assert hub.repos["org/demo"].files() == {}


def test_a_branch_that_moved_meanwhile_is_not_overwritten(zoo: Zoo, hub: Hub, out: Path) -> None:
    repo = hub.repo("org/demo")
    hub.faults = [Fault("PUT /lfs", lambda: repo.commit({"README.md": b"theirs"}))]
    ran = push(zoo, hub)
    assert ran.rc == 5
    assert "'org/demo' changed while this was uploaded, and nothing was committed" in ran.err
    assert repo.files() == {"README.md": b"theirs"}
    assert push(zoo, hub).rc == 0
    assert same(hub, out) and len(hub.asked("^PUT")) == 3


# --- what is refused


def test_who_may_not_write_is_told_so(zoo: Zoo, hub: Hub, out: Path) -> None:
    ran = push(zoo, hub, HF_TOKEN="reader")
    assert (ran.rc, hub.repos) == (5, {})
    assert "you may not write to 'org/demo': your token may not write here" in ran.err
    hub.repo("org/demo", {"README.md": b"# x"})
    ran = push(zoo, hub, HF_TOKEN="reader")
    assert ran.rc == 5 and "you may not write to 'org/demo'" in ran.err
    assert hub.repos["org/demo"].files() == {"README.md": b"# x"}
    ran = push(zoo, hub, HF_TOKEN="wrong")
    assert ran.rc == 5
    assert "-> run `hf auth login`, or set HF_TOKEN, with a token that may write" in ran.err


def test_without_a_token_or_a_network_there_is_a_message(zoo: Zoo, hub: Hub, out: Path) -> None:
    ran = push(zoo, hub, HF_TOKEN="")
    assert (ran.rc, hub.log) == (5, [])
    assert "there is no token" in ran.err
    ran = fresh(zoo, hub, HF_HUB_OFFLINE="1")
    assert (ran.rc, hub.log) == (5, [])
    assert "HF_HUB_OFFLINE is set, and a push needs the network" in ran.err
    ran = push(zoo, hub, HF_ENDPOINT="http://127.0.0.1:9")
    assert (ran.rc, hub.log) == (5, [])
    assert "error: http://127.0.0.1:9 cannot be reached" in ran.err


@pytest.mark.parametrize("name", ["demo", "org/demo/x", "org/de--mo", "org/.demo", "org/d mo"])
def test_what_is_no_name_is_refused_before_anything(
    zoo: Zoo, hub: Hub, out: Path, name: str
) -> None:
    ran = push(zoo, hub, to=name)
    assert (ran.rc, hub.log) == (5, [])
    assert f"'{name}'" in ran.err and "-> name it org/name" in ran.err


def test_a_folder_that_is_not_whole_is_not_pushed(zoo: Zoo, hub: Hub, out: Path) -> None:
    (out / "tokenizer.json").write_text("{}")
    (out / "LICENSE").unlink()
    ran = push(zoo, hub)
    assert (ran.rc, hub.log) == (4, [])
    assert "tokenizer.json is not what SHA256SUMS says" in ran.err
    assert "LICENSE is not there" in ran.err


def test_a_card_that_the_hub_refuses_is_told_with_its_words(zoo: Zoo, hub: Hub, out: Path) -> None:
    (out / "README.md").write_text("---\nlicense: [mit, gpl]\n---\n# Mine\n")
    ran = push(zoo, hub)
    assert ran.rc == 4
    assert "the Hub refuses the card" in ran.err and '"license" must be a string' in ran.err
    assert hub.repos["org/demo"].files() == {}
    (out / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n")
    ran = push(zoo, hub, "--dry-run")
    assert ran.rc == 4 and "the front matter is not valid YAML" in ran.err


OTHERS = {"config.json": b"{}", "pytorch_model.bin": b"weights", "recipe.yaml": b"another"}


def test_a_name_that_holds_something_else_is_left_alone(zoo: Zoo, hub: Hub, out: Path) -> None:
    repo = hub.repo("org/demo", OTHERS)
    ran = push(zoo, hub)
    assert ran.rc == 5
    assert "'org/demo' holds something else: 3 file(s)" in ran.err
    assert repo.files() == OTHERS and not hub.asked("^P")


def test_force_replaces_it_in_one_commit(zoo: Zoo, hub: Hub, out: Path) -> None:
    repo = hub.repo("org/demo", {**OTHERS, ".eval_results/x.yaml": b"kept"})
    ran = push(zoo, hub, "--force", "--json")
    assert ran.rc == 0, ran.err
    assert json.loads(ran.out)["removed"] == ["pytorch_model.bin"]
    assert repo.files().pop(".eval_results/x.yaml") == b"kept"
    assert set(repo.files()) == {*on_disk(out), ".eval_results/x.yaml"}
    assert len(repo.commits) == 2


def test_scores_of_an_earlier_push_do_not_outlive_it(zoo: Zoo, hub: Hub, out: Path) -> None:
    scores = ".eval_results/mowmerge.yaml"
    entry = {"dataset": {"id": "org/x", "task_id": "default"}, "value": 0.75}
    made = package(out, "org/demo", Results([], [], [entry]))
    (file,) = [each for each in made.files if each.name == scores]
    assert isinstance(file.content, bytes) and yaml.safe_load(file.content) == [entry]
    assert scores not in {each.name for each in package(out, "org/demo").files}
    other = {scores: file.content, ".eval_results/theirs.yaml": b"kept"}
    repo = hub.repo("org/demo", {**on_disk(out), **other})
    ran = push(zoo, hub, "--json")
    assert ran.rc == 0 and json.loads(ran.out)["removed"] == [scores], ran.err
    assert set(repo.files()) == {*on_disk(out), ".eval_results/theirs.yaml"}


def test_a_branch_of_its_own_leaves_main_as_it_is(zoo: Zoo, hub: Hub, out: Path) -> None:
    repo = hub.repo("org/demo", OTHERS)
    hub.faults = [Fault("PUT /lfs", 403, times=9, after=1)]
    assert push(zoo, hub, "--revision", "ties").rc == 5
    hub.faults = []
    ran = push(zoo, hub, "--revision", "ties")
    assert ran.rc == 0, ran.err
    assert repo.files() == OTHERS and same(hub, out, "ties")
    assert push(zoo, hub, "--revision", "ties").rc == 0


def test_a_pull_request_leaves_main_as_it_is(zoo: Zoo, hub: Hub, out: Path) -> None:
    repo = hub.repo("org/demo", OTHERS)
    ran = push(zoo, hub, "--pr", HF_TOKEN="reader")
    assert (ran.rc, ran.out) == (0, f"{hub.url}/org/demo/discussions/1\n"), ran.err
    assert repo.files() == OTHERS and same(hub, out, "refs/pr/1")
    hub.faults = [Fault("/commit/", "lose")]
    ran = push(zoo, hub, "--pr")
    assert ran.rc == 5 and f"look at {hub.url}/org/demo/discussions" in ran.err
    assert len(hub.asked("/commit/")) == 2
    ran = push(zoo, hub, "--pr", to="org/new")
    assert ran.rc == 5 and "there is no 'org/new'" in ran.err and "org/new" not in hub.repos


def test_private_is_made_so_and_never_ignored(zoo: Zoo, hub: Hub, out: Path) -> None:
    assert push(zoo, hub, "--private").rc == 0
    assert hub.repos["org/demo"].private
    hub.repo("org/open")
    ran = push(zoo, hub, "--private", to="org/open")
    assert ran.rc == 5 and "'org/open' is public, and --private was asked for" in ran.err
    assert hub.repos["org/open"].files() == {}


def test_a_push_again_keeps_what_others_added_and_removes_what_it_brought(
    zoo: Zoo, hub: Hub, out: Path
) -> None:
    (out / "extra.json").write_text("{}")
    sums = out / "SHA256SUMS"
    before = sums.read_text()
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    sums.write_text(before + f"{digest}  extra.json\n")
    assert push(zoo, hub).rc == 0
    repo = hub.repos["org/demo"]
    repo.commit({**repo.commits[repo.branches["main"]], "plot.png": b"theirs"})
    (out / "extra.json").unlink()
    sums.write_text(before)
    ran = fresh(zoo, hub, "--json")
    assert ran.rc == 0, ran.err
    told = json.loads(ran.out)
    assert (told["removed"], told["sent"]) == (["extra.json"], ["SHA256SUMS"])
    assert repo.files()["plot.png"] == b"theirs" and "extra.json" not in repo.files()


def test_what_a_gitignore_there_swallows_is_noticed(zoo: Zoo, hub: Hub, out: Path) -> None:
    hub.repo("org/demo", {".gitignore": b"tokenizer.json"})
    ran = push(zoo, hub, "--force")
    assert ran.rc == 5 and "is there without tokenizer.json" in ran.err
