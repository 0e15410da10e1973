"""The README.md of an output folder: lineage for the Hub, inputs and recipe for a reader."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mowmerge.methods import registry
from mowmerge.plan import Plan, Stored
from mowmerge.recipe.model import Recipe

CHOOSERS = {
    "task": "whoever calls it says whose sample it is, with `task_ids`",
    "module": "each token chooses for itself, and nothing is trained",
    "router": "routers choose, and are to be trained first",
}


def card(plan: Plan, recipe: Recipe, auto: str = "AutoModel") -> str:
    """The model card: front matter with the direct parents, a table of inputs, the recipe.

    `auto` is the Auto class that loads a dynamic checkpoint.
    """
    used = Counter(job.method for job in plan.each if job.method)
    methods = [name for name, _ in used.most_common()]
    parents = _parents(plan)
    front = ["---", "library_name: transformers"]
    if parents:
        front += ["base_model:", *(f"- {repo}" for repo in parents), "base_model_relation: merge"]
    front += ["tags:", "- merge", "- mowmerge", *(f"- {name}" for name in methods), "---"]
    lines = [
        *front, "", f"# {recipe.name}", "",
        f"A merge of {len(recipe.models)} model(s) by {_listed(methods)}, made with mowmerge.", "",
        "| model | source | revision |", "|---|---|---|",
    ]  # fmt: skip
    for name, origin in plan.sources.items():
        where = _shown(origin.origin) if isinstance(origin, Stored) else f"recipe `{origin.name}`"
        revision = origin.revision or "" if isinstance(origin, Stored) else ""
        lines.append(f"| {name} | {where} | {revision[:12]} |")
    lines += ["", "| method | tensors | paper |", "|---|---|---|"]
    lines += [f"| {n} | {c} | {registry.get(n).paper} |" for n, c in used.most_common()]
    if any(registry.get(name).fit for name in methods):
        lines += ["", "Coefficients, and on which data they were fitted: coefficients.json."]
    lines += _dynamic(plan, auto)
    lines += ["", "The recipe:", "", "```yaml", recipe.text.strip(), "```", ""]
    lines += ["What the merge did to each tensor is in report.json.", ""]
    return "\n".join(lines)


def _dynamic(plan: Plan, auto: str) -> list[str]:
    """What a dynamic checkpoint is, and how to load it."""
    if plan.manifest is None:
        return []
    manifest = plan.manifest
    scopes = {gate.scope for gate in manifest.gates.values()}
    told = CHOOSERS["task" if "task" in scopes else "module" if "module" in scopes else "router"]
    return [
        "",
        f"A dynamic checkpoint: {len(manifest.codes)} of {len(plan.jobs)} tensors are mixed for"
        f" each input from {', '.join(manifest.experts)} ({manifest.method}); {told}.",
        "",
        "```python",
        "import mowmerge.hf  # or trust_remote_code=True",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("...")',
        "```",
    ]


def _parents(plan: Plan) -> list[str]:
    """Hub ids of the direct parents, each once, in the recipe's order."""
    found: list[str] = []
    for origin in plan.sources.values():
        if isinstance(origin, Plan):
            found += _parents(origin)
        elif origin.revision:
            found.append(origin.origin.partition("@")[0])
    return list(dict.fromkeys(found))


def _shown(origin: str) -> str:
    """A source without the folders of the machine it was merged on."""
    return Path(origin).name if Path(origin).is_absolute() else origin


def _listed(methods: list[str]) -> str:
    return ", ".join(methods) or "copying"
