# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
import re

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.diagnostics.convergence import GOOD_RHAT, MANY_DIVERGENT
from pyro_artransform.model import LogJoint
from pyro_artransform.model.coordinates.centering import non_centered
from pyro_artransform.sampling import Ensemble, StartError, StopReason, starts, target
from pyro_artransform.sampling.trajectories import share_of_divergent
from tests.inference import models
from tests.sampling.densities import moments_are, nowhere, two_modes


def ensemble_of(model, num_samples=400, num_chains=None):
    """Chains from nothing."""
    log_joint = non_centered(LogJoint(model), with_shapes=True)
    return Ensemble(log_joint, num_samples, num_chains)


SCALE_TRIL = ((2.0, 0.0, 0.0), (1.5, 0.5, 0.0), (-0.3, 0.2, 0.01))


def conjugate():
    """A linear regression with columns of other units."""
    factor = torch.tensor(SCALE_TRIL)
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(z @ factor.T, 1.0).to_event(1), obs=torch.tensor([1.0, -2.0, 3.0]))


def test_means_and_sds_of_a_conjugate_model():
    found = ensemble_of(conjugate)
    convergence = found.run(400)
    assert found.end is StopReason.ENOUGH
    assert convergence.is_enough(400)
    assert float(convergence.rhat.max()) <= GOOD_RHAT
    factor = torch.tensor(SCALE_TRIL)
    covariance = torch.linalg.inv(torch.eye(3) / 4 + factor.T @ factor)
    mean = covariance @ factor.T @ torch.tensor([1.0, -2.0, 3.0])
    moments_are(found, mean, covariance.diagonal().sqrt())
    # the transient is left out of all that is told
    count, size, dim = found.draws.shape
    assert (count, dim) == (found.num_chains, 3)
    assert size == found.num_trajectories - found.num_trajectories // 3 == len(found.infos)
    assert size < 200
    assert found.num_gradients > count * found.num_trajectories
    acceptance = torch.stack([info.acceptance for info in found.infos]).mean()
    assert 0.6 < acceptance < 0.95
    # more draws go on where those ended
    assert found.run(1000).is_enough(1000)
    assert found.num_trajectories > size


def test_strong_and_weak_data_of_one_site():
    """The coordinates have the precision of each datum, and few gradients are needed."""
    errors = torch.tensor([0.02] * 4 + [3.0] * 4)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample(
                "y", dist.Normal(theta, errors), obs=torch.tensor([-1.0, 0.0, 2.0, 1.0] * 2)
            )

    found = ensemble_of(model)
    found.run(400)
    assert found.end is StopReason.ENOUGH
    precision = found.log_joint.coordinates.gaussian_sites.precision[2:]
    assert torch.allclose(precision, errors**-2, rtol=1e-3)
    assert found.num_gradients < 40_000  # 18,000; a million with lambda of 0
    theta = found.draws[..., 2:6].flatten(0, 1)
    assert torch.allclose(theta.mean(0), torch.tensor([-1.0, 0.0, 2.0, 1.0]), atol=0.01)
    assert torch.allclose(theta.std(0), torch.tensor(0.02), rtol=0.2)


def test_uses_that_no_function_of_torch_shows():
    """A scripted function hides that a latent is not only multiplied: its density says so."""

    @torch.jit.script
    def penalty(z: torch.Tensor) -> torch.Tensor:
        return -2.0 * z.square()

    def model():
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("hidden", penalty(z))
            pyro.sample("y", dist.Normal(tau * z, 0.1), obs=torch.tensor([-1.0, 0.0, 2.0, 1.0]))

    found = ensemble_of(model)
    assert found.log_joint.coordinates.factors == {"z": 1}
    found.run(50)
    assert found.end is StopReason.ENOUGH
    assert found.log_joint.coordinates.gaussian_sites is None


@pytest.mark.parametrize(
    ("model", "num_samples", "num_chains", "expected"),
    [
        (conjugate, 50, None, (16, 8)),
        (conjugate, 400, None, (32, 8)),
        (conjugate, math.inf, None, (64, 8)),
        (conjugate, 400, 24, (24, 8)),
        (conjugate, 400, 12, (12, 4)),
        (conjugate, 400, 6, (6, 6)),
        (models.branching, 400, None, (starts.SUPERCHAINS, 8)),  # by a loop few
    ],
)
def test_numbers_of_chains(model, num_samples, num_chains, expected):
    found = ensemble_of(model, num_samples, num_chains)
    assert (found.num_chains, found.num_superchains) == expected


def test_chains_of_a_superchain_begin_at_one_point():
    found = ensemble_of(conjugate, num_chains=24)
    starts = found._start().base.reshape(8, 3, 3)
    assert (starts == starts[:, :1]).all()
    assert len(starts[:, 0].unique(dim=0)) == 8


def test_steps_that_diverge_are_halved():
    """The data bend the posterior: at its ends steps have to be smaller than in the middle."""

    def bent():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 1] - z[..., 0] ** 2, 1.0), obs=torch.tensor(0.0))

    found = ensemble_of(bent)
    convergence = found.run(400)
    assert found.end is StopReason.ENOUGH
    assert share_of_divergent(found.infos) <= MANY_DIVERGENT
    grid = torch.linspace(-6, 6, 4001)
    mass = (-grid.square() / 8 - grid**4 / 10).exp().cumsum(0)
    for share in (0.03, 0.97):
        quantile = grid[int((mass / mass[-1] < share).sum())]
        below = float((found.draws[..., 0] < quantile).double().mean())
        # four standard errors of so many effective draws
        assert below == pytest.approx(share, abs=4 * (0.03 * 0.97 / convergence.min_ess) ** 0.5)


def test_chains_that_begin_anew_stay_there_in_other_coordinates():
    """The states of a round are from before lost chains were moved."""
    found = ensemble_of(conjugate, num_chains=24)
    found._warm_up()
    states = [found._state] * 8
    moved = found._state.at(torch.arange(23, -1, -1))
    found._state = moved
    found._go_on_in(target.TransformedDensity(found.log_joint), states)
    torch.testing.assert_close(found._state.latent, moved.latent)


@pytest.mark.parametrize("share", [1e-9, 1e-4])
def test_a_mode_without_mass_has_no_draws(share):
    """Half of the starts lead there: their chains begin anew, or jump to the other one."""
    found = ensemble_of(two_modes(2, 20.0, share))
    found.run(400)
    assert found.end is StopReason.ENOUGH
    assert (found.draws < 0).double().mean() < 0.01
    moments_are(found, torch.full((2,), 10.0), torch.ones(2))


def test_too_many_trajectories():
    found = ensemble_of(conjugate)
    convergence = found.run(10**6, most=20)
    assert found.end is StopReason.LIMIT
    assert not convergence.is_enough(10**6)
    # the most are about half as many more
    assert found.num_trajectories <= 40


def test_starts_without_a_density_are_those_of_other_chains():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("wall", torch.where(z[..., 0] > 0, torch.nan, 0.0))

    with pyro.validation_enabled(False):
        found = ensemble_of(model)
        assert found.run(400).is_enough(400)
    first = found.draws[..., 0]
    assert (first <= 0).all()
    mean = -((2 / math.pi) ** 0.5)
    assert abs(first.mean() - mean) < 5 * (1 - mean**2) ** 0.5 / 400**0.5


def without_gradient():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("root", (0 * z).sqrt().sum(-1))


def detached():
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    pyro.factor("data", -z.detach().square().sum(-1))


def excluded():
    """A prior that ends at one, and a datum beyond."""
    bound = pyro.sample("bound", dist.Uniform(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Uniform(0.0, bound), obs=torch.tensor([0.5, 2.0, 0.3]))


def within_a_point():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("w", dist.Normal(torch.where(z == 9.0, z, torch.nan), 1.0))


EXCLUDES = "The prior may exclude the data: check supports, priors and data"


@pytest.mark.parametrize(
    ("model", "words", "is_of_data"),
    [
        (nowhere, "got none of 32: wall is not finite", True),
        (excluded, "got none of 32: y is not finite", True),
        (without_gradient, "got none of 32: the gradient is not finite", True),
        (within_a_point, "got none of 32: w is not finite", False),
        (detached, "a log density with a gradient with respect to the latents, got one", None),
    ],
)
def test_why_no_chain_can_start_is_explained(model, words, is_of_data):
    with pyro.validation_enabled(False), pytest.raises(StartError) as caught:
        ensemble_of(model).run(1)
    found = str(caught.value)
    assert words in found
    if is_of_data is None:
        assert "torch.no_grad, or detach" in found
        return
    assert "Tried were the model's initial values, quantiles of the prior, the origin" in found
    assert re.search(r"points uniform in \(-2, 2\) there, such as (z|bound) = \[-?\d\.\d", found)
    # numbers of four significant digits
    assert not re.search(r"\d{8}", found)
    assert (EXCLUDES in found) == is_of_data
    assert found.endswith(
        "Give an init_loc_fn with values at which density and gradient are finite"
    )


@pytest.mark.parametrize("distance", [0.0, 9.0])
def test_a_density_in_double_precision_of_latents_in_single(distance):
    """Of two modes, too, between which chains jump by proposals."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float32), 1.0).to_event(1))
        parts = [-(z.double() - loc).square().sum(-1) for loc in (-distance, distance)]
        pyro.factor("data", torch.logaddexp(*parts))

    found = ensemble_of(model)
    found.run(100)
    assert found.end is StopReason.ENOUGH
    assert found.draws.dtype == torch.float32
