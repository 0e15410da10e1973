"""The merge methods: one file each, found by folder, or by the entry point `mowmerge.methods`."""
