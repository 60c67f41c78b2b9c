# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors that are known, by `fit` on an amortized guide. They take minutes."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoAmortized, fit

LOG_EVIDENCE = -31.315
EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def schools(y, errors):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, errors), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_eight_schools(seed):
    """The centered form, a funnel, amortized on the data of each school: a gap of 0.15 at most."""
    pyro.enable_validation(False)
    pyro.set_rng_seed(seed)
    data = torch.tensor(EFFECTS), torch.tensor(ERRORS)
    guide = AutoAmortized(schools, lambda y, errors: torch.stack([y, errors], -1) / 10)
    result = fit(schools, guide, *data, seed=seed, progress=False)
    assert result.elbo_se < 0.01
    assert -0.02 < LOG_EVIDENCE - result.elbo < 0.15
