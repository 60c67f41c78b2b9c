# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The assertions for third parties: they pass a right family and name what is wrong in others."""

import pytest
import torch
from torch.distributions import Transform, constraints

from pyro_artransform.testing import check_univariate
from pyro_artransform.univariate import (
    Affine,
    ElementwiseTransform,
    GatedAffine,
    Univariate,
    soft_bound,
)


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
def test_a_right_family_passes(dtype):
    check_univariate(SinhArcsinh(), dtype=dtype)


class WrongLogDet(SinhArcsinhTransform):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y) + 1e-3 * self.skew


class WrongInverse(SinhArcsinhTransform):
    def _inverse(self, y):
        return super()._inverse(y) + 1e-3 * self.skew


class Decreasing(SinhArcsinhTransform):
    def _call(self, x):
        return super()._call(torch.where((x > 5) & (self.skew != 0), 10 - x, x))


class NotIdentity(SinhArcsinhTransform):
    def _call(self, x):
        return super()._call(x) + 1e-6


class NotVolumePreservingAtZero(SinhArcsinhTransform):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y) + 1e-6


class NotOnto(SinhArcsinhTransform):
    """The identity at zero skew; else it saturates at a height of 200."""

    def _call(self, x):
        return torch.where(self.skew == 0, x, 200 * torch.tanh(x / 200))

    def _inverse(self, y):
        return torch.where(self.skew == 0, y, 200 * torch.atanh(y / 200))

    def log_abs_det_jacobian(self, x, y):
        return torch.where(self.skew == 0, 0 * x, torch.log1p(-(torch.tanh(x / 200) ** 2)))


class Float64(SinhArcsinhTransform):
    def _call(self, x):
        return super()._call(x).double()


class DefaultDtype(SinhArcsinhTransform):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y).to(torch.get_default_dtype())


class SummedLogDet(SinhArcsinhTransform):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y).sum(-1)


class DetachedInverse(SinhArcsinhTransform):
    def _inverse(self, y):
        x = super()._inverse(y)
        return x.detach() + 0 * x


class HidesNan(SinhArcsinhTransform):
    def _call(self, x):
        return super()._call(x).nan_to_num()


class Disagrees(SinhArcsinhTransform):
    def call_and_ladj(self, x):
        y = self(x)
        return y + 1e-3, self.log_abs_det_jacobian(x, y)


class NotBijective(SinhArcsinhTransform):
    bijective = False


class Vector(SinhArcsinhTransform):
    domain = codomain = constraints.real_vector


class InverseLogDet(SinhArcsinhTransform):
    """Right in itself, but its inverse says the wrong thing."""

    @property
    def inv(self):
        inverse = super().inv
        inverse.log_abs_det_jacobian = lambda y, x: self.log_abs_det_jacobian(x, y)
        return inverse


class DetachedLogDet(SinhArcsinhTransform):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y).detach()


class ReadsOtherRows(SinhArcsinhTransform):
    def __init__(self, skew, weight):
        if skew.dim() > 1:
            skew = skew - skew.mean(0)
        super().__init__(skew, weight)


class ReadsOtherCoordinates(SinhArcsinhTransform):
    def __init__(self, skew, weight):
        if skew.dim() > 1:
            skew = skew - skew.mean(-1, keepdim=True)
        super().__init__(skew, weight)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (DetachedLogDet, "of the map .*: its log-derivative has no gradient though it depends on"),
        (ReadsOtherRows, "value of the map must not depend on params or input of other rows"),
        (ReadsOtherCoordinates, "value of the map must not depend .* of other coordinates"),
        (WrongLogDet, r"log-determinant must be the logarithm of the derivative .*x = .*expected"),
        (WrongInverse, r"inverse must undo the map .*x = .*inverse = "),
        (Decreasing, r"strictly increasing .*x = .*next_y = "),
        (NotIdentity, r"zero params must be the identity .*x = 0, y = 1e-06"),
        (NotVolumePreservingAtZero, r"zero params must have log-determinant zero .*x = 0"),
        (NotOnto, r"(strictly increasing|onto the real line)"),
        (Float64, r"dtype must follow the input, torch.float32"),
        (DefaultDtype, r"dtype must follow the input"),
        (SummedLogDet, r"log-determinant must have"),
        (DetachedInverse, r"gradients of the inverse must agree with differences"),
        (HidesNan, r"NaN must stay one in the map"),
        (Disagrees, r"call_and_ladj must agree"),
        (NotBijective, r"bijective = True"),
        (Vector, r"event_dim 0"),
        (InverseLogDet, r"inverse's log-determinant must be minus"),
    ],
)
def test_a_broken_transform_is_named(transform, message):
    family = SinhArcsinh()
    family.transform = transform
    with pytest.raises(AssertionError, match=f"SinhArcsinh: .*{message}"):
        check_univariate(family)


@pytest.mark.parametrize("count", [0, 2.0, True])
def test_a_bad_number_of_params(count):
    family = SinhArcsinh()
    family.num_params = count
    with pytest.raises(AssertionError, match="num_params must be a positive int"):
        check_univariate(family)


def test_not_a_transform():
    family = SinhArcsinh()
    family.transform = lambda skew, weight: skew
    with pytest.raises(AssertionError, match="must return a torch Transform, got Tensor"):
        check_univariate(family)


def test_infinite_values_at_large_params():
    family = SinhArcsinh()
    family.transform = lambda skew, weight: SinhArcsinhTransform(
        torch.where(skew.abs() > 0.995, skew * 1e4, skew), weight
    )
    with pytest.raises(AssertionError, match="finite at large params"):
        check_univariate(family)


def test_the_documented_exception():
    with pytest.raises(AssertionError, match="zero params must be the identity"):
        check_univariate(GatedAffine())
    check_univariate(GatedAffine(), identity_at_zero=False)


class Scaled(ElementwiseTransform):
    def __init__(self, log_scale):
        super().__init__()
        self.log_scale = log_scale

    def call_and_ladj(self, x):
        return x * self.log_scale.exp(), self.log_scale + torch.zeros_like(x)

    def inverse_and_ladj(self, y):
        return y * (-self.log_scale).exp(), -self.log_scale + torch.zeros_like(y)


class WrongSignOfTheInverse(Scaled):
    def inverse_and_ladj(self, y):
        return super().inverse_and_ladj(y)[0], self.log_scale + torch.zeros_like(y)


class DetachedLogDetOfTheInverse(Scaled):
    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y)
        return x, ladj.detach()


class Scale(Univariate):
    num_params = 1

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, params):
        return self.transform(soft_bound(params[..., 0], 3.0))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (WrongSignOfTheInverse, "inverse_and_ladj must agree .*expected_ladj = "),
        (DetachedLogDetOfTheInverse, "of the inverse .*: its log-derivative has no gradient"),
    ],
)
def test_what_inverse_and_ladj_returns_itself(transform, message):
    check_univariate(Scale(Scaled))
    with pytest.raises(AssertionError, match=message):
        check_univariate(Scale(transform))


def test_global_state_is_left_alone():
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    check_univariate(SinhArcsinh())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype


class OneParameterTooMany(SinhArcsinh):
    num_params = 3

    def forward(self, params):
        skew, weight = params.unbind(-1)
        return self.transform(skew, weight.exp())


class NoInverse(SinhArcsinhTransform):
    def _inverse(self, y):
        raise NotImplementedError


class WithoutInverse(SinhArcsinh):
    transform = NoInverse


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (lambda: Affine(bound=12.0), "Affine: log-slopes must be bounded, here by 10"),
        (OneParameterTooMany, r"forward\(params\) failed for params of shape \(2, 3\): ValueError"),
        (WithoutInverse, r"its inverse failed .*NotImplementedError"),
    ],
)
def test_what_fails_names_the_contract(family, message):
    with pytest.raises(AssertionError, match=message):
        check_univariate(family())
