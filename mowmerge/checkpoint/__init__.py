"""Checkpoints on disk: found, read, named, laid out and written."""
