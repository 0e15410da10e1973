"""Hosts: network namespaces with an address, a hostname, processes and mounts of their own.

All see the folders of this machine, as hosts see a shared file system, until one is hidden.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from zoo import Ran, environment

SPACES = ("--net", "--uts", "--mount", "--pid")
LINK = "eth0"


def lacking() -> str:
    """Why there can be no hosts here; nothing where there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "hosts are network namespaces, which only root may make"
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"hosts are made with {', '.join(missing)}, which is not here"
    probe = ["unshare", *SPACES, "--fork", "ip", "link", "add", "probe", "type", "veth"]
    tried = subprocess.run(probe, capture_output=True, text=True)
    return f"no network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Host:
    """One host: what is started on it, until it is dead."""

    name: str
    address: str
    folder: Path
    process: subprocess.Popen[bytes]
    started: list[tuple[subprocess.Popen[bytes], Path, Path]] = field(default_factory=list)

    def words(self, *command: str) -> list[str]:
        """A command as this machine runs it on the host."""
        return ["nsenter", "--target", self.first, *SPACES, "--", *command]

    @property
    def first(self) -> str:
        """The number of the host's first process, as this machine counts."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return children.split()[0]

    def do(self, *command: str) -> None:
        """Runs a short command that has to succeed."""
        subprocess.run(self.words(*command), check=True, capture_output=True, timeout=30)

    def start(self, *command: str, env: Mapping[str, str] | None = None) -> None:
        """Starts a command in the shared folder."""
        said = self.folder.parent / f"{self.name}-{len(self.started)}"
        files = said.with_suffix(".out"), said.with_suffix(".err")
        # a shell in between goes into the folder: nsenter would go to that of before the mounts
        shell = ("sh", "-c", 'cd "$0" && exec "$@"', str(self.folder), *command)
        with files[0].open("w") as out, files[1].open("w") as err:
            begun = subprocess.Popen(
                self.words(*shell), stdout=out, stderr=err, env=environment(**(env or {}))
            )
        self.started.append((begun, *files))

    def ended(self, seconds: float) -> Ran:
        """What the command started last left, which ends within that many seconds."""
        begun, *files = self.started[-1]
        try:
            begun.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} goes on: {self.said()}") from None
        return Ran(begun.returncode, *(file.read_text() for file in files))

    def said(self) -> str:
        """What the command started last has said so far on stderr."""
        return self.started[-1][2].read_text()

    def unplug(self, up: bool = False) -> None:
        """Takes the host's link down, so that its packets vanish; or up again."""
        self.do("ip", "link", "set", LINK, "up" if up else "down")

    def hide(self, folder: Path) -> None:
        """Mounts an empty file system over a folder."""
        self.do("mount", "-t", "tmpfs", "none", str(folder))

    def kill(self) -> None:
        """Ends all that runs on the host at once: the first process of its own is gone."""
        with self.process:
            self.process.kill()
        for begun, *_ in self.started:
            begun.wait(30)


@contextmanager
def hosts(folder: Path, names: Sequence[str] = ("host-a", "host-b")) -> Iterator[list[Host]]:
    """Two hosts that are linked, and share a folder."""
    with ExitStack() as stack:
        made = [stack.enter_context(_host(name, i, folder)) for i, name in enumerate(names, 1)]
        one, two = ((LINK, "netns", host.first) for host in made)
        link = ("ip", "link", "add", *one, "type", "veth", "peer", "name", *two)
        subprocess.run(link, check=True, capture_output=True)
        known = "".join(f"{host.address} {host.name}\n" for host in made)
        (folder.parent / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        for host in made:
            host.do("ip", "address", "add", f"{host.address}/24", "dev", LINK)
            host.do("ip", "link", "set", LINK, "up")
            host.do("mount", "--bind", str(folder.parent / "hosts"), "/etc/hosts")
        yield made


@contextmanager
def _host(name: str, number: int, folder: Path) -> Iterator[Host]:
    """A host without a link: its first process reads till this one ends, and with it all die."""
    boot = folder.parent / f"boot-{name}"
    boot.write_text(f"00000000-0000-0000-0000-{number:012}\n")
    begin = (
        'mount --bind "$1" /proc/sys/kernel/random/boot_id && hostname "$0"'
        " && ip link set lo up && echo ready && exec cat"
    )
    process = subprocess.Popen(
        ["unshare", *SPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", begin, name,
         str(boot)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    host = Host(name, f"10.77.0.{number}", folder, process)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield host
    finally:
        host.kill()
