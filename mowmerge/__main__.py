"""`mowmerge` and `python -m mowmerge` are the command line."""

import sys


def main() -> None:
    """Runs the command line; Ctrl-C while it is still being read is no traceback either."""
    try:
        from mowmerge.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
