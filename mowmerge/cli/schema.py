"""`mowmerge schema`: the recipe's grammar for editors."""

from __future__ import annotations

import json


def schema() -> None:
    """Print the JSON Schema of recipes, for completion and hover help in an editor."""
    from mowmerge.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
