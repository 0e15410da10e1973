"""The laws: what every method keeps, and what its decorator declares, over the whole registry.

Dynamic methods give the parts of a code instead of a tensor: test_dynamic_laws.py has theirs. A
method is exempt from a universal law only by `exempt={law: reason}` in its decorator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import given as for_any
from hypothesis import strategies as st
from torch import Tensor

from mowmerge.methods import ops, registry
from mowmerge.methods.contracts import Draws, MethodError
from mowmerge.methods.registry import LAWS, MethodSpec, Parameter
from mowmerge.plan import RUN

torch.set_num_threads(1)
UNIVERSAL = (
    "shape", "finite", "pure", "zero", "chunked", "seed", "small", "float64", "range", "documented",
)  # fmt: skip
ALL = registry.names()
NAMES = [name for name in ALL if registry.get(name).dynamic is None]
INFINITE = float("inf")
quick = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


# --- calling any method


def held(name: str, law: str) -> MethodSpec:
    """The method, unless it is exempt from the law."""
    spec = registry.get(name)
    if law in spec.exempt:
        pytest.skip(spec.exempt[law])
    return spec


def declared(law: str) -> list[str]:
    return [name for name in NAMES if law in registry.get(name).laws]


def model_names(n: int) -> list[str]:
    return [f"model-{i}" for i in range(n)]


def draws(n: int, start: int = 0, seed: int = 0, tensor: str = "t") -> Draws:
    return Draws(seed, model_names(n), tensor, start)


def base_of(values: Tensor) -> Tensor:
    return values.abs().amax(0)


def call(
    spec: MethodSpec, values: Tensor, given: dict[str, Any], rng: Draws | None = None, **more: Any
) -> Tensor:
    """The method on a tensor; a base, where it reads one, that scales, cuts and permutes along."""
    if "rng" in spec.inputs:
        more["rng"] = rng or draws(len(values))
    if "start" in spec.inputs:
        more["start"] = rng.start if rng else 0
    if "base" in spec.inputs:
        more["base"] = base_of(values)
    return spec.function(values, **given, **more)


def settled(spec: MethodSpec, values: Tensor, given: dict[str, Any], rng: Draws) -> dict[str, Any]:
    """`state` as the engine settles it, where the scope asks for it."""
    if spec.reduce is None or spec.scope(given) == "element":
        return {}
    n, base, rows = len(values), base_of(values), spec.scope(given) == "row"
    each = {k: ops.spread(v, n) if spec.parameters[k].per_model else v for k, v in given.items()}
    matrix = spec.decompositions is not None and values.dim() == 3
    state = ops.settle(spec.reduce, values, each, rng, base=base, rows=rows, matrix=matrix)
    return {"state": state}


def valid(spec: MethodSpec, given: dict[str, Any], n: int) -> bool:
    try:
        spec.check(given, n)
    except MethodError:
        return False
    return True


def count(spec: MethodSpec, wanted: int = 3) -> int:
    return spec.count or max(spec.at_least, wanted)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of many magnitudes, of which a tenth are zero."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=g, dtype=dtype)
    value *= torch.randn(shape, generator=g, dtype=dtype).exp()
    return value * (torch.rand(shape, generator=g) > 0.1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_bits = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(as_bits), b.contiguous().view(as_bits)
    )


# --- parameters, from the signatures


def some(p: Parameter) -> list[Any]:
    """Values that a parameter may take, its ends included."""
    if p.kind == "choice":
        return list(p.choices)
    if p.kind == "boolean":
        return [False, True]
    low, high = p.low, p.high
    if p.kind == "integer":
        first = int(low) if low > -INFINITE else 0
        return [i for i in (first, first + 1, first + 5) if i <= high]
    if high < INFINITE and low > -INFINITE:
        return [low, low + 1e-40] + [low + (high - low) * k / 10 for k in (1, 3, 5, 9, 10)]
    if low > -INFINITE:
        return [low, p.default, 2 * p.default]
    return [-1.5, -0.5, 0.0, 0.25, 1.0, 1.75]


def variants(spec: MethodSpec, n: int) -> Iterator[dict[str, Any]]:
    """The defaults, each parameter's other values, and lists with a value a model."""
    default = spec.complete({})
    yield default
    for name, p in spec.parameters.items():
        options: list[Any] = [value for value in some(p) if value != p.default]
        if p.per_model:
            options.append((some(p)[1:] * n)[:n])
        for value in options:
            changed = {**default, name: value}
            if valid(spec, changed, n):
                yield changed


@st.composite
def parameters(draw: Any, spec: MethodSpec, n: int, **pinned: Any) -> dict[str, Any]:
    """Any combination of `some` values, per-model lists too."""
    found = {}
    for name, p in spec.parameters.items():
        one = st.sampled_from(some(p))
        either = st.one_of(one, st.lists(one, min_size=n, max_size=n)) if p.per_model else one
        found[name] = draw(either)
    found.update(pinned)
    assume(valid(spec, found, n))
    return found


FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, -1e-30, 1e-40]),
    st.floats(-(2.0**13), 2.0**13, width=32),
)


@st.composite
def cases(draw: Any, spec: MethodSpec) -> tuple[Tensor, dict[str, Any]]:
    """Stacked values of any small shape, empty and 0-d too, and parameters."""
    n = spec.count or draw(st.integers(spec.at_least, spec.at_least + 3))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    values = draw(hnp.arrays(np.float32, (n, *shape), elements=FLOATS))
    twist = draw(st.sampled_from((None, 1, -1)))
    values[1:] = twist * values[:1] if twist else values[1:]  # all equal, or opposite
    return torch.from_numpy(values), draw(parameters(spec, n))


def with_cases(law: str) -> Callable[..., Any]:
    """Runs a check(spec, values, parameters) for every method on Hypothesis' cases."""

    def wrap(check: Callable[[MethodSpec, Tensor, dict[str, Any]], None]) -> Callable[..., Any]:
        @pytest.mark.parametrize("name", NAMES)
        def test(name: str) -> None:
            spec = held(name, law)

            @quick
            @for_any(cases(spec))
            def run(case: tuple[Tensor, dict[str, Any]]) -> None:
                check(spec, *case)

            run()

        return test

    return wrap


# --- universal laws


@with_cases("shape")
def test_shape_and_dtype_are_kept(spec: MethodSpec, values: Tensor, given: dict[str, Any]) -> None:
    out = call(spec, values, given)
    assert out.shape == values.shape[1:]
    assert out.dtype == values.dtype


@with_cases("finite")
def test_finite_in_finite_out(spec: MethodSpec, values: Tensor, given: dict[str, Any]) -> None:
    assert torch.isfinite(call(spec, values, given)).all()


@with_cases("pure")
def test_inputs_and_state_are_left_alone(
    spec: MethodSpec, values: Tensor, given: dict[str, Any]
) -> None:
    before, rng = values.clone(), draws(len(values))
    state = settled(spec, values, given, rng)
    first = call(spec, values, given, rng, **state)
    kept = first.clone()
    first.add_(1.0)  # the result is the caller's: nothing of the input lies under it
    assert same_bits(values, before)
    assert same_bits(call(spec, values, given, rng, **state), kept)
    assert same_bits(call(spec, values, given, rng), kept)


@with_cases("zero")
def test_zero_deltas_give_a_zero_delta(
    spec: MethodSpec, values: Tensor, given: dict[str, Any]
) -> None:
    if spec.values == "deltas":
        assert not call(spec, torch.zeros_like(values), given).any()


def in_pieces(
    spec: MethodSpec, values: Tensor, given: dict[str, Any], cuts: Sequence[int]
) -> Tensor:
    """The method on pieces cut along the last dimension, or along rows for scope row."""
    n, by_row = len(values), spec.scope(given) == "row"
    state = settled(spec, values, given, draws(n))
    flat = values if by_row else values.reshape(n, -1)
    found = []
    for start, stop in zip((0, *cuts), (*cuts, flat.shape[1]), strict=True):
        piece = flat[:, start:stop].contiguous()
        first = start * (flat[0].numel() // flat.shape[1])
        found.append(call(spec, piece, given, draws(n, first), **state))
    return torch.cat(found).reshape(values.shape[1:])


@pytest.mark.parametrize("name", NAMES)
def test_chunked_equals_whole_bit_for_bit(name: str) -> None:
    spec = held(name, "chunked")
    n = count(spec)
    for i, given in enumerate(variants(spec, n)):
        scope = spec.scope(given)
        if scope == "tensor" and spec.reduce is None and not spec.decompositions:
            continue
        shape = (131 * 1009,) if spec.decompositions else (131, 1009)  # a matrix is not cut
        values = normal(n, *shape, seed=i)
        cuts = ([1], [64, 128], [100]) if scope == "row" else ([RUN, 2 * RUN], [2 * RUN])
        whole = call(spec, values, given)
        for cut in cuts:
            assert same_bits(in_pieces(spec, values, given, cut), whole), (given, cut)


@pytest.mark.parametrize("name", NAMES)
def test_cut_anywhere_to_one_ulp(name: str) -> None:
    spec = held(name, "chunked")
    n = count(spec)

    @quick
    @for_any(
        parameters(spec, n), st.lists(st.integers(1, 999), min_size=1, max_size=4, unique=True)
    )
    def run(given: dict[str, Any], cuts: list[int]) -> None:
        assume(spec.scope(given) == "element")
        values = normal(n, 1000)
        whole, parts = call(spec, values, given), in_pieces(spec, values, given, sorted(cuts))
        up, down = whole.nextafter(whole + 1), whole.nextafter(whole - 1)
        assert ((parts == whole) | (parts == up) | (parts == down)).all()

    if any(spec.scope(given) == "element" for given in variants(spec, n)):
        run()


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_and_the_names_decide_the_draw(name: str) -> None:
    spec = held(name, "seed")
    if "rng" not in spec.inputs:
        return
    n = count(spec)
    values = normal(n, 1000)
    for given in variants(spec, n):
        assert same_bits(call(spec, values, given), call(spec, values, given))
    default = spec.complete({})
    first = call(spec, values, default)
    assert not torch.equal(call(spec, values, default, draws(n, seed=1)), first)
    assert not torch.equal(call(spec, values, default, draws(n, tensor="u")), first)
    assert not torch.equal(call(spec, values, default, draws(n, start=1)), first)
    assert not torch.equal(call(spec, values, default, Draws(0, ["x", "y", "z"][:n], "t")), first)
    if "seed" in spec.parameters:  # without rng the method draws by itself
        alone = [spec.function(values, **{**default, "seed": s}) for s in (7, 7, 8)]
        assert same_bits(alone[0], alone[1])
        assert not torch.equal(alone[0], alone[2])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1, 1), (0, 3), (3, 0), (2, 1, 1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_scalars_empty_and_single_elements(name: str, shape: tuple[int, ...]) -> None:
    spec = held(name, "small")
    n = count(spec)
    for i, given in enumerate(variants(spec, n)):
        values = normal(n, *shape, seed=i)
        out = call(spec, values, given)
        assert out.shape == shape
        assert torch.isfinite(out).all(), given


@pytest.mark.parametrize("name", NAMES)
def test_float64_in_float64_out(name: str) -> None:
    spec = held(name, "float64")
    n = count(spec)
    for given in variants(spec, n):
        values = normal(n, 30, 40, dtype=torch.float64)
        out, narrow = call(spec, values, given), call(spec, values.float(), given)
        assert out.dtype == torch.float64
        assert torch.allclose(out, narrow.double(), rtol=1e-5, atol=1e-5), given
        assert not out.any() or not torch.equal(out, out.float().double()), given


@pytest.mark.parametrize("name", ALL)
def test_parameters_out_of_range_are_refused(name: str) -> None:
    for p in held(name, "range").parameters.values():
        for value in (*some(p), p.default):
            assert p.fault(value) == ""
        for value in (None, [], "no such word", float("nan"), INFINITE, -INFINITE):
            assert p.fault(value)
        if p.kind in ("number", "integer"):
            wrong: list[Any] = [True, "1"]
            wrong += [p.low - 1e-6, p.low - 1] if p.low > -INFINITE else []
            wrong += [p.high + 1, p.high * 2] if p.high < INFINITE else []
            wrong += [0.5] if p.kind == "integer" else []
            assert all(p.fault(value) for value in wrong)
        elif p.kind == "boolean":
            assert p.fault(1)
            assert p.fault("true")


@pytest.mark.parametrize("name", ALL)
def test_documented_and_in_its_place(name: str) -> None:
    spec = held(name, "documented")
    for p in spec.parameters.values():
        assert p.help, f"{p.name} has no help"
    headings = ["Shapes:", "Source:", "Differs:"] + ["Args:"] * bool(spec.parameters)
    for heading in headings:
        assert f"\n{heading}" in spec.doc, heading
    assert spec.summary.endswith(".")
    assert spec.paper
    assert all(law in UNIVERSAL and reason for law, reason in spec.exempt.items())
    assert all(set(pins) <= set(spec.parameters) for pins in spec.laws.values())
    if spec.origin == "mowmerge":
        assert spec.name == name == Path(inspect.getfile(spec.function)).stem
        assert (Path(__file__).parent / f"methods/{spec.family}/test_{name}.py").is_file()


@pytest.mark.parametrize("name", [name for name in NAMES if registry.get(name).fit])
def test_linear_in_what_is_fitted(name: str) -> None:
    """f(weight) is the sum of weight_i * f(one at i), from which the fit takes its gradients."""
    spec, n = registry.get(name), 3
    assert spec.fit
    for given in variants(spec, n):
        values, weight = normal(n, 131, 17), [0.2, 0.7, 0.05]
        parts = [
            call(spec, values, {**given, spec.fit: [float(i == k) for i in range(n)]})
            for k in range(n)
        ]
        both = sum(w * part for w, part in zip(weight, parts, strict=True))
        assert close(call(spec, values, {**given, spec.fit: weight}), both)
        assert not call(spec, values, {**given, spec.fit: 0.0}).any()


# --- declared laws


def close(a: Tensor, b: Tensor) -> bool:
    size = float(b.abs().max()) if b.numel() else 0.0
    least = torch.finfo(b.dtype).tiny  # below it floats are a fixed distance apart
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * size + least)


def with_declared(law: str, n: Callable[[MethodSpec], int] = count) -> Callable[..., Any]:
    """Runs a check(spec, values, parameters, data) where the law is declared, as it is declared."""

    def wrap(check: Callable[..., None]) -> Callable[..., Any]:
        @pytest.mark.parametrize("name", declared(law))
        def test(name: str) -> None:
            spec = registry.get(name)
            models = n(spec)

            @quick
            @for_any(
                parameters(spec, models, **spec.laws[law]),
                hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=12),
                st.integers(0, 2**31),
                st.data(),
            )
            def run(given: dict[str, Any], shape: Any, seed: int, data: st.DataObject) -> None:
                assert spec.holds(law, given)
                check(spec, normal(models, *shape, seed=seed), given, data)

            run()

        return test

    return wrap


@with_declared("identity", n=lambda spec: 1)
def test_identity(spec: MethodSpec, values: Tensor, given: dict[str, Any], data: Any) -> None:
    """One model at weight 1, everything else at its default, comes back bit for bit."""
    given = spec.complete(dict(spec.laws["identity"]))
    assert torch.equal(call(spec, values, given), values[0])


@with_declared("idempotent")
def test_idempotent(spec: MethodSpec, values: Tensor, given: dict[str, Any], data: Any) -> None:
    """N equal models give that model."""
    equal = values[:1].expand_as(values).contiguous()
    assert close(call(spec, equal, given), values[0])


@with_declared("permutation")
def test_permutation(spec: MethodSpec, values: Tensor, given: dict[str, Any], data: Any) -> None:
    """Models, their parameters and their names in another order give the same."""
    n = len(values)
    order = data.draw(st.permutations(range(n)))
    moved = {
        name: [value[i] for i in order] if isinstance(value, list) else value
        for name, value in given.items()
    }
    names = [model_names(n)[i] for i in order]
    assert close(call(spec, values[order], moved, Draws(0, names, "t")), call(spec, values, given))


@with_declared("scale")
def test_scale(spec: MethodSpec, values: Tensor, given: dict[str, Any], data: Any) -> None:
    """Values times c give the result times c."""
    c = data.draw(st.sampled_from([0.125, 3.0, 1000.0]))
    assert close(call(spec, values * c, given), call(spec, values, given) * c)


@with_declared("propagates")
def test_propagates(spec: MethodSpec, values: Tensor, given: dict[str, Any], data: Any) -> None:
    """A NaN or Inf in any model is one in the result, at the same place."""
    at = tuple(data.draw(st.integers(0, side - 1)) for side in values.shape)
    values[at] = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    assert not torch.isfinite(call(spec, values, given)[at[1:]])


def test_every_law_is_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals()}
    assert set(LAWS) <= tested
    assert all(declared(law) for law in LAWS)
