# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The assertions for third parties: they pass what is right, and name what is wrong in others."""

import pytest
import torch
from torch import nn
from torch.distributions import Transform, constraints

from pyro_artransform.flows.conditioners import Conditioner, MaskedMLP
from pyro_artransform.flows.transforms import AutoregressiveTransform, ConditionedUnivariate
from pyro_artransform.flows.univariate import (
    Affine,
    MonotonicAffineTransform,
    Univariate,
    soft_bound,
)
from pyro_artransform.testing import check_conditioner, check_transform, check_univariate

# Families


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


# of the family itself
FAMILY = {
    r"log-slopes must be bounded, here by 10": {"forward": Affine(bound=12.0).forward},
    r"finite at large params": {
        "transform": lambda self, skew, weight: SinhArcsinhTransform(
            torch.where(skew.abs() > 0.995, skew * 1e4, skew), weight
        )
    },
    r"return a torch Transform, got Tensor": {"transform": lambda self, skew, weight: skew},
    r"num_params must be a positive int, got True": {"num_params": True},
}
FAMILY |= {
    message: {"transform": type("Broken", (SinhArcsinhTransform,), methods)}
    for message, methods in BROKEN.items()
}


@pytest.mark.parametrize(("message", "attributes"), FAMILY.items())
def test_a_broken_family_is_named(message, attributes):
    with pytest.raises(AssertionError, match=f"Broken: .*{message}"):
        check_univariate(type("Broken", (SinhArcsinh,), attributes)())


# Conditioners


class RunningSum(Conditioner):
    def __init__(self, read=lambda x, before: before, depth=4):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1))
        self.read, self.depth = read, depth

    def forward(self, x, context=None):
        before = nn.functional.pad(x.cumsum(-1), (1, 0))[..., :-1]
        return self.read(x, before)[..., None] * self.weight


def test_a_right_conditioner_passes_and_a_depth_that_is_too_small_does_not():
    for depth in (None, 5):
        check_conditioner(lambda depth=depth: RunningSum(depth=depth), 4)
    with pytest.raises(AssertionError, match="depth: it states 2, but 4 coordinates are on the"):
        check_conditioner(lambda: RunningSum(depth=2), 4)


FAULTS = {
    r"autoregressive: .* \[\[0, 3\], \[1, 2\]\]": lambda x, before: before + x.detach().flip(-1),
    r"autoregressive: .* \[\[0, 0\], \[1, 1\], \[2, 2\], \[3, 3\]\]": (
        lambda x, before: before + (x > 0).to(x)
    ),
    r"autoregressive: .* for \(i, j\) in \[\[0, 0\], \[1, 1\], \[2, 2\], \[3, 3\]\]": (
        lambda x, before: before + torch.where(x < -6, x, 0.0)
    ),
    r"graph: .* do not depend on x_j": lambda x, before: 0 * before,
    r"random: the same x gives different values": lambda _, before: nn.functional.dropout(
        before, 0.5
    ),
    r"batch: a row alone gives a different value": (
        lambda x, before: before - x.reshape(-1, 4).mean(0).detach()
    ),
}


@pytest.mark.parametrize(("message", "read"), FAULTS.items())
def test_a_fault_of_a_conditioner_is_named(message, read):
    with pytest.raises(AssertionError, match=message):
        check_conditioner(lambda: RunningSum(read), 4)


# Transforms


class DetachedLogDet(MonotonicAffineTransform):
    def call_and_ladj(self, x):
        y, ladj = super().call_and_ladj(x)
        return y, ladj.detach()


class Detached(nn.Module):
    """An affine meta with one of its outputs without gradients."""

    def __init__(self, transform):
        super().__init__()
        self.meta = ConditionedUnivariate(MaskedMLP(3, 2, 8), Affine())
        self.transform = transform

    def forward(self, x):
        affine = self.meta(x)
        return self.transform(affine.loc, affine.log_scale)


class Twice(nn.Module):
    """A meta that registers its network under a second name."""

    def __init__(self):
        super().__init__()
        self.meta = ConditionedUnivariate(MaskedMLP(3, 2, 8), Affine())
        self.network = self.meta.conditioner

    def forward(self, x):
        return self.meta(x)


BROKEN_METAS = {
    r"gradient of the log-derivative in the parameters: .* expected to be zero": (
        lambda: Detached(DetachedLogDet)
    ),
    r"gradient of the value in the parameters: Jacobian mismatch": lambda: Detached(
        lambda shift, log_scale: MonotonicAffineTransform(shift.detach(), log_scale)
    ),
    r"parameters: one of .* is there twice": Twice,
}


@pytest.mark.parametrize(("message", "make"), BROKEN_METAS.items())
def test_a_fault_of_a_transform_is_named(message, make):
    """Gradients that are missing are named whatever the values are."""
    with pytest.raises(AssertionError, match=message):
        check_transform(lambda: AutoregressiveTransform(make()), 3)
