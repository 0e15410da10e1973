"""The demonstration: builds a small real zoo from what is installed, merges it, measures it."""
