"""Methods that take weights and give weights, with no data."""
