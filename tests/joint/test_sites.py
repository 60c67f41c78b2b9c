# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_artransform.joint import Latents, LogJoint
from pyro_artransform.joint.sites import same_support
from tests.joint import models

SHAPES = {
    "probs": (3,),
    "corr": (3, 3),
    "unit": (),
    "rates": (2, 3),
    "simplex": (2, 4),
}


@pytest.fixture
def latents():
    return Latents.from_trace(poutine.trace(models.supports).get_trace())


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_there_and_back(latents, batch):
    z = torch.randn(*batch, latents.latent_dim)
    values, ladj = latents.constrain_with_ladj(z)
    assert {name: tuple(v.shape) for name, v in values.items()} == {
        name: batch + shape for name, shape in SHAPES.items()
    }
    for name, value in latents.constrain(z).items():
        assert torch.equal(value, values[name])
        assert latents.sites[name].bijection.codomain.check(value).all()
    assert torch.allclose(latents.unconstrain(values), z)
    assert ladj.shape == batch


def test_log_determinant(latents):
    """Simplices and factors of correlation matrices by their free coordinates."""
    z = torch.randn(latents.latent_dim)
    total = 0.0
    for name, part in latents.split(z).items():
        bijection = latents.sites[name].bijection
        total = total + bijection.log_abs_det_jacobian(part, bijection(part)).sum()
    assert torch.allclose(latents.constrain_with_ladj(z)[1], total)


def test_log_determinant_of_scalars_by_differentiation():
    latents = Latents.from_trace(poutine.trace(models.one_plate).get_trace())
    z = torch.randn(latents.latent_dim)

    def all_values(z):
        return torch.cat([value.flatten() for value in latents.constrain(z).values()])

    jacobian = torch.autograd.functional.jacobian(all_values, z)
    assert torch.allclose(latents.constrain_with_ladj(z)[1], jacobian.slogdet().logabsdet)


@pytest.mark.parametrize("model", [models.supports, models.nested_plates, models.mixed_dtypes])
def test_packs_as_pyro_does(model):
    guide = AutoDiagonalNormal(model)
    guide()
    latents = Latents.from_trace(guide.prototype_trace)
    z = torch.randn(guide.latent_dim)
    for name, value in latents.constrain(z).items():
        theirs = guide.median()[name]
        assert value.shape == theirs.shape
    values = {site["name"]: part for site, part in guide._unpack_latent(z)}
    assert list(values) == list(latents.sites)
    for name, part in latents.split(z).items():
        assert torch.allclose(part, values[name].reshape(part.shape).to(part.dtype))


def test_dtypes_of_sites():
    latents = Latents.from_trace(poutine.trace(models.mixed_dtypes).get_trace())
    values = latents.constrain(torch.zeros(4, 3))
    assert values["single"].dtype == torch.float32
    assert values["double"].dtype == torch.float64
    assert latents.unconstrain(values).dtype == torch.float64


def test_bad_values(latents):
    values = latents.constrain(torch.zeros(5, latents.latent_dim))
    with pytest.raises(ValueError, match=r"expected the sites .*'unit'.* got"):
        latents.unconstrain({k: v for k, v in values.items() if k != "unit"})
    with pytest.raises(ValueError, match=r"'probs' of shape \(5, 3\), got \(5, 2\)"):
        latents.unconstrain({**values, "probs": values["probs"][:, :2]})


def test_same_support():
    interval, same = constraints.interval, same_support
    assert same(interval(0.0, torch.ones(2)), interval(0.0, torch.ones(2)))
    assert not same(interval(0.0, torch.ones(2)), interval(0.0, torch.tensor([1.0, 2.0])))
    assert not same(interval(0.0, 1.0), constraints.half_open_interval(0.0, 1.0))
    nested = [constraints.independent(interval(0.0, upper), 1) for upper in (1.0, 1.0, 2.0)]
    assert same(nested[0], nested[1])
    assert not same(nested[0], nested[2])
    cat = [constraints.cat([interval(0.0, upper), constraints.real]) for upper in (1.0, 1.0, 2.0)]
    assert same(cat[0], cat[1])
    assert not same(cat[0], cat[2])


def test_a_support_without_a_bijection():
    """PyTorch's own error names no site."""

    def model():
        pyro.sample("S", dist.ImproperUniform(dist.constraints.positive_definite, (), (2, 2)))

    with pytest.raises(
        ValueError, match=r"site 'S': expected a support with a bijection.*got Positive"
    ):
        LogJoint(model)


def test_sites_that_a_dtype_hardly_tells_apart(latents):
    """Near -1 numbers of float64 are 2e-16 apart; entries of Cholesky factors may stand still."""
    z = torch.randn(100, latents.latent_dim)
    assert latents.coarse_sites(z) == []
    unit = int(latents.split(torch.arange(latents.latent_dim))["unit"])
    z[:, unit] -= 38.0
    assert latents.coarse_sites(z) == ["unit"]
