# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_artransform.model import Latents, LogJoint
from pyro_artransform.model.sites import Site, find_rounding, same_support
from tests.model import models

SHAPES = {"probs": (3,), "corr": (3, 3), "unit": (), "rates": (2, 3), "simplex": (2, 4)}


def latents_of(model):
    return Latents.from_trace(poutine.trace(model).get_trace())


@pytest.fixture
def latents():
    return latents_of(models.supports)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_there_and_back(latents, batch):
    z = torch.randn(*batch, latents.latent_dim)
    values, ladj = latents.constrain_with_ladj(z)
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        name: batch + shape for name, shape in SHAPES.items()
    }
    for name, value in latents.constrain(z).items():
        assert torch.equal(value, values[name])
        assert latents.sites[name].support.check(value).all()
    assert torch.allclose(latents.unconstrain(values), z)
    back, again = latents.unconstrain_with_ladj(values)
    assert torch.allclose(back, z)
    assert torch.allclose(again, ladj)
    assert ladj.shape == batch


ANGLES = {
    "plain": lambda: dist.VonMises(10.0, 0.1),
    "vector": lambda: dist.VonMises(torch.zeros(3), 1.0).to_event(1),
    "expanded": lambda: dist.VonMises(0.0, 1.0).expand([3]).mask(torch.tensor([True, False, True])),
    "two": lambda: dist.SineBivariateVonMises(0.0, 1.0, 2.0, 3.0, correlation=0.5),
    "skewed": lambda: dist.SineSkewed(
        dist.VonMises(torch.zeros(2), 1.0).to_event(1), torch.zeros(2)
    ),
}


@pytest.mark.parametrize("name", ANGLES)
def test_an_angle_is_in_the_turn_of_its_samples(name):
    fn = ANGLES[name]()
    node = {"name": "angle", "fn": fn, "value": fn.sample(), "cond_indep_stack": ()}
    latents = Latents([Site.from_node(node)])
    found = latents.constrain(100 * torch.randn(50, latents.latent_dim))["angle"]
    assert found.shape == (50, *fn.shape())
    assert (found.abs() <= math.pi).all()
    assert (found > 3).any()
    assert (found < -3).any()
    draws = fn.sample((50,))
    assert torch.allclose(latents.constrain(latents.unconstrain({"angle": draws}))["angle"], draws)


@pytest.mark.parametrize("model", [models.supports, models.nested_plates, models.mixed_dtypes])
def test_packs_as_pyro_does(model):
    guide = AutoDiagonalNormal(model)
    guide()
    latents = Latents.from_trace(guide.prototype_trace)
    z, medians = torch.randn(guide.latent_dim), guide.median()
    for name, value in latents.constrain(z).items():
        assert value.shape == medians[name].shape
    values = {site["name"]: part for site, part in guide._unpack_latent(z)}
    assert list(values) == list(latents.sites)
    for name, part in latents.split(z).items():
        assert torch.allclose(part, values[name].reshape(part.shape).to(part.dtype))


@pytest.mark.parametrize("method", ["unconstrain", "unconstrain_with_ladj"])
def test_bad_values(latents, method):
    unconstrain = getattr(latents, method)
    values = latents.constrain(torch.zeros(5, latents.latent_dim))
    with pytest.raises(ValueError, match=r"expected the sites .*'unit'.* got"):
        unconstrain({k: v for k, v in values.items() if k != "unit"})
    with pytest.raises(ValueError, match=r"'probs' of shape \(5, 3\), got \(5, 2\)"):
        unconstrain({**values, "probs": values["probs"][:, :2]})
    with pytest.raises(ValueError, match=r"'rates' of shape \(5, 2, 3\), got \(3, 2, 3\)"):
        unconstrain({**values, "rates": values["rates"][:3]})


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.tolist])
def test_arrays_and_lists(latents, convert):
    values = latents.constrain(torch.randn(5, latents.latent_dim))
    expected = latents.unconstrain_with_ladj(values)
    got = latents.unconstrain_with_ladj({k: convert(v) for k, v in values.items()})
    assert all(map(torch.equal, got, expected))
    for bad in ("high", [[1.0], [1.0, 2.0]]):
        with pytest.raises(ValueError, match=r"values\['unit'\]: expected an array of numbers"):
            latents.unconstrain_with_ladj({**values, "unit": bad})


@pytest.mark.parametrize("batch", [(0,), (3, 0), (0, 2)])
def test_no_draws(latents, batch):
    values = latents.constrain(torch.zeros(*batch, latents.latent_dim))
    z, ladj = latents.unconstrain_with_ladj(values)
    assert z.shape == (*batch, latents.latent_dim)
    assert ladj.shape == batch


def test_values_outside_the_support(latents):
    values = latents.constrain(torch.zeros(5, latents.latent_dim))
    outside = {**values, "unit": values["unit"].clone()}
    outside["unit"][3] = 2.5
    with pytest.raises(
        ValueError, match=r"expected 'unit' inside its support Interval\(.*\), got 2.5"
    ):
        latents.unconstrain_with_ladj(outside)
    pyro.enable_validation(False)
    assert latents.unconstrain_with_ladj(outside)[1].shape == (5,)


def test_same_support():
    interval, same = constraints.interval, same_support
    assert same(interval(0.0, torch.ones(2)), interval(0.0, torch.ones(2)))
    assert not same(interval(0.0, torch.ones(2)), interval(0.0, torch.tensor([1.0, 2.0])))
    assert not same(interval(0.0, 1.0), constraints.half_open_interval(0.0, 1.0))
    for nested in (
        lambda upper: constraints.independent(interval(0.0, upper), 1),
        lambda upper: constraints.cat([interval(0.0, upper), constraints.real]),
    ):
        assert same(nested(1.0), nested(1.0))
        assert not same(nested(1.0), nested(2.0))


def test_sites_that_a_dtype_hardly_tells_apart(latents):
    """Near -1 numbers of float64 are 2e-16 apart; entries of Cholesky factors may stand still."""
    z = torch.randn(100, latents.latent_dim)
    assert find_rounding(latents, z).coarse == []
    unit = int(latents.split(torch.arange(latents.latent_dim))["unit"])
    z[:, unit] -= 38.0
    assert find_rounding(latents, z).coarse == ["unit"]


def test_real_vectors_are_unconstrained_and_have_no_edge():
    """Values of -800, as of an income, are no logarithms of small numbers."""

    def model():
        pyro.sample("coef", dist.Normal(torch.zeros(3), 1e3).to_event(1))
        pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))

    latents = LogJoint(model).latents
    assert [site.is_unconstrained for site in latents.sites.values()] == [True, False]
    z = torch.full((100, 5), -800.0) + torch.randn(100, 5)
    assert find_rounding(latents, z).at_edge == ["scale"]
