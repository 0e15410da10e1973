"""The command line: parse, call the api, print. stdout is data, stderr is talk."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

import typer

from mowmerge import __version__
from mowmerge.cli.check import check
from mowmerge.cli.demo import demo
from mowmerge.cli.eval import eval
from mowmerge.cli.extract import extract
from mowmerge.cli.extract_lora import extract_lora
from mowmerge.cli.inspect import inspect
from mowmerge.cli.merge import merge
from mowmerge.cli.methods import methods
from mowmerge.cli.push import push
from mowmerge.cli.schema import schema
from mowmerge.cli.soup import soup
from mowmerge.cli.train_router import train_router
from mowmerge.cli.verify import verify
from mowmerge.errors import MowmergeError, ResourceError, unreadable

SEARCH = 50_000  # objects between searches for cycles: plans are many objects, and none is garbage

app = typer.Typer(
    name="mowmerge",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turns many fine-tuned checkpoints of a model into one.",
    epilog="Exit codes: 0 done, 1 a bug, 2 usage, 3 recipe, 4 checkpoint, 5 source or Hub,"
    " 6 disk, memory or permission, 7 below --fail-under, 130 interrupted.",
)
COMMANDS = (
    merge, verify, train_router, inspect, extract, extract_lora, eval, soup, push, check,
    methods, schema, demo,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)


def _stand_in() -> None:
    """Puts the null device where a standard stream is closed, before another file gets its number:
    what a library writes to stderr would end up in that file."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def main() -> None:
    """Runs the command line; a user's mistake is a message and an exit code, not a traceback."""
    gc.set_threshold(SEARCH)
    _stand_in()
    try:
        app()
    except MowmergeError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a full stdout, a disk that fails: the machine's fault, not a bug
        print(f"error: {unreadable(error) or error}", file=sys.stderr)
        sys.exit(ResourceError.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:  # typer makes Ctrl-C an exit with 130
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        print("interrupted: nothing is half-written", file=sys.stderr)
        sys.exit(130)
    finally:
        gc.freeze()  # no search for cycles at exit: with torch loaded it takes a quarter second
