"""Dynamic methods: one tensor becomes an anchor, coded deltas and a gate."""
