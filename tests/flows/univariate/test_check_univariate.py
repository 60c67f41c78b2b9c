# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The assertions for third parties: they pass a right family and name what is wrong in others."""

import pytest
import torch
from torch.distributions import Transform, constraints

from pyro_artransform.flows.univariate import Affine, Univariate, soft_bound
from pyro_artransform.testing import check_univariate


class SinhArcsinhTransform(Transform):
    """y = sinh((arcsinh(x) + skew) * weight), a plain transform of torch."""

    domain = codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, skew, weight):
        super().__init__()
        self.skew, self.weight = skew, weight

    def _call(self, x):
        return torch.sinh((torch.asinh(x) + self.skew) * self.weight)

    def _inverse(self, y):
        return torch.sinh(torch.asinh(y) / self.weight - self.skew)

    def log_abs_det_jacobian(self, x, y):
        angle = (torch.asinh(x) + self.skew) * self.weight
        return torch.log(torch.cosh(angle) * self.weight) - 0.5 * torch.log1p(x**2)


class SinhArcsinh(Univariate):
    num_params = 2
    transform = SinhArcsinhTransform

    def forward(self, params):
        skew = soft_bound(params[..., 0], 1.0)
        return self.transform(skew, soft_bound(params[..., 1], 0.5).exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_right_family_passes_and_global_state_is_left_alone(dtype):
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    check_univariate(SinhArcsinh(), dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == default


call, inverse = SinhArcsinhTransform._call, SinhArcsinhTransform._inverse
ladj = SinhArcsinhTransform.log_abs_det_jacobian


def centred(dim):
    """Reads other rows, or other coordinates."""

    def init(self, skew, weight):
        skew = skew - skew.mean(dim, keepdim=True) if skew.dim() > 1 else skew
        SinhArcsinhTransform.__init__(self, skew, weight)

    return init


def with_inverse_ladj(wrong):
    """Right in itself, but not the log-determinant of its inverse."""

    def inv(self):
        inverse = Transform.inv.fget(self)
        inverse.log_abs_det_jacobian = lambda y, x: wrong(self.log_abs_det_jacobian(x, y))
        return inverse

    return {"inv": property(inv)}


# the identity at zero skew; else saturated at a height of 200
SATURATED = {
    "_call": lambda t, x: torch.where(t.skew == 0, x, 200 * torch.tanh(x / 200)),
    "_inverse": lambda t, y: torch.where(t.skew == 0, y, 200 * torch.atanh(y / 200)),
    "log_abs_det_jacobian": lambda t, x, y: torch.where(
        t.skew == 0, 0 * x, torch.log1p(-(torch.tanh(x / 200) ** 2))
    ),
}
BROKEN = {
    r"gradients of the log-derivative of the map must agree with differences": {
        "log_abs_det_jacobian": lambda t, x, y: ladj(t, x, y).detach()
    },
    r"value of the map must not depend on those of other rows": {"__init__": centred(0)},
    r"value of the map must not depend .* of other coordinates": {"__init__": centred(-1)},
    r"log-determinant must be the logarithm of the derivative .*x = .*expected": {
        "log_abs_det_jacobian": lambda t, x, y: ladj(t, x, y) + 1e-3 * t.skew
    },
    r"inverse must undo the map .*x = .*found = ": {
        "_inverse": lambda t, y: inverse(t, y) + 1e-3 * t.skew
    },
    r"strictly increasing .*x = .*next_y = ": {
        "_call": lambda t, x: call(t, torch.where((x > 5) & (t.skew != 0), 10 - x, x))
    },
    r"zero params must be the identity .*x = 0, found = 1e-06": {
        "_call": lambda t, x: call(t, x) + 1e-6
    },
    r"(strictly increasing|onto the real line)": SATURATED,
    r"must have the dtype and the shape of the input, .*float64.*default torch.float32": {
        "log_abs_det_jacobian": lambda t, x, y: ladj(t, x, y).to(torch.get_default_dtype())
    },
    r"log-determinant and inverse must have the dtype and the shape": {
        "log_abs_det_jacobian": lambda t, x, y: ladj(t, x, y).sum(-1)
    },
    r"gradients of the value of the inverse must agree with differences": {
        "_inverse": lambda t, y: inverse(t, y).detach() + 0 * inverse(t, y)
    },
    r"NaN must remain NaN in the map": {"_call": lambda t, x: call(t, x).nan_to_num()},
    r"call_and_ladj must agree": {
        "call_and_ladj": lambda t, x: (t(x) + 1e-3 * t.skew, t.log_abs_det_jacobian(x, t(x)))
    },
    r"bijective = True": {"bijective": False},
    r"event_dim 0": {"domain": constraints.real_vector, "codomain": constraints.real_vector},
    r"inverse's log-determinant must be minus": with_inverse_ladj(lambda ladj: ladj),
    r"gradients of the log-derivative of the inverse must agree": with_inverse_ladj(
        lambda ladj: -ladj.detach()
    ),
    r"inverse_and_ladj must agree .*argument = ": {
        "inverse_and_ladj": lambda t, y: (inverse(t, y), ladj(t, inverse(t, y), y))
    },
}


@pytest.mark.parametrize(("message", "methods"), BROKEN.items())
def test_a_broken_transform_is_named(message, methods):
    family = SinhArcsinh()
    family.transform = type("Broken", (SinhArcsinhTransform,), methods)
    with pytest.raises(AssertionError, match=f"SinhArcsinh: .*{message}"):
        check_univariate(family)


def infinite_at_large_params(self, skew, weight):
    return SinhArcsinhTransform(torch.where(skew.abs() > 0.995, skew * 1e4, skew), weight)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"forward": Affine(bound=12.0).forward}, "log-slopes must be bounded, here by 10"),
        ({"transform": infinite_at_large_params}, "finite at large params"),
        ({"transform": lambda self, skew, weight: skew}, "return a torch Transform, got Tensor"),
        ({"num_params": True}, "num_params must be a positive int, got True"),
    ],
)
def test_a_broken_family_is_named(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_univariate(type("Broken", (SinhArcsinh,), attributes)())
