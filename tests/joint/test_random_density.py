# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A density that is random is noticed: each draw has random numbers of its own, and nothing is trusted."""

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoIAF, fit
from pyro_artransform.diagnostics import importance, marginals
from pyro_artransform.joint import LogJoint


def model_of(rows, size):
    """Normal data, of which a run sees some rows."""
    y = 1 + 3 * torch.randn(100)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        with pyro.plate("data", size), pyro.poutine.scale(scale=100 / size):
            pyro.sample("y", dist.Normal(z, 10.0), obs=y[rows()])

    return model


def draw_rows():
    return torch.randint(100, (50,))


def test_a_random_density_is_noticed():
    assert LogJoint(model_of(draw_rows, 50)).is_random
    by_numpy = model_of(lambda: torch.as_tensor(np.random.choice(100, 50)), 50)
    assert LogJoint(by_numpy).is_random
    # random numbers that do not count
    assert not LogJoint(model_of(lambda: (torch.rand(3), torch.arange(50))[1], 50)).is_random


def test_nothing_is_trusted():
    model = model_of(lambda: torch.randint(100, (3,)), 3)
    guide = AutoIAF(model, hidden_dims=8)
    result = fit(model, guide, num_steps=30, progress=False, seed=0)
    assert not result.trusted
    assert "is random otherwise" in result.verdict
    with pytest.raises(ValueError, match="or whose density is random otherwise"):
        marginals(model, guide)


def test_the_standard_error_knows_of_the_noise():
    """ELBOs that differ by nats had standard errors of hundredths."""
    model = model_of(draw_rows, 50)
    guide = AutoIAF(model, hidden_dims=8)
    guide()
    found = [importance(model, guide, 200) for _ in range(4)]
    elbos = torch.tensor([one.elbo for one in found])
    # 4 estimates: their sd is within a factor of 4 of what each says, but in one of a thousand cases
    assert elbos.std() < 4 * max(one.elbo_se for one in found)
