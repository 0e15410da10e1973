"""One evaluator: any model on any task, item by item."""
