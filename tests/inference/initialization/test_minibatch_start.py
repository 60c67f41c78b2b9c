# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Where a guide starts if one mini-batch says little about some global latents."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoAmortized
from tests.inference.conftest import quick_fit as fit

USERS, PER_BATCH = 100, 10
TIME = torch.tensor([-1.0, 0.0, 1.0])


def correlated(y, total=USERS):
    """Intercepts and slopes of users, of which the slopes and the correlation have hardly any data."""
    rho = pyro.sample("rho", dist.Uniform(y.new_tensor(-1.0), 1.0))
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    slope = pyro.sample("slope", dist.Normal(y.new_zeros(()), 2.0))
    of_mean = pyro.sample("of_mean", dist.HalfNormal(y.new_ones(())))
    of_slope = pyro.sample("of_slope", dist.HalfNormal(y.new_ones(())))
    with pyro.plate("users", total, subsample_size=len(y)):
        a = pyro.sample("a", dist.Normal(mean, of_mean))
        loc = slope + rho * of_slope / of_mean * (a - mean)
        b = pyro.sample("b", dist.Normal(loc, of_slope * torch.sqrt(1 - rho**2)))
        line = a[..., None] + b[..., None] * TIME.to(y)
        pyro.sample("y", dist.Normal(line, 0.5).to_event(1), obs=y)


def features(y, total=USERS):
    return torch.stack([y.mean(-1), (y * TIME.to(y)).mean(-1)], -1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_correlation_and_a_scale(seed):
    """They start neither at the edge of the support nor at zero, where float32 has no gradient."""
    torch.manual_seed(1)
    e = torch.randn(USERS, 2, dtype=torch.float32)
    lines = 1 + 0.8 * e[:, :1] + (0.1 * e[:, 1:] - 0.5) * TIME.to(e)
    y = lines + 0.5 * torch.randn(USERS, 3, dtype=torch.float32)
    guide, begun = AutoAmortized(correlated, features), []

    def callback(step, elbo):
        if not begun:
            begun.append(guide.median(y))

    batches = list(y.split(PER_BATCH))
    result = fit(
        correlated,
        guide,
        loader=batches,
        num_steps=100,
        num_particles=8,
        seed=seed,
        progress=False,
        callback=callback,
    )
    assert begun[0]["rho"].abs() < 0.9
    assert 0.02 < begun[0]["of_slope"] < 1.0
    assert result.num_skipped == 0
    # -366 and -368, and -353 after 1,500 steps; from scales near zero it is below -1e4
    assert result.elbo > -400
