"""What a tensor's name says: its role, its layer, how deep that is, and what it may be tied to."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from mowmerge.tensors import TensorSpec

_NUMBER = re.compile(r"\.\d+(?=\.)")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_ROLES = tuple(
    (role, re.compile(pattern, re.I))
    for role, pattern in (
        ("norm", r"norm|(?:^|[._])ln(?:_\w+)?(?:[._]|\d|$)|layer_?norm"),
        ("router", r"(?:^|\.)(?:router|gate|shared_expert_gate)(?:\.|$)"),
        (
            "head",
            r"^(?:.*\.)?(?:lm_head|embed_out|proj_out|score|classifier|qa_outputs|cls|head"
            r"|classification_head)\.|(?:^|\.)text_projection(?:\.|$)",
        ),
        (
            "embedding",
            r"embed|(?:^|\.)(?:wte|wpe|shared)\.|cls_token|class_token|position_ids|patch",
        ),
        ("attention", r"att(?:n|ention)|[qkvo]_proj|query_key_value|(?:^|\.)(?:in_proj|out_proj)"),
        ("mlp", r"mlp|ffn|feed_?forward|experts|intermediate|output\.dense|DenseReluDense"),
        ("mlp", r"(?:^|\.)(?:fc\d?|c_fc|c_proj|w[123]|gate_proj|up_proj|down_proj|lin[12])\."),
    )
)
_EARLY = re.compile(
    r"embed|wte|wpe|^shared|token|position|patch|conv|stem|pre_?(?:laye?r)?norm", re.I
)

_BY_TOKEN = re.compile(
    r"lm_head|vocab_projector|final_logits_bias|predictions\.(?:decoder|bias)", re.I
)
_NOT_BY_TOKEN = re.compile(
    r"(?:^|[._])(?:pos|text_projection|token_type|wpe|patch|cls_token|class|segment|relative|time"
    r"|rotary|dense|transform(?!er)|score|qa_outputs|seq_rel|layer_?norm)",
    re.I,
)

_TIES = (  # a head or copy that may be absent because it is tied, and the embedding it is tied to
    (
        "lm_head.weight",
        (
            "embed_tokens.weight",
            "wte.weight",
            "shared.weight",
            "embed_in.weight",
            "word_embeddings.weight",
            "tokens_embed.weight",
            "tok_embeddings.weight",
            "backbone.embeddings.weight",
            "transformer.w.weight",
        ),
    ),
    ("lm_head.out_proj.weight", ("decoder.embed_tokens.weight",)),
    ("embed_out.weight", ("embed_in.weight", "embed_tokens.weight")),
    ("proj_out.weight", ("decoder.embed_tokens.weight",)),
    ("output_projection.weight", ("embed_tokens.weight",)),
    ("predictions.decoder.weight", ("word_embeddings.weight",)),
    ("predictions.decoder.bias", ("predictions.bias",)),
    ("lm_head.decoder.weight", ("word_embeddings.weight",)),
    ("lm_head.decoder.bias", ("lm_head.bias",)),
    ("generator_lm_head.weight", ("word_embeddings.weight",)),
    ("lm_loss.weight", ("word_embedding.weight",)),
    ("pred_layer.proj.weight", ("transformer.embeddings.weight",)),
    ("vocab_projector.weight", ("word_embeddings.weight",)),
    ("decoder.weight", ("tok_embeddings.weight",)),
    ("encoder.embed_tokens.weight", ("shared.weight",)),
    ("decoder.embed_tokens.weight", ("shared.weight",)),
)


def role(name: str) -> str:
    """embedding | attention | mlp | norm | head | router | other, from the name alone."""
    return _role(kind(name))


def kind(name: str) -> str:
    """The name that all tensors share which differ in the numbers of layers and experts alone."""
    return _NUMBER.sub(".0", name)


@lru_cache
def _role(name: str) -> str:
    """The role of all tensors that differ in the numbers of layers and experts alone."""
    return next((role for role, pattern in _ROLES if pattern.search(name)), "other")


def by_token(name: str) -> bool:
    """Whether a tensor may have a row for each token: an embedding of words, a head's weight or
    bias over them. Whether it has is for its shape to say."""
    named = role(name) in ("embedding", "head") or _BY_TOKEN.search(name) is not None
    return named and _NOT_BY_TOKEN.search(name) is None


def stack(name: str) -> tuple[str, int] | None:
    """The stack of layers a tensor belongs to and its number in it; None outside the layers."""
    match = _LAYER.search(name)
    return (name[: match.start(1)], int(match[1])) if match else None


def layers(names: Iterable[str], of: str) -> int:
    """How many layers there are in a stack."""
    places = map(stack, names)
    return 1 + max((place[1] for place in places if place and place[0] == of), default=-1)


def depths(names: Iterable[str]) -> dict[str, float]:
    """Each tensor's relative depth: layer / (layers - 1) within its own stack of layers.

    Outside the layers: 0 before them (embeddings and the like), 1 after them. The only layer of a
    stack has depth 0.
    """
    places = {name: stack(name) for name in names}
    last: dict[str, int] = {}
    for place in places.values():
        if place:
            last[place[0]] = max(place[1], last.get(place[0], 0))
    return {
        name: place[1] / max(1, last[place[0]]) if place else float(not _EARLY.search(name))
        for name, place in places.items()
    }


def aligned(held: Mapping[str, TensorSpec], names: Collection[str]) -> Mapping[str, TensorSpec]:
    """What a model holds under the other model's `names`, where a class prefix sets them apart.

    The same weights are `encoder.x` when saved as the bare backbone and `vit.encoder.x` when saved
    under a class with a head. Names are changed only where that makes more of them fit, and at
    least half of what could.
    """
    fits = len(held.keys() & set(names))
    if fits == min(len(held), len(names)):
        return held
    fewest = max(fits + 1, (min(len(held), len(names)) + 1) // 2)
    best: Mapping[str, TensorSpec] = held
    for prefix in dict.fromkeys(name.partition(".")[0] + "." for name in (*held, *names)):
        for view in (
            {name.removeprefix(prefix): spec for name, spec in held.items()},
            {prefix + name: spec for name, spec in held.items()},
        ):
            fit = len(view.keys() & set(names))
            if len(view) == len(held) and fit >= fewest:
                best, fewest = view, fit + 1
    return best


def apart(view: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    """Of an aligned view the first name that differs, the model's own and the other's."""
    return next(((spec.name, name) for name, spec in view.items() if name != spec.name), None)


def tied_to(name: str, specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """The stored tensor that an absent `name` is tied to by convention, or None."""
    for ending, sources in _TIES:
        if name == ending or name.endswith("." + ending):
            for source in sources:
                for other, spec in specs.items():
                    if other != name and (other == source or other.endswith("." + source)):
                        return spec
    return None


def why_apart(ours: TensorSpec, theirs: TensorSpec) -> str:
    """What to do about a tensor that has another shape in one model."""
    if by_token(ours.name) and ours.shape[1:] == theirs.shape[1:] and ours.shape:
        rows = theirs.shape[0] - ours.shape[0] if theirs.shape else 0
        return (
            f"its vocabulary has {abs(rows)} rows {'more' if rows > 0 else 'less'}: place rows by"
            " token, `vocabulary: {source: union}` (or base, or a model's name)"
        )
    return "only models of one architecture can be merged"
