"""Finds methods by name and reads from each signature what it takes; loads no torch."""

from __future__ import annotations

import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar, Union, cast

from mowmerge.errors import RecipeError, did_you_mean
from mowmerge.methods.contracts import (
    RESERVED,
    Dynamic,
    Extent,
    MethodError,
    Range,
    Reduction,
)
from mowmerge.tensors import torch

FAMILIES = ("static", "learned", "dynamic")
LAWS = ("identity", "idempotent", "permutation", "scale", "propagates")
FITTING = ("granularity", "steps", "rate", "batch", "balance", "seed")
F = TypeVar("F", bound=Callable[..., Any])
Scope = str | Callable[[Mapping[str, Any]], str]
Workspace = Callable[[tuple[int, ...], int, Mapping[str, Any]], int]
Decompositions = Callable[[tuple[int, ...], int, Mapping[str, Any]], Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its kind, range or choices, default and help."""

    name: str
    kind: str  # number | integer | boolean | choice
    default: Any
    per_model: bool = False
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[str, ...] = ()
    help: str = ""

    def fault(self, value: Any) -> str:
        """Why `value` (one number, boolean or word) is not allowed; empty where it is."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind == "choice":
            return "" if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if self.kind == "boolean":
            return "" if isinstance(value, bool) else "must be true or false"
        if self.kind == "integer" and not (number and float(value).is_integer()):
            return "must be an integer"
        if not number:
            return "must be a number"
        if value != value or abs(value) == float("inf"):
            return "must be finite"
        return "" if self.low <= value <= self.high else f"must be {self.range}"

    @property
    def range(self) -> str:
        """The allowed values in words, such as `0..1`, or empty."""
        low, high = self.low != float("-inf"), self.high != float("inf")
        if low and high:
            return f"{self.low:g}..{self.high:g}"
        return f"at least {self.low:g}" if low else f"at most {self.high:g}" if high else ""


@dataclass(frozen=True)
class MethodSpec:
    """A method and everything its signature, decorator and docstring say about it."""

    name: str
    family: str
    function: Callable[..., Any]
    paper: str
    inputs: frozenset[str]
    base_optional: bool
    parameters: Mapping[str, Parameter]
    laws: Mapping[str, Mapping[str, Any]]
    exempt: Mapping[str, str] = field(default_factory=dict)
    count: int | None = None
    at_least: int = 1
    scopes: Scope = "element"
    reduce: Callable[[Sequence[Extent]], Reduction] | None = None
    validate: Callable[[Mapping[str, Any], int], None] | None = None
    caution: Callable[[Mapping[str, Any], int], str] | None = None
    workspace: Workspace | None = None
    decompositions: Decompositions | None = None
    keeps: Workspace | None = None
    needs_factors: Callable[[Mapping[str, Any]], bool] = lambda parameters: False
    dynamic: Dynamic | None = None
    fit: str | None = None
    origin: str = "mowmerge"

    @property
    def needs_base(self) -> bool:
        """Whether a recipe must name a base to use this method."""
        return "deltas" in self.inputs or ("base" in self.inputs and not self.base_optional)

    @property
    def wants_base(self) -> bool:
        """Whether the method reads the base where there is one."""
        return "deltas" in self.inputs or "base" in self.inputs

    @property
    def values(self) -> str:
        """What the method works on: `models` or `deltas`."""
        return "deltas" if "deltas" in self.inputs else "models"

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def doc(self) -> str:
        """The whole docstring."""
        return inspect.getdoc(self.function) or ""

    @property
    def faithful(self) -> str:
        """By the docstring's `Differs:`: yes (none), variant (some), or unverified (not there)."""
        _, told, text = self.doc.partition("\nDiffers:")
        words = text.split(maxsplit=1)
        return "unverified" if not told else "yes" if words[0].strip(".;,") == "none" else "variant"

    def scope(self, parameters: Mapping[str, Any]) -> str:
        """The smallest unit on which the result is exact, for these parameters."""
        return self.scopes(parameters) if callable(self.scopes) else self.scopes

    def sees(
        self, shape: Sequence[int], role: str, parameters: Mapping[str, Any]
    ) -> tuple[str, bool]:
        """The scope at which the method works on such a tensor, and whether that is a matrix to it,
        which it gets whole."""
        scope = self.scope(parameters)
        if self.decompositions is None:
            return scope, False
        table = role in ("embedding", "head") and not parameters["vocabulary"]
        matrix = len(shape) == 2 and not table
        return scope if matrix or self.reduce else "element", matrix

    def holds(self, law: str, parameters: Mapping[str, Any]) -> bool:
        """Whether the method keeps a declared law with these parameters."""
        if law not in self.laws:
            return False
        for name, wanted in self.laws[law].items():
            value = parameters[name]
            if any(v != wanted for v in (value if isinstance(value, tuple) else (value,))):
                return False
        return True

    def complete(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with every default filled in."""
        return {name: parameters.get(name, p.default) for name, p in self.parameters.items()}

    def check(self, parameters: Mapping[str, Any], n: int) -> None:
        """Raises MethodError where the count or the parameters cannot work together."""
        if self.count is not None and n != self.count:
            raise MethodError(f"'{self.name}' takes exactly {self.count} model(s), not {n}")
        if n < self.at_least:
            raise MethodError(f"'{self.name}' takes at least {self.at_least} models, not {n}")
        if self.validate:
            self.validate(parameters, n)


_found: dict[str, MethodSpec] = {}


def merge_method(
    *,
    paper: str,
    scope: Scope = "element",
    models: int | None = None,
    at_least: int = 1,
    laws: Mapping[str, Mapping[str, Any]] | Sequence[str] = (),
    exempt: Mapping[str, str] | None = None,
    reduce: Callable[[Sequence[Extent]], Reduction] | None = None,
    validate: Callable[[Mapping[str, Any], int], None] | None = None,
    caution: Callable[[Mapping[str, Any], int], str] | None = None,
    workspace: Workspace | None = None,
    decompositions: Decompositions | None = None,
    keeps: Workspace | None = None,
    needs_factors: Callable[[Mapping[str, Any]], bool] = lambda parameters: False,
    dynamic: Dynamic | None = None,
    fit: str | None = None,
) -> Callable[[F], F]:
    """Registers a function as a merge method and returns it, for a notebook to call: it also takes
    tensors of 16 bits, works on them in fp32 and casts once.

    Args:
        paper: arXiv id or other source.
        scope: element | row | tensor | model, or a function from the parameters to one of them:
            the smallest unit on which the result is exact. With row, blocks are whole rows.
        models: the exact number of models, where there is one; at_least: the smallest.
        laws: the optional laws the method keeps (LAWS), each
            with the parameter values under which it does, or just their names.
        exempt: universal laws the method does not keep, each with the reason.
        reduce: for methods with a statistic over a tensor or the model: a generator function over
            the extents that yields folds and returns `state`; run for every scope but element.
        validate: raises MethodError where parameters contradict each other.
        caution: what is allowed and rarely meant, of parameters and the number of models, as a
            sentence for the user; empty where there is nothing to say.
        workspace: how many elements of 4 bytes a method holds at once, its result among them, from
            a shape, the number of models and the parameters: of a method on matrices a matrix's,
            and what it reads counts too; of a dynamic one a coded matrix's; else that of a block,
            (length,). Without, n + 4 for each element of a block, n + 2 for one of a matrix.
        decompositions: of a method on matrices, the shapes of the singular value decompositions
            that it takes for a matrix of that shape, so many models and its parameters. Such a
            method gets matrices whole, and elements of everything else, which is what vocabulary
            tables and heads are where its parameter `vocabulary` is false.
        keeps: of one that asks for `once`, how many elements that keeps of a matrix until the
            statistics over the model are known.
        needs_factors: whether, with these parameters, every model has to be an adapter of one rank
            on the base, wherever one of them is on a matrix.
        dynamic: which tensors are coded, how, and by what they are mixed; the function then gives
            the parts of a code.
        fit: the per-model parameter in which the method is linear and that is found on data, within
            its range; how is said by the parameters of FITTING.
    """
    declared = dict(laws) if isinstance(laws, Mapping) else {law: {} for law in laws}
    unknown = set(declared) - set(LAWS)
    if unknown:
        raise ValueError(f"unknown laws {sorted(unknown)}; known: {LAWS}")

    def register(function: F) -> F:
        name = function.__name__
        inputs, parameters, optional = _signature(function)
        if fit and not {fit, *FITTING} <= parameters.keys():
            raise TypeError(
                f"{name}: a fitted method has the parameters {fit}, {', '.join(FITTING)}"
            )
        if decompositions and "vocabulary" not in parameters:
            raise TypeError(f"{name}: a method on matrices has the parameter vocabulary")
        taken = function if dynamic else _in_full(function)
        _found[name] = MethodSpec(
            name=name,
            family=f"other.{function.__module__}".split(".")[-2],
            function=taken,
            paper=paper,
            inputs=inputs,
            base_optional=optional,
            parameters=parameters,
            laws=declared,
            exempt=exempt or {},
            count=models,
            at_least=at_least,
            scopes=scope,
            reduce=reduce,
            validate=validate,
            caution=caution,
            workspace=workspace,
            decompositions=decompositions,
            keeps=keeps,
            needs_factors=needs_factors,
            dynamic=dynamic,
            fit=fit,
            origin=function.__module__.partition(".")[0],
        )
        return taken

    return register


def _in_full(function: F) -> F:
    """The function, given fp32 in the place of 16 bits, and its result cast back."""

    @wraps(function)
    def called(*args: Any, **given: Any) -> Any:
        kind = next((v.dtype for v in (*args, *given.values()) if torch.is_tensor(v)), None)
        if kind not in (torch.bfloat16, torch.float16):
            return function(*args, **given)

        def wide(value: Any) -> Any:
            return value.float() if torch.is_tensor(value) and value.dtype == kind else value

        found = function(*map(wide, args), **{word: wide(value) for word, value in given.items()})
        return tuple(f.to(kind) for f in found) if isinstance(found, tuple) else found.to(kind)

    return cast(F, called)


def names() -> list[str]:
    """Every method's name, sorted; imports none of them."""
    return sorted({*_modules(), *_plugins()})


def get(name: str) -> MethodSpec:
    """The method of that name; RecipeError with the nearest name where there is none."""
    if name not in _found:
        if name in _modules():
            import_module(_modules()[name])
        elif name in _plugins():
            _plugins()[name].load()
        if name not in _found:
            raise RecipeError(f"there is no method '{name}'", hint=did_you_mean(name, names()))
    return _found[name]


@cache
def _modules() -> dict[str, str]:
    """Method name -> module, from the files in the family folders: file name = method name."""
    found = {}
    for family in FAMILIES:
        package = import_module(f"mowmerge.methods.{family}")
        for module in pkgutil.iter_modules(package.__path__):
            found[module.name] = f"{package.__name__}.{module.name}"
    return found


@cache
def _plugins() -> dict[str, EntryPoint]:
    """Methods of other packages; a name that is taken twice is an error."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="mowmerge.methods"):
        if point.name in _modules() or point.name in found:
            raise RecipeError(
                f"the method '{point.name}' is provided twice",
                where=point.value,
                hint="uninstall one of the packages, or rename its method",
            )
        found[point.name] = point
    return found


def _signature(
    function: Callable[..., Any],
) -> tuple[frozenset[str], dict[str, Parameter], bool]:
    """Reserved inputs, parameters by name, and whether `base` has a default."""
    hints = typing.get_type_hints(function, include_extras=True)
    helps = _helps(inspect.getdoc(function) or "")
    inputs, parameters, optional = set(), {}, False
    for name, p in inspect.signature(function).parameters.items():
        if name in RESERVED:
            inputs.add(name)
            optional = optional or (name == "base" and p.default is not p.empty)
        elif p.default is p.empty:
            raise TypeError(f"{function.__name__}: parameter '{name}' has no default")
        else:
            parameters[name] = _parameter(name, hints[name], p.default, helps.get(name, ""))
    return frozenset(inputs), parameters, optional


def _parameter(name: str, hint: Any, default: Any, help: str) -> Parameter:
    per_model = typing.get_origin(hint) in (Union, types.UnionType)
    if per_model:  # PerModel[X] is X | Sequence[X]
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return Parameter(name, "choice", default, per_model, choices=choices, help=help)
    span = Range()
    for extra in getattr(hint, "__metadata__", ()):
        span = extra if isinstance(extra, Range) else span
    plain = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    kind = {bool: "boolean", int: "integer", float: "number"}[plain]
    return Parameter(name, kind, default, per_model, span.low, span.high, help=help)


def _helps(doc: str) -> dict[str, str]:
    """Parameter help from the docstring's `Args:` section."""
    found: dict[str, str] = {}
    section, current = "", ""
    for line in doc.splitlines():
        if line and not line.startswith(" "):
            section = line.strip()
        elif section == "Args:" and line.startswith("    ") and line.strip():
            head, colon, rest = line.strip().partition(": ")
            if colon and head.isidentifier() and not line.startswith("     "):
                current = head
                found[current] = rest
            elif current:
                found[current] += " " + line.strip()
    return found
