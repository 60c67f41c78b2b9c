# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The assertions about guides: they pass for each guide, and each can fail."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.guides import AutoIAF
from pyro_artransform.testing import check_guide
from tests.guides import models
from tests.guides.named import FOREIGN, GUIDES


@pytest.mark.parametrize("name", [*GUIDES, *FOREIGN])
def test_guides(name):
    new = {**GUIDES, **FOREIGN}[name]
    pyro.param("kept", torch.ones(()))
    check_guide(new, models.gaussian if "iaf" in name else models.regression, models.data())
    assert list(pyro.get_param_store()) == ["kept"]


def test_a_guide_in_coordinates_of_the_prior():
    """Their lambda is no parameter that trains, and draws are not on the unconstrained space."""

    def groups(values):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("groups", 4):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=values[:4])

    guide = AutoIAF(groups)
    guide(models.data())
    assert guide.prior_coordinates is not None
    check_guide(AutoIAF, groups, models.data())


class Wrong(AutoIAF):
    def __init__(self, model):
        super().__init__(model, num_transforms=1, hidden_dims=8)


class WrongShape(Wrong):
    def sample_posterior(self, n, *args, **kwargs):
        draws = super().sample_posterior(n, *args, **kwargs)
        return {name: value[0] for name, value in draws.items()}


class WrongLogProb(Wrong):
    def log_prob(self, values):
        return super().log_prob(values) + 1


class WrongPath(Wrong):
    def rsample_and_log_prob(self, n, path=False):
        z, log_q = super().rsample_and_log_prob(n)
        return z, log_q * (1 + path)


class Frozen(Wrong):
    def build(self, latents, start):
        made = super().build(latents, start)
        made.transforms[1].loc.register_hook(torch.zeros_like)
        return made


class Unregistered(Wrong):
    def _register(self):
        pass


class SharedCopy(Wrong):
    def __deepcopy__(self, memo):
        return self


class DeafToTheStore(Wrong):
    def _register(self):
        pyro.clear_param_store()
        super()._register()


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (WrongShape, r"sample_posterior\(5\): 'loc' has shape \(\), expected \(5,\)"),
        (WrongLogProb, "log_prob: .* for a draw whose density in the guide's trace is"),
        (WrongPath, r"rsample_and_log_prob\(path=True\)"),
        (Frozen, "SVI: 1 of .* parameters never move: .*loc"),
        (Unregistered, "a second guide: .* parameters never move"),
        (SharedCopy, "deepcopy: training it moves"),
        (DeafToTheStore, "a loaded param store: the guide does not have its parameters"),
    ],
)
def test_it_can_fail(guide, message):
    with pytest.raises(AssertionError, match=message):
        check_guide(guide, models.regression, models.data())
