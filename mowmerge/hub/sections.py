"""What a card says below its front matter, section by section."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, prod, sqrt
from typing import Any

from mowmerge import __version__
from mowmerge.dynamic.format import Manifest
from mowmerge.dynamic.remote import AUTO, auto_name
from mowmerge.errors import MowmergeError
from mowmerge.hub.licence import HUB, propagated, terms
from mowmerge.methods import registry
from mowmerge.recipe import needs, parse

CHOOSERS = {
    "task": "whoever calls it says whose sample it is, with `task_ids`",
    "module": "each token chooses for itself, and nothing is trained",
    "router": "routers choose, and are to be trained first",
    "trained": "trained routers choose",
}
PROCESSORS = {
    "tokenizer_config.json": "AutoTokenizer",
    "preprocessor_config.json": "AutoImageProcessor",
}


@dataclass(frozen=True)
class About:
    """What a card is made from: the repository's name ("" where it has none yet), report.json,
    config.json, the names in the folder, the recipe's text, and the lines of the results' table."""

    repo: str
    report: Mapping[str, Any]
    settings: Mapping[str, Any]
    files: Collection[str]
    recipe: str
    results: Sequence[str]

    @property
    def manifest(self) -> Manifest | None:
        """That of a dynamic checkpoint."""
        if self.settings.get("model_type") != "mowmerge":
            return None
        return Manifest.from_json(self.settings.get("mowmerge") or {})

    @property
    def inputs(self) -> Sequence[Mapping[str, Any]]:
        """The models that were read."""
        rows: Sequence[Mapping[str, Any]] = self.report.get("inputs", [])
        return rows


def body(about: About) -> str:
    """The card's text, without its front matter."""
    parts = [
        _head(about), _inputs(about), _merging(about), _needs(about), _dynamic(about),
        _results(about), _loading(about), _reproducing(about), _limits(about), _licences(about),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def methods(report: Mapping[str, Any]) -> dict[str, int]:
    """How many tensors each method made, the commonest first."""
    found = Counter(t["method"] for t in report.get("tensors", []) if t.get("method"))
    return dict(found.most_common())


def _head(about: About) -> str:
    report = about.report
    tensors = report.get("tensors", [])
    experts = [name for name in report.get("models", []) if name != report.get("base")]
    name = about.repo.rpartition("/")[2] or report.get("recipe", "")
    made = ", ".join(methods(report)) or "copying"
    base = f" of {_source(about, report['base'])}" if report.get("base") else ""
    what = "fine-tuned models" if base else "models"
    count = sum(prod(t["shape"]) for t in tensors)
    dtypes = Counter(t["dtype"] for t in tensors).most_common(1)
    size = f" {_short(count)} parameters, {dtypes[0][0]}." if dtypes else ""
    listed = ", ".join(experts)
    return (
        f"# {name}\n\nA merge of {len(experts)} {what}{base} ({listed}) by {made}, made with"
        f" mowmerge.{size}"
    )


def _source(about: About, name: str) -> str:
    """Where a model came from, with a link where that is the Hub."""
    row = next((row for row in about.inputs if row["name"] == name), None)
    return _linked(row) if row else name


def _linked(row: Mapping[str, Any]) -> str:
    if not row.get("revision"):
        return f"`{row['source']}` (not published)"
    return f"[{row['source']}]({HUB}/{row['source']}/tree/{row['revision']})"


def _inputs(about: About) -> str:
    if not about.inputs:
        return ""
    norms = _norms(about.report)
    far = any(row["name"] in norms for row in about.inputs)
    head = ["model", "source", "revision", "licence", *(["distance from base"] if far else [])]
    rows = [
        [
            str(row["name"]), _linked(row), str(row.get("revision", ""))[:12], terms(row).shown,
            *([f"{norms[row['name']]:.4g}" if row["name"] in norms else ""] if far else []),
        ]
        for row in about.inputs
    ]  # fmt: skip
    return "## Inputs\n\n" + _table([head, *rows])


def _merging(about: About) -> str:
    """Which method made how many tensors, and what the task vectors were like."""
    rows = [["method", "tensors", "paper", "as published"]]
    rows += [
        [name, str(count), _paper(name), _faithful(name)]
        for name, count in methods(about.report).items()
    ]
    copied = sum(t.get("action") == "copied" for t in about.report.get("tensors", []))
    if copied:
        rows.append(["copied as they are", str(copied), "", ""])
    if len(rows) == 1:
        return ""
    lines = ["## Merge", "", _table(rows)]
    if figures := _figures(about.report):
        lines += ["", figures]
    if "coefficients.json" in about.files:
        lines += ["", "Coefficients, and on which data they were fitted: coefficients.json."]
    return "\n".join([*lines, "", "What the merge did to each tensor is in report.json."])


def _paper(name: str) -> str:
    paper = registry.get(name).paper if name in registry.names() else ""
    id = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{id})" if id != paper else paper


def _faithful(name: str) -> str:
    """Whether a method is as its paper says; what differs is in `mowmerge methods NAME`."""
    return registry.get(name).faithful if name in registry.names() else "unverified"


def _needs(about: About) -> str:
    """What the merge needed, and what it needs of whoever uses it."""
    try:
        merged = about.recipe and "models" in about.report
        recipe = parse.loads(about.recipe) if merged else None
    except MowmergeError:
        recipe = None
    if recipe is None:
        return ""
    router = about.report.get("router", {})
    trained = router.get("objective", "") if router.get("trained") else None
    held = needs.needs(recipe, trained)
    told = {True: "yes", False: "no"}
    splits = [task.splits for _, task in recipe.trained.values()] if held["needs_data"] else []
    used = sorted({each.router for each in splits if each.router})
    tested = any(each.eval in used for each in splits)
    rows = [
        ["needs base", told[held["needs_base"]]],
        ["needs data", f"yes: {', '.join(used)}" if used else told[held["needs_data"]]],
        ["needs labels", told[held["needs_labels"]]],
        ["needs gradients", told[held["needs_gradients"]]],
        ["uses test inputs", told[tested]],
        ["needs to be told the task", _asked(about)],
        ["heads", held["heads"]],
        ["methods as published", held["faithful"]],
    ]
    return "\n".join(["## What it rests on", "", _table([["", ""], *rows])])


def _asked(about: About) -> str:
    """Whether whoever calls the model has to say which task an input is of."""
    manifest = about.manifest
    if manifest is None:
        return "for the head" if "heads" in about.files else "no"
    scopes = {gate.scope for gate in manifest.gates.values()}
    if scopes == {"task"}:
        return "for weights and head" if manifest.heads else "for the weights"
    return "for the head" if manifest.heads and "sample" not in scopes else "no"


def _norms(report: Mapping[str, Any]) -> dict[str, float]:
    """Each model's distance from the base over all merged tensors."""
    squares: dict[str, list[float]] = {}
    for tensor in report.get("tensors", []):
        pairs = zip(tensor.get("models", []), tensor.get("delta_norms") or [], strict=False)
        for model, norm in pairs:
            squares.setdefault(model, []).append(norm**2)
    return {model: sqrt(fsum(each)) for model, each in squares.items()}


def _figures(report: Mapping[str, Any]) -> str:
    """Cosine, sign conflict and kept share, each a mean over elements."""

    def mean(key: str) -> float | None:
        told = [t for t in report.get("tensors", []) if t.get(key) is not None]
        weights = [prod(t["shape"]) for t in told]
        total = fsum(w * t[key] for w, t in zip(weights, told, strict=True))
        return total / sum(weights) if sum(weights) else None

    say: list[tuple[str, Callable[[float], str]]] = [
        ("mean_cosine", lambda x: f"a mean cosine of {x:z.3f}"),
        ("sign_conflict", lambda x: f"signs that conflict at {x:.0%} of the entries"),
        ("kept_share", lambda x: f"{x:.0%} of the entries kept"),
    ]
    told = [words(value) for key, words in say if (value := mean(key)) is not None]
    return f"The task vectors: {', '.join(told)}." if told else ""


def _dynamic(about: About) -> str:
    manifest = about.manifest
    if manifest is None:
        return ""
    scopes = {gate.scope for gate in manifest.gates.values()}
    router = about.report.get("router")
    learns = "trained" if router and router.get("learned") != "scales" else "router"
    told = CHOOSERS["task" if "task" in scopes else "module" if "module" in scopes else learns]
    tensors = len(about.report.get("tensors", [])) or len(manifest.codes)
    lines = [
        "## A dynamic checkpoint", "",
        f"{len(manifest.codes)} of {tensors} tensors are mixed for each input from"
        f" {', '.join(manifest.experts)} ({manifest.method}); {told}.",
    ]  # fmt: skip
    if router:
        metrics = {k: v for k, v in router.get("metrics", {}).items() if isinstance(v, float)}
        reached = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
        steps = f"step {router['kept_step']} of {router['steps']}"
        lines[-1] += f" Objective {router['objective']}, {steps}{reached}."
    return "\n".join(lines)


def _results(about: About) -> str:
    if not about.results:
        return ""
    return "\n".join(["## Results", "", "Measured by the merge's author.", "", *about.results])


def _loading(about: About) -> str:
    name, manifest = about.repo or "...", about.manifest
    heads = "heads" in about.files and manifest is None
    if heads:
        code = [
            "import mowmerge", "from huggingface_hub import snapshot_download", "",
            f'folder = snapshot_download("{name}")',
            "backbone = mowmerge.load(folder)",
            'model = mowmerge.load(folder, task="...")  # one of recipe.yaml, or a model',
        ]  # fmt: skip
    else:
        named = str((about.settings.get("architectures") or ["Model"])[0])
        auto = _class(named.removeprefix("Mowmerge"))
        makers = [maker for file, maker in PROCESSORS.items() if file in about.files]
        code = ["import mowmerge.hf  # or trust_remote_code=True"] if manifest else []
        code += [
            f"from transformers import {', '.join(sorted([auto, *makers]))}", "",
            f'model = {auto}.from_pretrained("{name}")',
        ]  # fmt: skip
        code += [
            f'{m.removeprefix("Auto").lower()} = {m}.from_pretrained("{name}")' for m in makers
        ]
    return "\n".join(["## How to load", "", "```python", *code, "```"])


def _class(architecture: str) -> str:
    """The Auto class for an architecture, or the class itself where no Auto class is sure."""
    kinds = {"LMHeadModel": "ForCausalLM", **{kind: kind for kind in AUTO}}
    kind = next((k for end, k in kinds.items() if architecture.endswith(end)), "")
    return auto_name(kind) if kind else architecture


def _reproducing(about: About) -> str:
    if not about.recipe:
        return ""
    local = [str(row["name"]) for row in about.inputs if not row.get("revision")]
    version = about.report.get("mowmerge", __version__)
    lines = [
        "## How to reproduce", "",
        f"With mowmerge {version}, `mowmerge merge recipe.yaml` gives these weights again, and"
        " `sha256sum -c SHA256SUMS` compares them.",
    ]  # fmt: skip
    if local:
        lines[-1] += (
            f" Not published, so that the recipe has to say where yours is: {_list(local)}."
        )
    return "\n".join([*lines, "", "```yaml", about.recipe.strip(), "```"])


def _limits(about: About) -> str:
    if not about.inputs:
        return ""
    known = "" if about.results else " Nobody has said what this merge scores: measure it first."
    return (
        "## Limits\n\nA merge can lose skill of any of its inputs, and has their biases and limits:"
        f" read their cards.{known}"
    )


def _licences(about: About) -> str:
    if not about.inputs:
        return ""
    each = "; ".join(f"{row['name']}: {_terms(row)}" for row in about.inputs)
    follows = terms(propagated(about.inputs)[0]).shown
    return (
        f"## Licences\n\nThe inputs' cards say: {each}. By mowmerge's rule a merge of these is:"
        f" {follows}. That is no legal advice."
    )


def _terms(row: Mapping[str, Any]) -> str:
    said = terms(row)
    return f"[{said.shown}]({said.link})" if said.link.startswith("http") else said.shown


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
