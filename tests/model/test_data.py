# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions of data, as users write them."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_artransform.model import LogJoint


class WithoutSupport(dist.TorchDistribution):
    """A density of data that does not say where it is positive, which Pyro's SVI accepts."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return WithoutSupport(self.loc.expand(batch_shape))

    def log_prob(self, value):
        return -0.5 * (value - self.loc).square()


@pytest.mark.parametrize("is_valid", [True, False])
def test_data_need_no_support(is_valid):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", WithoutSupport(z), obs=torch.tensor(0.5))

    with dist.validation_enabled(is_valid):
        log_joint = LogJoint(model)
        z = torch.tensor([[0.0], [1.0]])
        expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) - 0.5 * (0.5 - z[:, 0]).square()
        torch.testing.assert_close(log_joint(z), expected)
