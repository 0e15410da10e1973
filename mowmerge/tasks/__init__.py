"""What a task is: its data, splits, content hashes, heads and metrics."""
