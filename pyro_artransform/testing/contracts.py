# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contracts of univariate families, conditioners and transforms, as assertions."""

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from math import nan
from typing import Any

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import Transform

from .._base.comparison import tolerance
from ..flows.conditioners import Conditioner
from ..flows.conditioners.masks import levels
from ..flows.transforms.flow_module import call_and_ladj
from ..flows.univariate import Univariate

BATCH_SHAPES = ((), (3,), (3, 4))
DTYPES = (torch.float32, torch.float64)
PARTS = ("value", "log-derivative")


def redraw(module: nn.Module, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """Redraws every parameter of a module in place, at PyTorch's default scale times ``gain``.

    :param seed: the seed of a separate generator; the global one is not used.
    :return: the module.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
        draws = torch.zeros(parameter.shape, dtype=torch.float64, device="cpu")
        draws.uniform_(-1, 1, generator=generator)
        with torch.no_grad():
            parameter.copy_(draws * gain / max(fan_in, 1) ** 0.5)
    return module


def _normal(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal draws on the CPU, from a separate generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets the default dtype within a context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _require(holds: Tensor, contract: str, **values: Tensor) -> None:
    """Fails with the values of the first entry that breaks a contract."""
    if not holds.all():
        first = tuple((~holds).nonzero()[0].tolist())
        entries = {name: value.broadcast_to(holds.shape)[first] for name, value in values.items()}
        shown = ", ".join(f"{name} = {entry.item():.9g}" for name, entry in entries.items())
        raise AssertionError(f"{contract} (contract broken for {shown}; entry {first})")


def equal(
    found: Tensor, expected: Tensor, contract: str, tolerance: Any = 0.0, **at: Tensor
) -> None:
    """Requires equality up to a tolerance relative to ``1 + |expected|``."""
    kinds = [(value.dtype, tuple(value.shape)) for value in (found, expected)]
    assert kinds[0] == kinds[1], f"{contract} (got {kinds[0]}, expected {kinds[1]})"
    holds = (found - expected).abs() <= tolerance * (1 + expected.abs())
    _require(holds, contract, **at, found=found, expected=expected)


def _check_gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], contract: str
) -> None:
    """Checks the gradients of both outputs by differences; those of one without a graph are zero."""
    inputs = [leaf.requires_grad_() for leaf in inputs]
    for k, part in enumerate(PARTS):
        try:
            one = partial(lambda k, *at: function(*at)[k], k)
            torch.autograd.gradcheck(one, inputs, rtol=1e-5, fast_mode=True)
        except RuntimeError as error:
            differ = " ".join(str(error).splitlines()[:3])  # whole Jacobians follow
            raise AssertionError(f"{contract.format(part)}: {differ}") from error


def check_univariate(univariate: Univariate, *, dtype: torch.dtype = torch.float64) -> None:
    """Checks that a univariate family keeps its contract.

    Its transforms are increasing elementwise bijections of the real line, the identity at zero parameters;
    inverses, log-determinants and gradients are correct by all methods; at large parameters they stay finite,
    and log-slopes below 10; each row and coordinate depends on its own parameters alone; shapes broadcast;
    dtypes follow the input; and NaN propagates.

    :param univariate: the family, which is copied. Its own exceptions are not caught.
    :param dtype: the dtype for checks of values; float32 has wider tolerances.
    :raises AssertionError: with the broken contract and the input.
    """
    family, who = copy.deepcopy(univariate).to(dtype), type(univariate).__name__
    try:
        _check_interface(family, dtype)
        params, x = _normal((50, family.num_params), dtype), _grid(5.3, dtype, 6).sinh() * 10
        for gain in (1.0, 4.0):
            _check_bijection(family(gain * params[:6]), x.detach())
        for gain in (10.0, 100.0):
            _check_large(family, gain * params, f"random, times {gain:g}")
        for way in ("map", "inverse"):
            _check_independence(family, dtype, way)
            contract = f"the gradients of the {{}} of the {way} must agree with differences"
            leaves = _normal((2, family.num_params)), _normal((3, 2))
            _check_gradients(
                partial(_values, copy.deepcopy(family).double(), way), leaves, contract
            )
    except AssertionError as error:
        raise AssertionError(f"{who}: {error}") from error


def _grid(width: float, dtype: torch.dtype, columns: int) -> Tensor:
    points = torch.linspace(-width, width, 1001, dtype=dtype, device="cpu")
    return points.unsqueeze(-1).repeat(1, columns)


def _values(family: Univariate, way: str, params: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    transform = family(params)
    return call_and_ladj(transform if way == "map" else transform.inv, x)


def _check_interface(family: Univariate, dtype: torch.dtype) -> None:
    count = family.num_params
    is_count = type(count) is int and count >= 1
    assert is_count, f"num_params must be a positive int, got {count!r}"
    transform = family(_normal((2, count), dtype))
    got = f"forward(params) must return a torch Transform, got {type(transform).__name__}"
    assert isinstance(transform, Transform), got
    dims = transform.domain.event_dim, transform.codomain.event_dim
    assert dims == (0, 0), f"the transform must be elementwise (event_dim 0), got {dims}"
    assert transform.bijective, "the transform must have bijective = True"
    wanted = "call, log-determinant and inverse must have the dtype and the shape of the input"
    for default, other, shape, more in product(DTYPES, DTYPES, BATCH_SHAPES, ((), (5,))):
        with default_dtype(default):
            transform = copy.deepcopy(family).to(other)(_normal((*shape, 2, count), other))
            x = _normal((*more, *shape, 2), other)
            y = transform(x)
            results = y, transform.log_abs_det_jacobian(x, y), transform.inv(x)
        found, expected = [(r.dtype, tuple(r.shape)) for r in results], (other, tuple(x.shape))
        assert found == [expected] * 3, f"{wanted}, {expected} (default {default}), got {found}"
    sizes = torch.tensor([0, 1e-8, 1e-6, 1e-2, 1, 3, 5, 30, 1e2], dtype=dtype, device="cpu")
    x, limit = torch.cat([sizes, -sizes]).unsqueeze(-1), 20 * torch.finfo(dtype).eps
    y, ladj = _values(family, "map", x.new_zeros(1, count), x)
    equal(y, x, "zero params must be the identity", limit, x=x)
    equal(ladj, 0 * x, "zero params must have log-determinant zero", limit, x=x)


def _check_bijection(transform: Any, x: Tensor) -> None:
    round_off, y = tolerance(x), transform(x.requires_grad_())
    ends = {"x": x[:-1], "next_x": x[1:], "y": y[:-1], "next_y": y[1:]}
    _require(y[1:] > y[:-1], "the map must be strictly increasing", **ends)
    ladj, slope = transform.log_abs_det_jacobian(x, y), torch.autograd.grad(y.sum(), x)[0]
    wanted = "the log-determinant must be the logarithm of the derivative"
    equal(ladj, slope.log(), wanted, 10 * round_off, x=x)
    # where the map is flat, the inverse amplifies round-off in y
    back, flat = transform.inv(y), (-ladj).exp().clamp_min(1.0)
    equal(back, x, "the inverse must undo the map", round_off * flat, x=x, y=y)
    back_ladj = transform.inv.log_abs_det_jacobian(y, back)
    wanted = "the inverse's log-determinant must be minus that of the map"
    equal(back_ladj, -ladj, wanted, 1e3 * round_off, x=x)
    far = transform.inv(x)
    again = transform(far.where(far.isfinite(), nan))
    equal(again, x, "the map must be onto the real line", 10 * round_off, inverse=far)
    for way, function in {"map": transform, "inverse": transform.inv}.items():
        _require(function(nan * x).isnan(), f"a NaN must remain NaN in the {way}", x=nan * x)
    both = {"call_and_ladj": (x, y, ladj), "inverse_and_ladj": (y, back, back_ladj)}
    for method, (argument, *expected) in both.items():
        wanted = f"{method} must agree with the methods of torch, such as log_abs_det_jacobian"
        found = getattr(transform, method)(argument) if hasattr(transform, method) else ()
        for one, other in zip(found, expected):
            equal(one, other, wanted, 10 * round_off, argument=argument)


def _check_independence(family: Univariate, dtype: torch.dtype, way: str) -> None:
    """Compares rows or coordinates alone with the same among others with large params."""
    params, x = 4 * _normal((3, 3, family.num_params), dtype), _normal((3, 3), dtype, seed=1)
    for dim, others in enumerate(("rows", "coordinates")):
        alone = [_values(family, way, *pair) for pair in zip(params.split(1, dim), x.split(1, dim))]
        for part, among, own in zip(PARTS, _values(family, way, params, x), zip(*alone)):
            wanted = f"the {part} of the {way} must not depend on those of other {others}"
            equal(among, torch.cat(own, dim), wanted, tolerance(x), x=x)


def _check_large(family: Univariate, params: Tensor, how: str) -> None:
    x = _grid(30, params.dtype, len(params)).requires_grad_()
    params.requires_grad_()
    (y, ladj), where = _values(family, "map", params, x), f"at large params ({how})"
    finite = y.isfinite() & ladj.isfinite()
    _require(finite, f"values must be finite {where}", x=x, y=y, ladj=ladj)
    bounded = (ladj.abs() <= 10.0) | (x.abs() > 3)  # layers of a flow should have about 3
    wanted = f"log-slopes must be bounded, here by 10 for |x| <= 3, {where}: see soft_bound"
    _require(bounded, wanted, x=x, ladj=ladj)
    total = y.sum() + ladj.sum() + family(params).inv(x).sum()
    for slope in torch.autograd.grad(total, (params, x)):
        _require(slope.isfinite(), f"gradients must be finite {where}", gradient=slope)


def check_conditioner(
    make: Callable[[], nn.Module],
    input_dim: int,
    *,
    context_dim: int = 0,
    adjacency: Tensor | None = None,
) -> None:
    """Checks that a conditioner keeps its contract.

    It returns shape ``(*, D, P)`` in the dtype of its input, starts at zero, depends on exactly the
    coordinates that its graph allows (checked beyond gradients), has a ``depth`` no smaller than its graph's,
    is deterministic, treats rows alike, broadcasts a context, and is restored by its state dict.

    :param input_dim: the number D of coordinates.
    :param context_dim: the size C of its context, 0 for none.
    :param adjacency: its graph, boolean of shape ``(D, D)``, by default all edges in the order 0 .. D-1.
    :raises AssertionError: with the broken contract and the input.
    """

    def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        sizes = [input_dim, context_dim] if context_dim else [input_dim]
        return [_normal((*shape, size), dtype, seed=size) for size in sizes]

    conditioner = make()
    assert isinstance(conditioner, nn.Module), f"expected an nn.Module, got {type(conditioner)}"
    for dtype, shape in product(DTYPES, BATCH_SHAPES):
        params = copy.deepcopy(conditioner).to(dtype)(*inputs(*shape, dtype=dtype))
        zeros = torch.zeros((*shape, input_dim, params.shape[-1]), dtype=dtype, device="cpu")
        equal(params, zeros, "shape and start: expected zero parameters (*, D, P) at first")
    _check_rows(redraw(conditioner.double()), *inputs(3, 4))
    if adjacency is None:
        adjacency = torch.ones((input_dim, input_dim), dtype=torch.bool, device="cpu").tril(-1)
    for gain in (1.0, 10.0):
        _check_graph(redraw(conditioner, gain), adjacency, inputs()[1:], gain)
    needed = int(levels(adjacency).max()) + 1
    depth = conditioner.depth if isinstance(conditioner, Conditioner) else None
    wanted = (
        f"depth: it states {depth}, but {needed} coordinates are on the longest path of its graph"
    )
    assert depth is None or depth >= needed, wanted  # the inverse stops after ``depth`` passes
    restored, expected = redraw(make().double(), seed=1), conditioner(*inputs(3))
    restored.load_state_dict(conditioner.state_dict(), strict=True)
    equal(restored(*inputs(3)), expected, "load_state_dict: the values changed")
    equal(copy.deepcopy(conditioner)(*inputs(3)), expected, "deepcopy: the values changed")


def _check_rows(conditioner: nn.Module, x: Tensor, *contexts: Tensor) -> None:
    whole = conditioner(x, *contexts)
    equal(conditioner(x, *contexts), whole, "random: the same x gives different values")
    row = conditioner(*(argument[1, 2] for argument in (x, *contexts)))
    equal(row, whole[1, 2], "batch: a row alone gives a different value", 1e-10)
    for context in contexts:
        one = conditioner(x, context[:1, :1])
        assert one.shape == whole.shape, "context: shape (1, 1, C) does not broadcast with x"
        assert not torch.equal(one, whole), "context: it has no effect"


def _check_graph(module: nn.Module, adjacency: Tensor, contexts: list[Tensor], gain: float) -> None:
    points = [_normal((len(adjacency),), seed=seed) for seed in range(3)]
    depends = torch.stack([_moved(module, x, contexts) for x in points]).any(0)
    for name, wrong in {
        "autoregressive: {} depend on x_j where the graph has no edge": depends & ~adjacency,
        "graph: {} do not depend on x_j where the graph has an edge": adjacency & ~depends,
    }.items():
        fault = name.format(f"with parameters re-drawn at gain {gain}, parameters of coordinate i")
        assert not wrong.any(), f"{fault}, for (i, j) in {wrong.nonzero()[:10].tolist()}"


def _moved(module: nn.Module, x: Tensor, contexts: list[Tensor]) -> Tensor:
    """Which parameters change as each coordinate moves a little and far, also without gradients."""
    rows, is_moved = x.expand(len(x), -1), torch.eye(len(x), dtype=torch.bool, device="cpu")
    inputs: list[Any] = [context.expand(len(x), -1) for context in contexts]
    to = (x - 10.0, x - 0.1, x + 0.1, x + 10.0)
    with torch.no_grad():
        before = module(rows, *inputs)
        after = torch.stack([module(torch.where(is_moved, new, rows), *inputs) for new in to])
    return ~torch.isclose(after, before, rtol=1e-9, atol=1e-10).all(-1).all(0).mT


def check_transform(
    make: Callable[[], TransformModule], input_dim: int, *, gain: float = 1.0, atol: float = 1e-9
) -> None:
    """Checks that a transform of real vectors keeps its contract, in both directions.

    The log-determinant agrees with the autograd Jacobian; the inverse undoes the transform, has the opposite
    log-determinant and owns the parameters; gradients in the argument and in the parameters are correct
    both ways; caches are invalidated by any change of parameters; copies and pickles work and train
    independently; the dtype follows the input.

    :param make: builds the transform; its parameters are then redrawn, at PyTorch's scale times ``gain``.
    :param input_dim: the number D of coordinates.
    :param atol: the tolerance of round trips in float64, relative to ``1 + |x|``.
    :raises AssertionError: with the broken contract and the input.
    """
    transform: Any = redraw(make().double(), gain)
    assert isinstance(transform, TransformModule), f"not a TransformModule: {type(transform)}"
    assert transform.event_dim == 1, f"event_dim: expected 1, got {transform.event_dim}"
    for shape in BATCH_SHAPES:
        _check_values(transform, _normal((*shape, input_dim)), atol)
    x = _normal((3, input_dim), seed=1)
    ways: Any = (transform, x, ""), (transform.inv, transform(x), "the inverse's ")
    for flow, at, whose in ways:
        # gradcheck perturbs its inputs in place
        at, contract = at.detach().clone(), f"{whose}gradient of the {{}} in "
        if leaves := [p for p in flow.parameters() if p.requires_grad]:
            function = partial(lambda flow, at, *_: flow.call_and_ladj(at), flow, at)
            _check_gradients(function, leaves, contract + "the parameters")
        _check_gradients(flow.call_and_ladj, [at], contract + "x")
    _check_module(transform, x, atol)
    for default, dtype in product(DTYPES, DTYPES):
        with default_dtype(default):
            transform = redraw(make().to(dtype), gain)
            y, ladj = transform.call_and_ladj(_normal((3, input_dim), dtype))
            found = {t.dtype for t in (y, ladj, *transform.inv.call_and_ladj(y.detach()))}
            assert found == {dtype}, f"dtype: expected {dtype} by default {default}, got {found}"


def _check_values(transform: Any, x: Tensor, atol: float) -> None:
    where, copied = f"for x of shape {tuple(x.shape)}", x.clone()
    y, ladj = transform.call_and_ladj(x)
    shapes = y.shape, transform.forward_shape(x.shape), transform.inverse_shape(x.shape)
    assert shapes == (x.shape,) * 3, f"shape of y, forward_shape, inverse_shape: {shapes} {where}"
    equal(transform(x), y, f"__call__ differs from call_and_ladj {where}", atol)
    again = transform.log_abs_det_jacobian(copied, transform(copied))
    equal(again, ladj, f"log_abs_det_jacobian differs from call_and_ladj {where}", atol)
    rows = x.reshape(-1, x.shape[-1])
    jacobians = [torch.autograd.functional.jacobian(transform, row) for row in rows]
    expected = torch.linalg.slogdet(torch.stack(jacobians))[1].reshape(x.shape[:-1])
    equal(ladj, expected, f"log-determinant: not that of the autograd Jacobian {where}", atol)
    back, inverse_ladj = transform.inv.call_and_ladj(y.detach().clone())
    equal(back, x, f"inverse: T.inv(T(x)) is not x {where}", atol)
    equal(inverse_ladj, -ladj, f"inv.call_and_ladj: not the opposite of ladj {where}", atol)
    far = transform.inv(copied).detach()
    error = ((transform(far) - x).abs().amax(-1) / (1 + x.abs() + far.abs()).amax(-1)).max().item()
    assert error <= atol, f"inverse: T(T.inv(y)) is off by {error:.2g} of the largest {where}"


def _check_module(transform: Any, x: Tensor, atol: float) -> None:
    """Checks that the inverse owns the parameters, that copies are apart, and that caches follow edits."""
    inverse, parameters = transform.inv, list(transform.parameters())
    owned = len(list(inverse.parameters())) == len(parameters)
    assert owned, "inv: it does not own the parameters"
    assert inverse.inv is transform, "inv: t.inv.inv is not t"
    names = [name for name, _ in transform.named_parameters(remove_duplicate=False)]
    assert len(names) == len(parameters), f"parameters: one of {names} is there twice"
    cyclic = inverse in list(transform.modules()) and transform in list(inverse.modules())
    assert not cyclic, "inv: the transform and its inverse are submodules of each other"
    if (y := transform(x)).requires_grad:
        y.sum().backward()
    with torch.no_grad():
        expected = transform(x)
        equal(transform.with_cache(0)(x), expected, "with_cache: different values", atol)
        twins = {"deepcopy": copy.deepcopy(transform)}
        twins["deepcopy of inv"] = copy.deepcopy(inverse).inv
        twins["pickle"] = pickle.loads(pickle.dumps(transform))
        for name, twin in twins.items():
            equal(twin(x), expected, f"{name}: different values", atol)
            for p in twin.parameters():
                p.add_(1.0)
            equal(transform(x), expected, f"{name}: it shares parameters", atol)
        y = transform(x)
        for p in parameters:
            p.data.add_(0.01)
        new_x, new_y = x.clone(), y.clone()
        found, ladj = (transform.log_abs_det_jacobian(*at) for at in ((x, y), (new_x, new_y)))
        equal(found, ladj, "memory: old log-determinant after p.data was edited", atol)
        equal(inverse(y), inverse(new_y), "memory: old inverse after p.data was edited", atol)
