# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Values, log-determinants, inverses, scores and their gradients, of random flows."""

import warnings

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch.func import functional_call

from tests.attack.flows import attack, flows, inputs, make_input

# A chain of layers at gain 4 changes scale by exp(9) a coordinate; round-off of 1e-16 grows with it.
MOST_STRETCH = 1e6


@torch.enable_grad()
def jacobian(function, x):
    """Of shape ``batch + (D, D)``, by reverse mode and a row at a time, for functions of rows."""
    rows = x.detach().requires_grad_()
    y = function(rows)
    columns = []
    for k in range(x.shape[-1]):
        (row,) = torch.autograd.grad(y[..., k].sum(), rows, retain_graph=True)
        columns.append(row)
    return torch.stack(columns, -2)


def stretch(flow, x):
    """How much T and its inverse amplify errors, for each row."""
    matrix = jacobian(lambda v: flow.call_and_ladj(v)[0], x)
    values = torch.linalg.svdvals(matrix)
    return values.amax(-1).clamp_min(1.0) * (1 / values.amin(-1)).clamp_min(1.0)


def close(a, b, tolerance):
    """Within a tolerance relative to 1 + |b|, with NaN and infinities in the same places."""
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@attack(few=10, case=flows(), spec=inputs())
def test_log_determinants_and_round_trips(case, spec):
    flow, x = case.flow, make_input(spec, case.dim)
    y, ladj = flow.call_and_ladj(x)
    assert y.shape == x.shape
    assert ladj.shape == x.shape[:-1]
    assert close(flow(x), y, 1e-9)
    with torch.no_grad():
        back, inverse_ladj = flow.inv.call_and_ladj(y.detach().clone())
        again = flow(back)
    assert back.shape == x.shape
    if not x.numel():
        return
    amplified = stretch(flow, x)
    sure = amplified < MOST_STRETCH  # further on a solution may be any of many, to round-off
    sign, expected = torch.linalg.slogdet(jacobian(flow, x))
    assert close(flow.log_abs_det_jacobian(x, y)[sure], ladj[sure], 1e-7)
    assert close(ladj[sure], expected[sure], 1e-7)
    assert (sign.abs()[sure] == 1).all()
    noise = 1e-13 * amplified[..., None] * (1 + x.abs() + y.abs()).amax(-1, keepdim=True)
    assert ((back - x).abs() <= noise.clamp_min(1e-9))[sure].all()
    assert ((again - y).abs() <= noise.clamp_min(1e-9))[sure].all()
    at_back = flow.call_and_ladj(back)[1]
    assert ((inverse_ladj + at_back).abs() <= noise[..., 0].clamp_min(1e-8))[sure].all()


@attack(case=flows(max_layers=2), spec=inputs())
def test_gradients_of_the_inverse(case, spec):
    """The implicit gradients, against those of the unrolled inverse that torch.func differentiates."""
    y = make_input(spec, case.dim)
    inverse, parameters = case.flow.inv, dict(case.flow.named_parameters())
    with torch.no_grad():
        x = inverse(y)
    assume(x.isfinite().all() and (not x.numel() or (stretch(case.flow, x) < MOST_STRETCH).all()))
    w, v = make_input((spec[0], 1.0, 7), case.dim), make_input((spec[0], 1.0, 8), 1)[..., 0]
    module = Called(inverse)
    by_id = {id(parameter): name for name, parameter in parameters.items()}
    names = {key: by_id[id(parameter)] for key, parameter in module.named_parameters()}

    def objective(values, y):
        x, ladj = functional_call(module, {key: values[names[key]] for key in names}, (y,))
        return (w * x).sum() + (v * ladj).sum()

    plain_y = y.clone().requires_grad_()
    x, ladj = inverse.call_and_ladj(plain_y)
    loss = (w * x).sum() + (v * ladj).sum()
    found = torch.autograd.grad(loss, [plain_y, *parameters.values()], allow_unused=True)
    expected = torch.func.grad(objective, argnums=(1, 0))(
        {k: p.detach() for k, p in parameters.items()}, y
    )
    for name, one, other in zip(["y", *parameters], found, [expected[0], *expected[1].values()]):
        one = torch.zeros_like(other) if one is None else one
        size = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        assert (one - other).abs().le(1e-6 * size).all(), (name, one, other)


class Called(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, y):
        return self.flow.call_and_ladj(y)


@attack(case=flows(), spec=inputs())
def test_scores(case, spec):
    """The score of a value is the gradient of its log-density, by the inverse."""
    x = make_input(spec, case.dim)
    y, ladj, score = case.flow.call_and_score(x, -x)
    assert score.shape == x.shape
    again, ladj_again = case.flow.call_and_ladj(x)
    assert close(y, again, 1e-9)
    assert close(ladj, ladj_again, 1e-9)
    if not x.numel():
        return
    assume((stretch(case.flow, x) < MOST_STRETCH).all())
    point = y.detach().requires_grad_()
    back, inverse_ladj = case.flow.inv.call_and_ladj(point)
    log_q = -0.5 * back.square().sum() + inverse_ladj.sum()
    (expected,) = torch.autograd.grad(log_q, point)
    size = expected.abs().amax(-1, keepdim=True).clamp_min(1.0)
    assert ((score - expected).abs() <= 1e-5 * size).all(), (score, expected)


@attack(case=flows(gains=(0.3, 1.0), max_layers=2), spec=inputs((1e-3, 1.0, 5.0)))
def test_float32_is_close_to_float64(case, spec):
    assume("context" not in repr(case))  # whose dtype is its own
    x = make_input(spec, case.dim, torch.float32)
    with torch.no_grad():
        expected, expected_ladj = case.flow.call_and_ladj(x.double())
        back, back_ladj = case.flow.inv.call_and_ladj(x.double())
        if x.numel():
            amplified = stretch(case.flow, x.double()).maximum(stretch(case.flow, back))
            assume((amplified < 1e3).all())
        case.flow.float()
        y, ladj = case.flow.call_and_ladj(x)
        x_back, ladj_back = case.flow.inv.call_and_ladj(x)
    assert y.dtype == ladj.dtype == x_back.dtype == ladj_back.dtype == torch.float32
    for one, other in ((y, expected), (x_back, back)):
        size = (1 + other.abs()).amax(-1, keepdim=True) if x.numel() else 1.0
        assert ((one.double() - other).abs() <= 2e-3 * size).all()
    assert close(ladj.double(), expected_ladj, 2e-3)
    assert close(ladj_back.double(), back_ladj, 2e-3)


SIZES = (0.0, 5e-324, 1e-300, 1e-8, 1e4, 1e8, 1e30, 1e155, torch.inf)
EXTREMES = (*SIZES, *(-size for size in SIZES), torch.nan)


@attack(
    case=flows(large=(17,)),
    values=st.lists(st.sampled_from(EXTREMES), min_size=6, max_size=6),
)
def test_extreme_inputs_give_no_wrong_finite_number(case, values):
    """What is finite is right, by the residual and by the log-determinant; what is NaN stays NaN."""
    x = torch.tensor(values * 7)[: case.dim]
    for flow in (case.flow, case.flow.inv):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y, ladj = flow.call_and_ladj(x)
            back, back_ladj = flow.inv.call_and_ladj(y)
        for i in x.isnan().nonzero()[:, 0].tolist():
            moved = _depends_on(flow, i, case.dim)
            # outside of its bound a spline is the identity: what does not depend on NaN there is that
            # of any number in its place
            filled = [torch.where(x.isnan(), number, x) for number in (0.3, -2.0)]
            others = torch.stack([*map(flow, filled)])
            is_right = y[moved].isnan() | (y[moved] == others[:, moved]).all(0)
            assert is_right.all(), (flow, x, y)
        if not (x.isfinite().all() and y.isfinite().all() and x.abs().max() < 1e6):
            continue
        assert ladj.isfinite()
        assert ladj.abs() < 200
        if (stretch(flow, x) < MOST_STRETCH).all():
            assert ((back - x).abs() <= 1e-6 * (1 + x.abs() + y.abs()).amax()).all(), (x, y, back)
            assert (back_ladj + ladj).abs() <= 1e-5 * (1 + y.abs().amax())
            expected = torch.linalg.slogdet(jacobian(flow, x))[1]
            assert (expected - ladj).abs() <= 1e-5


def _depends_on(flow, i, dim):
    """Which values depend on coordinate i, at a usual point."""
    x = torch.linspace(-1, 1, dim)
    return jacobian(flow, x)[:, i] != 0


@attack(case=flows(large=(), max_layers=2), number=st.integers(0, 99))
def test_function_transforms(case, number):
    """vmap, jacrev and jacfwd give what plain evaluation and reverse mode give."""
    flow, x = case.flow, make_input(((3,), 1.0, number), case.dim)
    for one in (flow, flow.inv):
        with torch.no_grad():
            y, ladj = one.call_and_ladj(x)
        assume(y.isfinite().all() and (stretch(one, x) < MOST_STRETCH).all())
        mapped, mapped_ladj = torch.func.vmap(one.call_and_ladj)(x)
        assert close(mapped, y, 1e-8)
        assert close(mapped_ladj, ladj, 1e-8)
        expected = jacobian(one, x)
        size = 1 + expected.abs().max()
        by_reverse = torch.func.vmap(torch.func.jacrev(one))(x)
        assert ((by_reverse - expected).abs() <= 1e-7 * size).all()
        by_forward = torch.func.vmap(torch.func.jacfwd(one))(x)
        assert ((by_forward - expected).abs() <= 1e-7 * size).all()
