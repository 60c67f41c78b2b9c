# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_artransform.model import LogJoint
from pyro_artransform.model.coordinates.centering import non_centered, with_gaussian_sites
from pyro_artransform.model.coordinates.factors import OtherUseError, find_factors
from pyro_artransform.model.coordinates.gaussian_sites import GaussianSites, LocScale
from pyro_artransform.model.graphs.dependencies import value_and_gradient

ERRORS = torch.tensor([0.02, 0.3, 3.0, 1.0]).double()
DATA = torch.tensor([-1.0, 0.4, 2.0, 1.0]).double()
DESIGN = torch.tensor([[1.0, 0.5, -0.2, 0.1], [0.3, -1.0, 0.8, 0.0], [0.0, 0.4, 1.0, 2.0]]).double()


def centred():
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=DATA)


def multiplied():
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", 4):
        theta = tau * pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=DATA)


def horseshoe():
    """Draws in front of an event: a plate of draws vectorizes it."""
    tau = pyro.sample("tau", dist.HalfCauchy(0.5))[..., None]
    lam = pyro.sample("lam", dist.HalfCauchy(torch.ones(4)).to_event(1))
    z = pyro.sample("z", dist.Normal(torch.full((4,), 0.2), 1.5).to_event(1))
    beta = z * tau * lam
    pyro.sample("y", dist.Normal(beta @ DESIGN.T, 0.5).to_event(1), obs=DATA[:3])


def by_vmap():
    """A matrix times a vector mixes draws in front of it."""
    tau = pyro.sample("tau", dist.HalfCauchy(0.5))
    z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(DESIGN @ (tau * z), 0.5).to_event(1), obs=DATA[:3])


def of_positive():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", 4):
        rate = pyro.sample("rate", dist.LogNormal(0.5, scale))
        pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([1.0, 0.0, 4.0, 9.0]))


def chain():
    """Locations depend on latents with Gaussian sites."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    first = pyro.sample("first", dist.Normal(0.0, scale))
    second = pyro.sample("second", dist.Normal(first, scale))
    pyro.sample("y", dist.Normal(second, 0.5), obs=torch.tensor(0.7))


def with_random_gaussian_sites(model, dtype=torch.float64):
    torch.manual_seed(0)
    log_joint = non_centered(LogJoint(model), with_shapes=True)
    size = log_joint.start.shape
    some = GaussianSites(4 * torch.rand(size, dtype=dtype), torch.randn(size, dtype=dtype))
    return log_joint.with_coordinates(log_joint.coordinates.with_gaussian_sites(some))


@pytest.mark.parametrize("strategy", [None, "loop"])
@pytest.mark.parametrize(
    "model", [centred, multiplied, horseshoe, by_vmap, of_positive, chain], ids=lambda m: m.__name__
)
def test_the_density_is_that_of_the_unconstrained_space(model, strategy):
    log_joint = with_random_gaussian_sites(model)
    if strategy is not None:
        log_joint = log_joint.evaluated(strategy=strategy)
    x = torch.randn(5, len(log_joint.start))
    u, ladj = log_joint.to_unconstrained(x)
    plain = non_centered(LogJoint(model), with_shapes=True)
    assert not torch.allclose(u, plain.to_unconstrained(x)[0])
    torch.testing.assert_close(log_joint(x), LogJoint(model)(u) + ladj)
    back, of_inverse = log_joint.from_unconstrained(u)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(of_inverse, -ladj)
    torch.testing.assert_close(log_joint.from_unconstrained(u[:1])[0], x[:1])
    for row, expected in zip(x, ladj):
        jacobian = torch.func.jacrev(lambda row: log_joint.to_unconstrained(row[None])[0][0])(row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, expected)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_a_normal_likelihood_is_found_exactly(dtype, rtol):
    """From a few points far from the posterior; e is then standard normal given all else."""
    torch.set_default_dtype(dtype)
    try:

        def model():
            tau = pyro.sample("tau", dist.HalfNormal(2.0))
            with pyro.plate("groups", 4):
                theta = pyro.sample("theta", dist.Normal(0.3, tau))
                error = ERRORS.to(dtype)
                pyro.sample("y", dist.Normal(theta, error), obs=DATA.to(dtype))

        log_joint = non_centered(LogJoint(model), with_shapes=True)
        torch.manual_seed(0)
        x = 0.3 * torch.randn(40, 5)
        found = with_gaussian_sites(log_joint, x, value_and_gradient(log_joint, x)[1])
        precision, shift = found.coordinates.gaussian_sites
        expected = ERRORS.to(dtype) ** -2
        torch.testing.assert_close(precision[1:], expected, rtol=rtol, atol=0.0)
        torch.testing.assert_close(shift[1:], expected * DATA.to(dtype), rtol=rtol, atol=0.0)
        assert precision[0] == 0
        _, gradient = value_and_gradient(found, x)
        torch.testing.assert_close(gradient[:, 1:], -x[:, 1:], rtol=100 * rtol, atol=100 * rtol)
        # the same, from these Gaussian sites
        again = with_gaussian_sites(found, x, gradient).coordinates.gaussian_sites
        torch.testing.assert_close(again.precision, precision, rtol=10 * rtol, atol=0.0)
    finally:
        torch.set_default_dtype(torch.float64)


def test_where_draws_hardly_tell_a_precision_is_that_of_its_site():
    """The gradient of the third element is noise alone: its own regression finds nothing."""
    torch.manual_seed(0)
    z, scale = torch.randn(200, 3), torch.tensor([1.0, 1.0, 1e-3]).expand(200, 3)
    of_likelihood = -2 * scale * (scale * z) + torch.tensor([0.0, 0.0, 1.0]) * torch.randn(200, 3)
    none, prior = GaussianSites(*torch.zeros(2, 3)), LocScale(torch.zeros(200, 3), scale)
    found = none.refitted(z, of_likelihood - z, prior, [3])
    torch.testing.assert_close(found.precision, torch.full((3,), 2.0), rtol=1e-2, atol=0.0)
    alone = none.refitted(z, of_likelihood - z, prior, [1, 1, 1])
    assert abs(float(alone.precision[2]) - 2.0) > 1.0


def test_a_likelihood_that_is_not_concave_has_no_gaussian_site():
    z, ones = torch.randn(50, 1), torch.ones(50, 1)
    found = GaussianSites(*torch.zeros(2, 1)).refitted(
        z, 0.5 * z - z, LocScale(0 * ones, ones), [1]
    )
    assert found.precision.tolist() == [0.0] == found.shift.tolist()


def factors_of(statement):
    """The factors that are found in a statement with the standard normal z, and two others."""

    def model():
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        lam = pyro.sample("lam", dist.HalfNormal(1.0).expand((3,)).to_event(1))
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(statement(z, tau, lam), 1.0).to_event(1), obs=torch.ones(3))

    log_joint = non_centered(LogJoint(model), with_shapes=True)
    return log_joint.coordinates.factors.get("z", 0)


@pytest.mark.parametrize(
    ("statement", "number"),
    [
        (lambda z, tau, lam: z * tau * lam, 2),
        (lambda z, tau, lam: tau * lam * z, 1),
        (lambda z, tau, lam: torch.mul(tau, z) + lam, 1),
        (lambda z, tau, lam: 2.0 * z * tau, 2),
        (lambda z, tau, lam: (z * tau).exp() * lam, 1),
        (lambda z, tau, lam: pyro.deterministic("beta", z * tau) * lam, 1),
        (lambda z, tau, lam: z * torch.ones(z.shape) * tau, 2),
        (lambda z, tau, lam: z * tau + z, 0),
        (lambda z, tau, lam: z * z * tau, 0),
        (lambda z, tau, lam: z[..., [2, 0, 1]] * tau, 0),
        (lambda z, tau, lam: z / tau, 0),
        (lambda z, tau, lam: torch.stack([z * tau, z * lam]).sum(0), 0),
        (lambda z, tau, lam: z.clone().mul_(tau), 0),
        (lambda z, tau, lam: (z[..., None] * lam).sum(-1), 0),
    ],
)
def test_factors_of_a_latent(statement, number):
    assert factors_of(statement) == number


@pytest.mark.parametrize(
    "prior",
    [
        dist.HalfNormal(1.0),
        dist.LogNormal(0.0, 1.0),
        dist.Normal(0.0, 1.0).mask(False),
        dist.Beta(1.0, 2.0),
    ],
    ids=lambda prior: type(prior).__name__,
)
def test_what_has_no_factors(prior):
    def model():
        z, tau = pyro.sample("z", prior), pyro.sample("tau", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(z * tau, 1.0), obs=torch.tensor(1.0))

    assert not non_centered(LogJoint(model), with_shapes=True).coordinates.factors


def test_a_scaled_prior_has_no_factors():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(2 * z, 1.0), obs=torch.tensor(1.0))

    values = {"z": torch.tensor(0.3)}
    assert find_factors(model, values, ["z"]) == {"z": 1}
    assert find_factors(pyro.poutine.scale(model, 2.0), values, ["z"]) == {}


@pytest.mark.parametrize("other", [lambda z: z.square(), lambda z: torch.tensor(0.0)])
def test_a_latent_that_is_used_in_another_way_later(other):
    """The model squares the latent, or does not use it at all."""
    is_first = True

    def model():
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z * tau if is_first else other(z), 1.0), obs=DATA)

    log_joint = with_random_gaussian_sites(model)
    assert log_joint(torch.zeros(3, 5)).isfinite().all()
    is_first = False
    with pytest.raises(OtherUseError, match="expected the model to multiply these latents"):
        log_joint(torch.zeros(3, 5))
