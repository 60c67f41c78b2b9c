# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import init_to_value

from pyro_artransform.model import LogJoint
from pyro_artransform.model.coordinates.centering import non_centered
from pyro_artransform.sampling import StartError, State, TransformedDensity
from pyro_artransform.sampling.starts import (
    Starts,
    initial_ascent,
    overdispersed,
    select_dispersed,
    wide_normal,
)
from tests.sampling.test_mcmc import mcmc


def hierarchy():
    """Two scales, of which one is a root and the other has data alone, and a location."""
    mu = pyro.sample("mu", dist.Normal(3.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("groups", 5):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=torch.arange(5.0))


def in_units_of_the_prior(model):
    return non_centered(LogJoint(model), with_shapes=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_stratum_has_a_point(dtype):
    """At quantiles of a normal distribution that is wider than the prior, in no order."""
    wide = wide_normal(16, torch.zeros(200, dtype=dtype))
    assert wide.dtype == dtype
    assert float(wide.std()) == pytest.approx(1.3, rel=0.05)
    points = torch.special.ndtr(wide / 1.3)
    # and so has each stratum of eight one of every other point
    for part in (points, points[::2], points[1::2]):
        strata = (len(part) * part).floor().sort(0).values
        expected = torch.arange(len(part), dtype=dtype)[:, None].expand(len(part), 200)
        assert torch.equal(strata, expected)
    assert torch.corrcoef(points.T).fill_diagonal_(0.0).mean().abs() < 0.02
    assert wide_normal(5, points[0]).shape == (5, 200)


def test_without_a_hierarchy_nothing_is_held():
    """One start is the model's; every other one is at a quantile of a vague prior."""
    log_joint = in_units_of_the_prior(lambda: pyro.sample("z", dist.Normal(3.0, 1000.0)))
    starts = overdispersed(log_joint, 32)
    assert not starts.is_held.any()
    away = (starts.base - log_joint.start)[:, 0]
    assert away[1] == 0
    strata = (16 * torch.special.ndtr(away[::2] / 1300)).floor().sort().values
    assert torch.equal(strata, torch.arange(16.0))


@pytest.mark.parametrize("is_mapped", [True, False])
def test_half_of_the_superchains_start_as_in_stan(is_mapped):
    """Uniform in (-2, 2) on the unconstrained space, wherever the prior is and whatever the coordinates."""

    def model():
        pyro.sample("far", dist.Normal(3.0, 1000.0))
        pyro.sample("rate", dist.Gamma(50.0, 1e-3))
        pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 20.0, 300.0])))

    log_joint = in_units_of_the_prior(model) if is_mapped else LogJoint(model)
    points = overdispersed(log_joint, 32, 4).base
    u, _ = log_joint.to_unconstrained(points)
    assert torch.equal(points[4], log_joint.start)
    is_odd = torch.arange(128) // 4 % 2 == 1
    is_odd[4] = False
    assert (u[is_odd].abs() < 2).all()
    # of 63 points: the sd of a uniform distribution, to five standard errors
    assert (u[is_odd].mean(0).abs() < 5 * 2 / 3**0.5 / 63**0.5).all()
    assert ((u[is_odd].std(0) / (2 / 3**0.5) - 1).abs() < 5 * 0.45 / 63**0.5).all()
    assert (u[~is_odd][:, 0].abs() > 2).double().mean() > 0.9


def test_held_scales_of_all_superchains_are_quantiles():
    """In superchains of odd index, too, where a location is uniform in (-2, 2)."""
    log_joint = in_units_of_the_prior(hierarchy)
    starts = overdispersed(log_joint, 8, 4)
    held = log_joint.latents.views(starts.is_held)
    assert [name for name, part in held.items() if part.any()] == ["tau", "sigma"]
    u, _ = log_joint.to_unconstrained(starts.base)
    latents, is_odd = log_joint.latents, torch.arange(32) // 4 % 2 == 1
    is_odd[4] = False  # the model's start
    assert (latents.views(u)["mu"][is_odd].abs() < 2).all()
    # the same in a superchain, one in each of eight strata but for the model's start
    tau = latents.constrain(u)["tau"].reshape(8, 4)
    assert torch.allclose(tau[2:], tau[2:, :1].expand(6, 4))
    quantiles = torch.special.ndtr(torch.special.ndtri(torch.erf(tau / 2**0.5)) / 1.3)
    assert len((8 * quantiles[:, 1]).floor().unique()) == 8


def test_climbs_leave_root_scales_where_they_are():
    log_joint = in_units_of_the_prior(hierarchy)
    target, starts = TransformedDensity(log_joint), overdispersed(log_joint, 8)
    points, _, is_held, _ = starts
    state, preconditioner = initial_ascent(target, starts)
    assert torch.equal(state.base[:, is_held], points[:, is_held])
    assert (state.base[:, ~is_held] != points[:, ~is_held]).all()
    assert (state.log_density > target(points).log_density).all()
    assert all(part.isfinite().all() for part in preconditioner)
    assert torch.allclose(target(state.base).log_density, state.log_density)


def test_climbs_learn_how_a_density_is_stretched():
    """Sds over four orders of magnitude, by a few gradients, also with a wall that steps cross at first."""
    scale = torch.logspace(-2, 2, 5)

    def model():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (5,)))
        pyro.factor("stretched", dist.Normal(0.0, scale).log_prob(z).sum(-1))
        pyro.factor("wall", torch.where(z[..., 0] > 0.1, torch.nan, 0.0))

    points = wide_normal(8, torch.zeros(5))
    points[:, 0] = -points[:, 0].abs()
    with pyro.validation_enabled(False):
        nothing = torch.zeros(5) > 0
        starts = Starts(points, torch.ones(8, 5), nothing, nothing)
        state, preconditioner = initial_ascent(TransformedDensity(LogJoint(model)), starts)
    assert state.is_finite.all()
    found = preconditioner(torch.eye(5)).norm(dim=0) / scale
    assert found.max() / found.min() < 30


def test_a_climb_takes_back_steps_off_a_cliff():
    """Of 2,000 nats, just behind the mode: no step ends there, and smaller ones come near the mode."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (1,)))
        pyro.factor("slope", 5 * z.sum(-1) - torch.where(z[..., 0] > 0, 2000.0, 0.0))

    evaluated = []

    class Recorded(TransformedDensity):
        def __call__(self, base):
            evaluated.append(super().__call__(base))
            return evaluated[-1]

    nothing, points = torch.zeros(1) > 0, -torch.linspace(0.1, 2.0, 8)[:, None]
    starts = Starts(points, torch.ones(8, 1), nothing, nothing)
    state, _ = initial_ascent(Recorded(LogJoint(model)), starts)
    assert max(float(each.base.max()) for each in evaluated) > 0.05  # steps were tried there
    assert (state.base < 0).all()
    assert (state.base > points).all()
    assert (state.base > -0.1).all()


def test_superchains_begin_at_points_that_are_far_apart():
    """Of four points each, where one of the third leads to a far mode; one that is far below is none."""
    base = torch.zeros(16, 2)
    base[10], base[13] = 20.0, -50.0
    log_density = torch.zeros(16)
    log_density[13] = -100.0
    state = State(base, base, log_density, torch.zeros_like(base))
    chosen = select_dispersed(state, torch.ones(2), 4)
    assert chosen[1] == 4
    assert chosen[2] == 10
    assert chosen[3] != 13
    assert torch.equal(chosen // 4, torch.arange(4))


def test_density_in_the_base_space_of_a_transform():
    log_joint = LogJoint(lambda: pyro.sample("z", dist.LogNormal(1.0, 0.5)))
    target = TransformedDensity(
        log_joint, lambda x: (1 + 0.5 * x, math.log(0.5) * torch.ones(len(x)))
    )
    x = torch.linspace(-2, 2, 5)[:, None]
    state = target(x)
    assert torch.allclose(state.log_density, dist.Normal(0.0, 1.0).log_prob(x)[:, 0])
    assert torch.allclose(state.gradient, -x)
    assert torch.allclose(state.latent, 1 + 0.5 * x)
    assert not state.latent.requires_grad
    # its own coordinates by default
    assert torch.equal(TransformedDensity(log_joint)(x[:2]).latent, x[:2])
    target(x[:2])
    assert target.num_gradients == 7


def narrow():
    """A density that is finite between 4.8 and 5.2 alone, far from the prior."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    left = 1 - ((z - 5) / 0.2).square()
    pyro.factor("region", torch.where(left > 0, 4 * left.abs().log(), -torch.inf).sum(-1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.tensor([6.0, 9.0]))


AT_FIVE = init_to_value(values={"z": torch.tensor([5.0, 5.1])})


def narrow_moments():
    """The means and sds, by quadrature."""
    z = torch.linspace(4.8, 5.2, 2001)[1:-1, None]
    data = dist.Normal(z, 1.0).log_prob(torch.tensor([6.0, 9.0]))
    region = 4 * (1 - ((z - 5) / 0.2).square()).log()
    weights = (data + dist.Normal(0.0, 1.0).log_prob(z) + region).softmax(0)
    mean = (weights * z).sum(0)
    return mean, (weights * (z - mean).square()).sum(0).sqrt()


def test_a_start_that_the_user_gives():
    with pytest.raises(StartError, match=r"region is not finite.* Give an init_loc_fn"):
        mcmc(narrow, draws=100)
    chains = mcmc(narrow, draws=400, init_loc_fn=AT_FIVE)
    assert chains.trusted, chains
    (mean, sd), draws = narrow_moments(), chains.by_chain["z"].flatten(0, 1)
    assert ((draws.mean(0) - mean).abs() < 5 * sd / chains.ess["z"].sqrt()).all()
    assert ((draws.std(0) / sd - 1).abs() < 5 / chains.ess["z"].sqrt()).all()


def test_a_vague_prior_whose_quantiles_have_no_density():
    """Of a Poisson regression: the posterior is nearly the Gaussian of the maximum likelihood."""
    x = torch.randn(200, 2)
    y = torch.poisson((2 + x @ torch.tensor([0.5, -0.3])).exp())

    def model():
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1000.0))
        with pyro.plate("columns", 2):
            slopes = pyro.sample("slopes", dist.Normal(0.0, 1000.0))
        with pyro.plate("rows", 200):
            pyro.sample("y", dist.Poisson((intercept + x @ slopes).exp()), obs=y)

    chains = mcmc(model, draws=400)
    assert chains.trusted, chains
    columns, beta = torch.cat([torch.ones(200, 1), x], 1), torch.zeros(3)
    for _ in range(50):
        rate = (columns @ beta).exp()
        covariance = torch.linalg.inv(columns.T @ (rate[:, None] * columns))
        beta = beta + covariance @ columns.T @ (y - rate)
    draws = chains.draws
    found = torch.cat([draws["intercept"][:, None], draws["slopes"]], 1)
    # of 1,500 counts: a few percent of an sd beside the Monte Carlo error
    sd = covariance.diagonal().sqrt()
    assert ((found.mean(0) - beta).abs() < (5 / 20 + 0.05) * sd).all()
    assert ((found.std(0) / sd - 1).abs() < 5 / 800**0.5 + 0.03).all()


@pytest.mark.parametrize("make", [lambda a: dist.Pareto(a, 3.0), lambda a: dist.Uniform(0.0, a)])
def test_a_support_that_depends_on_another_latent_is_refused(make):
    def model():
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        b = pyro.sample("b", make(a))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(
        ValueError, match=r"support of site 'b' depends on other latents: .*u ~ Unif"
    ):
        mcmc(model, progress=False)
