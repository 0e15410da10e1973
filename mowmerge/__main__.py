"""`python -m mowmerge` is the command line."""

from mowmerge.cli import main

if __name__ == "__main__":
    main()
