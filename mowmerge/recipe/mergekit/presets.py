"""mergekit's methods: which of ours each is, with which parameters, under which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Base = Literal["listed", "first", "optional", "required"]

OURS = {  # words of its grammar, and what they are called here
    "merge_method": "method",
    "base_model": "base",
    "dtype": "output.dtype",
    "out_dtype": "output.dtype",
    "lambda": "scale",
    "model": "source",
}


@dataclass(frozen=True)
class Word:
    """One of its parameters: what it is called here, whether each model has its own, whether a
    recipe has to give it, its default, for true and false our words for them, and the value that a
    greater one means."""

    ours: str
    each: bool = False
    required: bool = False
    default: Any = None
    flag: tuple[Any, Any] | None = None
    most: float | None = None


@dataclass(frozen=True)
class Preset:
    """One of its methods: ours, the parameters that make ours that one, its words.

    base: what a base_model is: one more model, the first of two, or the base, which there may be
    or must be. idle: parameters that it reads and that change no result.
    """

    method: str
    words: Mapping[str, Word]
    base: Base
    fixed: Mapping[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()

    @property
    def apart(self) -> bool:
        """Whether a base_model stands apart from the models that are merged."""
        return self.base in ("optional", "required")

    @property
    def defaults(self) -> dict[str, Any]:
        """Our parameters where a recipe of it says nothing."""
        given = {w.ours: w.default for w in self.words.values() if w.default is not None}
        return {**self.fixed, **given}


WEIGHT = Word("weight", each=True, required=True)
FLAG = (False, True)
AGGREGATE = ("sum", "mean")
L1 = ("none", "l1")


def _task_vectors(
    method: str, *, normalize: bool, rescale: Word | None = None, fixed: Mapping[str, Any],
    more: Mapping[str, Word] | None = None,
) -> Preset:  # fmt: skip
    """A method of the family that it calls generalized task arithmetic."""
    words = {
        "weight": WEIGHT,
        "lambda": Word("scale", default=1.0),
        "normalize": Word("aggregate", default=AGGREGATE[normalize], flag=AGGREGATE),
        "density": Word("density", each=True, default=1.0, most=1.0),
        **({"rescale": rescale} if rescale else {}),
        **(more or {}),
    }
    return Preset(method, words, "required", fixed, idle=("int8_mask",))


_GAMMA = {"gamma": Word("gamma", each=True, default=0.01)}
_EPSILON = {"epsilon": Word("epsilon", each=True, default=0.15)}
_KEEP = Word("rescale", default=False, flag=FLAG)
_RESTORE = Word("rescale", default="l1", flag=L1)
_TOUCHED = {"epsilon": Word("eps", default=1e-5)}

PRESETS: Mapping[str, Preset] = {
    "linear": Preset(
        "linear", {"weight": WEIGHT, "normalize": Word("normalize", default=True, flag=FLAG)},
        "listed",
    ),
    "slerp": Preset("slerp", {"t": Word("t", required=True)}, "first"),
    "nuslerp": Preset(
        "nuslerp",
        {
            "weight": WEIGHT,
            "nuslerp_flatten": Word("axis", default="all", flag=("rows", "all")),
            "nuslerp_row_wise": Word("axis", flag=("rows", "columns")),
        },
        "optional",
    ),
    "multislerp": Preset(
        "multislerp",
        {
            "weight": WEIGHT,
            "normalize_weights": Word("normalize", default=True, flag=FLAG),
            "eps": Word("eps", default=1e-8),
        },
        "optional", {"mode": "mean_direction"},
    ),
    "karcher": Preset(
        "karcher",
        {"max_iter": Word("max_iter", default=10), "tol": Word("tol", default=1e-5)}, "listed",
        {"eps": 1e-5},
    ),
    "passthrough": Preset("passthrough", {"scale": Word("scale", each=True)}, "listed"),
    "task_arithmetic": Preset(
        "task_arithmetic",
        {
            "weight": WEIGHT,
            "lambda": Word("scale", default=1.0),
            "normalize": Word("normalize", default=False, flag=FLAG),
        },
        "required", idle=("int8_mask",),
    ),
    "ties": _task_vectors(
        "ties", normalize=True, rescale=_KEEP, fixed={"trim": "tensor", "zero_sign": "plus"}
    ),
    "dare_linear": _task_vectors(
        "dare", normalize=False, rescale=_RESTORE, fixed={"elect": "none"}
    ),
    "dare_ties": _task_vectors("dare", normalize=False, rescale=_RESTORE, fixed={"elect": "mass"}),
    "breadcrumbs": _task_vectors(
        "breadcrumbs", normalize=False, rescale=_KEEP, fixed={"elect": "none"}, more=_GAMMA
    ),
    "breadcrumbs_ties": _task_vectors(
        "breadcrumbs", normalize=False, rescale=_KEEP, fixed={"elect": "mass"}, more=_GAMMA
    ),
    "della": _task_vectors(
        "della", normalize=True, rescale=_RESTORE, fixed={"elect": "mass"}, more=_EPSILON
    ),
    "della_linear": _task_vectors(
        "della", normalize=False, rescale=_RESTORE, fixed={"elect": "none"}, more=_EPSILON
    ),
    "sce": Preset(
        "sce", {"select_topk": Word("density", default=1.0, most=1.0)}, "required", {"floor": 1e-6},
        idle=("int8_mask",),
    ),
    "model_stock": Preset(
        "model_stock", {"filter_wise": Word("filter_wise", default=False, flag=FLAG)}, "required",
        {"clamp": False, "floor": 1e-6},
    ),
    "nearswap": Preset("nearswap", {"t": Word("t", required=True)}, "required", {"floor": 1e-6}),
    "arcee_fusion": Preset("arcee_fusion", {}, "required"),
    "ram": Preset("ram", _TOUCHED, "required", {"counts": "tensor"}),
    "ramplus_tl": Preset(
        "ram",
        {"r": Word("boost", default=0.1), "alpha": Word("cap", default=0.2), **_TOUCHED},
        "required", {"counts": "tensor"},
    ),
}  # fmt: skip

MODULES: Mapping[str, tuple[str, ...]] = {  # the tensors of each of its modules; the first that fit
    "multi_modal_projector": ("*multi_modal_projector.*", "*visual.merger.*"),
    "vision_tower": ("*vision_tower.*", "*visual.*"),
    "vision_model": ("*vision_model.*",),
    "encoder": ("encoder.*", "model.encoder.*"),
    "shared": ("shared.*",),
    "decoder": ("decoder.*", "model.decoder.*", "lm_head.*", "proj_out.*"),
    "text_decoder": ("*language_model.*", "model.embed_tokens.*", "model.layers.*", "model.norm.*",
                     "lm_head.*"),
}  # fmt: skip
DTYPES = ("float64", "float32", "float16", "bfloat16")
