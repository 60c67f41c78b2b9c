# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import init_to_value

from pyro_artransform.inference.config import InitializationConfig
from pyro_artransform.inference.initialization.gaussians import Gaussians
from pyro_artransform.inference.initialization.initial_guide import (
    UNCHANGED,
    GaussianSearch,
    _start_at,
    find_initial_guide,
)
from pyro_artransform.joint import LogJoint
from tests.inference import models
from tests.inference.models import small

DEFAULTS = InitializationConfig()


def start_of(model, guide, config=DEFAULTS):
    guide.set_up()
    return find_initial_guide(LogJoint(model), model, guide, config)


def points_of(model, center, num_points=12, run=None):
    """The points, and the log joint density that they are of."""
    log_joint = LogJoint(model)
    search = GaussianSearch(log_joint, run or model, replace(DEFAULTS, num_points=num_points))
    return search.points(center), log_joint


def elbo(model, guide, count=2000):
    with torch.no_grad():
        z, log_q = guide.rsample_and_log_prob(count)
        return (LogJoint(model)(z) - log_q).mean().item()


def state(guide):
    return {name: value.clone() for name, value in guide.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_raw_scales():
    """Columns of scale 1e4 and 1e-4: the start is as good as a Gaussian can be."""
    guide = small(models.raw_scales)
    found = start_of(models.raw_scales, guide)
    truth = models.raw_scales_evidence()
    assert truth - 1 < found.elbo < truth + 0.1
    assert truth - 1 < elbo(models.raw_scales, guide) < truth + 0.1
    assert found.modes.converged.any()


def test_neck_of_a_funnel_is_no_place_to_start(quick):
    """The mode of a funnel is in its neck: what is chosen has the larger ELBO."""
    guide = small(models.funnel)
    found = start_of(models.funnel, guide, quick.initialization)
    at_mode = small(models.funnel)
    at_mode.set_up()
    best = found.modes.value.argmax()
    gaussian = found.modes.gaussians.take(best)
    at_mode.start_at(gaussian.loc, gaussian.scale_tril)
    assert elbo(models.funnel, guide) > elbo(models.funnel, at_mode) + 1
    assert elbo(models.funnel, guide) > -3


def test_no_candidate_loses_to_the_noise_of_a_wide_guide():
    """The standard error of its ELBO is as large as the ELBO, by a single draw."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Poisson(z.exp()), obs=torch.tensor(100.0))

    torch.manual_seed(0)
    assert start_of(model, small(model, init_scale=10.0)).name != UNCHANGED


def test_heavier_of_two_modes():
    model = models.two_modes(1, 20.0, 0.1)
    guide = small(model, init_loc_fn=init_to_value(values={"z": torch.tensor([-1.0])}))
    start_of(model, guide)
    draws = guide.sample_posterior(100)["z"]
    assert (draws - 20).abs().max() < 6


@pytest.mark.parametrize("is_gaussian", [True, False])
def test_a_guide_that_is_good_already_stays_as_it_is(is_gaussian, quick):
    """Of a Gaussian its own Gaussian, and of another posterior a flow, which is worth more than any."""
    model = models.gaussian if is_gaussian else models.regression
    guide = small(model)
    guide.set_up()
    if is_gaussian:
        guide.start_at(torch.ones(3), torch.tensor(models.SCALE_TRIL))
    else:
        optimizer = torch.optim.Adam(guide.parameters(), 0.02)
        log_joint = LogJoint(model)
        for _ in range(150):
            z, log_q = guide.rsample_and_log_prob(32, path=True)
            optimizer.zero_grad()
            (log_q - log_joint(z)).mean().backward()
            optimizer.step()
    before = state(guide)
    assert start_of(model, guide, quick.initialization).name == UNCHANGED
    assert same(before, state(guide))


def test_starts_that_are_not_finite_are_skipped(quick):
    """The density is NaN around where the guide is, and at most of the candidates."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.full((2,), 3.0), 1.0).to_event(1))
        pyro.factor("root", 0 * (z[..., 0] - 1).sqrt())

    guide = small(model, init_loc_fn=init_to_value(values={"z": torch.zeros(2)}))
    with pyro.validation_enabled(False):
        found = start_of(model, guide, quick.initialization)
    assert found.name != UNCHANGED
    assert torch.tensor(found.elbo).isfinite()
    assert all(value.isfinite().all() for value in guide.parameters())
    assert (guide.sample_posterior(100)["z"].mean(0) - 3).abs().max() < 1


def test_a_model_without_gradients(quick):
    @torch.no_grad()
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    guide = small(model)
    guide.set_up()
    with pytest.raises(ValueError, match=r"got one without: does it run in torch\.no_grad"):
        find_initial_guide(LogJoint(model), model, guide, quick.initialization)


def test_nothing_finite_names_the_site(quick):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("fine", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        pyro.sample("broken", dist.Normal(z * torch.nan, 1.0), obs=torch.tensor(0.0))

    guide = small(model)
    with pyro.validation_enabled(False):
        guide.set_up()
    with pytest.raises(ValueError, match=r"finite log density.*broken is not finite") as error:
        find_initial_guide(LogJoint(model), model, guide, quick.initialization)
    assert "fine" not in str(error.value)


def test_diagonal_guide():
    guide = small(models.gaussian, full_rank=False)
    start_of(models.gaussian, guide)
    precision = torch.cholesky_inverse(torch.tensor(models.SCALE_TRIL))
    best = dist.Normal(torch.ones(3), precision.diagonal().rsqrt()).to_event(1)
    target = dist.MultivariateNormal(torch.ones(3), scale_tril=torch.tensor(models.SCALE_TRIL))
    expected = -torch.distributions.kl_divergence(
        dist.MultivariateNormal(best.mean, covariance_matrix=best.variance.diag()), target
    )
    assert abs(elbo(models.gaussian, guide) - expected) < 0.2


def test_points_start_with_the_center_and_the_median():
    center = torch.tensor([5.0, 2.0])
    points, log_joint = points_of(models.regression, center, 12)
    assert points.shape == (12, 2)
    assert torch.equal(points[0], center)
    assert torch.equal(points[1], log_joint.start)
    assert len({tuple(point) for point in points.tolist()}) == 12
    assert (points - center).norm(dim=-1).max() > 4


def test_draws_of_the_prior():
    def model():
        pyro.sample("z", dist.Normal(1000.0, 1.0))

    points, _ = points_of(model, torch.zeros(1), 12)
    assert ((points - 1000).abs() < 10).sum() >= 3


def test_points_without_a_density_are_moved_to_the_center():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 100.0))
        pyro.factor("near", torch.where(z.abs() < 1, 0 * z, torch.nan * z))

    points, log_joint = points_of(model, torch.full((1,), 0.5), 12)
    assert len(points) == 12
    assert log_joint(points).isfinite().all()


def test_points_where_the_model_refuses_draws_of_its_prior():
    def refusing():
        raise ValueError("no such draw")

    points, log_joint = points_of(models.regression, torch.zeros(2), 5, run=refusing)
    assert torch.equal(points[2], log_joint.start)
    assert len(points) == 5


def test_guide_without_correlations_stays_where_it_is_better():
    guide = small(models.gaussian, full_rank=False)
    guide.set_up()
    log_joint = LogJoint(models.gaussian)
    gaussian = Gaussians(torch.full((1, 3), 1e3), torch.tensor(models.SCALE_TRIL)[None])
    before = state(guide)
    assert not _start_at(guide, gaussian, log_joint, 0.0, DEFAULTS)
    assert same(before, state(guide))
