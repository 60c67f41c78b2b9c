# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.joint import LogJoint
from pyro_artransform.joint.coordinates import non_centered
from pyro_artransform.sampling import PulledBack, State
from pyro_artransform.sampling.starts import (
    Starts,
    climb,
    far_apart,
    latin_hypercube,
    overdispersed,
)


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
    points = latin_hypercube(16, torch.zeros(200, dtype=dtype))
    assert points.dtype == dtype
    strata = (16 * torch.special.ndtr(points / 1.3)).floor().sort(0).values
    assert torch.equal(strata, torch.arange(16.0, dtype=dtype)[:, None].expand(16, 200))
    # and so has each stratum of eight one of every other point
    for part in (points[::2], points[1::2]):
        strata = (8 * torch.special.ndtr(part / 1.3)).floor().sort(0).values
        assert torch.equal(strata, torch.arange(8.0, dtype=dtype)[:, None].expand(8, 200))
    assert latin_hypercube(5, points[0]).shape == (5, 200)
    # wider than the prior, by 1.3 in all dimensions, and in no order
    assert float(points.std()) == pytest.approx(1.3, rel=0.05)
    assert torch.corrcoef(points.T).fill_diagonal_(0.0).mean().abs() < 0.02


def test_starts_are_quantiles_of_the_prior():
    """Scales of the root, small and large ones, stay; what has a location climbs from where it is likely."""
    log_joint = in_units_of_the_prior(hierarchy)
    points, _, is_held, _ = overdispersed(log_joint, 18)
    held = {name: bool(part.any()) for name, part in log_joint.latents.views(is_held).items()}
    assert held == {"mu": False, "tau": True, "sigma": True, "theta": False}
    u, _ = log_joint.to_unconstrained(points)
    tau = log_joint.latents.constrain(torch.cat([u[:1], u[2:]]))["tau"]
    # quantiles of the half normal prior: one in each of 18 strata, but that of the model's own start
    strata = (
        18 * torch.special.ndtr(torch.special.ndtri(2 * torch.special.ndtr(tau) - 1) / 1.3)
    ).floor()
    assert len(strata.unique()) == 17


def test_without_a_hierarchy_nothing_is_held():
    """One start is the model's; of a vague prior every other one is at most one sd away, or so."""
    log_joint = in_units_of_the_prior(lambda: pyro.sample("z", dist.Normal(3.0, 1000.0)))
    starts = overdispersed(log_joint, 32)
    assert not starts.is_held.any()
    away = (starts.base - log_joint.start)[:, 0]
    assert away[1] == 0
    assert 500 < away[::2].std() < 2000
    assert away[1::2].std() < 2


def test_starts_are_where_the_density_is_finite():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(z > 0.1, -torch.inf, 0.0))

    log_joint = in_units_of_the_prior(model)
    assert log_joint(overdispersed(log_joint, 32).base).isfinite().all()


def test_climbs_leave_root_scales_where_they_are():
    log_joint = in_units_of_the_prior(hierarchy)
    target, starts = PulledBack(log_joint), overdispersed(log_joint, 8)
    points, _, is_held, _ = starts
    state, preconditioner = climb(target, starts)
    assert torch.equal(state.base[:, is_held], points[:, is_held])
    assert (state.base[:, ~is_held] != points[:, ~is_held]).all()
    assert (state.log_density > target(points).log_density).all()
    assert all(part.isfinite().all() for part in preconditioner)
    assert torch.allclose(target(state.base).log_density, state.log_density)


def test_climbs_learn_how_a_density_is_stretched():
    """Sds over four orders of magnitude, by a few gradients, also where a density fails."""
    scale = torch.logspace(-2, 2, 5)

    def model():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (5,)))
        pyro.factor("stretched", dist.Normal(0.0, scale).log_prob(z).sum(-1))
        pyro.factor("wall", torch.where(z[..., 0] > 2.5, torch.nan, 0.0))

    points = latin_hypercube(8, torch.zeros(5))
    points[0, 0] = 2.6
    with pyro.validation_enabled(False):
        nothing = torch.zeros(5) > 0
        starts = Starts(points, torch.ones(8, 5), nothing, nothing)
        state, preconditioner = climb(PulledBack(LogJoint(model)), starts)
    assert state.is_finite.all()
    found = preconditioner(torch.eye(5)).norm(dim=0) / scale
    assert found.max() / found.min() < 30


def test_superchains_begin_at_points_that_are_far_apart():
    """Of four points each, where one of the third leads to a far mode; one that is far below is none."""
    base = torch.zeros(16, 2)
    base[10], base[13] = 20.0, -50.0
    log_density = torch.zeros(16)
    log_density[13] = -100.0
    state = State(base, base, log_density, torch.zeros_like(base))
    chosen = far_apart(state, torch.ones(2), 4)
    assert chosen[1] == 4
    assert chosen[2] == 10
    assert chosen[3] != 13
    assert torch.equal(chosen // 4, torch.arange(4))
