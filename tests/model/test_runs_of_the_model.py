# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How often a model is run before anything happens."""

import torch

from pyro_artransform import AutoIAF, fit, mcmc
from pyro_artransform.model import LogJoint
from tests.model.models import hierarchy
from tests.sampling.densities import schools

Y = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 0.1, 1.5, -0.7])


class Counted:
    """A model that counts its runs."""

    def __init__(self, model):
        self.model, self.num_runs = model, 0

    def __call__(self, *args):
        self.num_runs += 1
        self.model(*args)


def test_of_eight_schools():
    model = Counted(schools)
    mcmc(model, seed=0, progress=False)
    assert model.num_runs <= 56


def test_of_the_density():
    model = Counted(hierarchy)
    log_joint = LogJoint(model, (Y,))
    assert model.num_runs == 1
    # what is decided is not decided again
    found = log_joint.strategy, log_joint.obstacle, log_joint.is_random, log_joint.start
    assert found[:3] == ("plate", "", False)
    assert log_joint.with_arguments((Y,)).bound_to((Y,), {}).strategy == "plate"
    assert model.num_runs <= 8


def test_of_the_first_call_of_a_guide():
    model = Counted(hierarchy)
    guide = AutoIAF(model)
    guide(Y)
    assert set(guide.coordinates.centered_by_site()) == {"tau", "theta"}
    assert model.num_runs <= 11
    guide(Y)
    assert model.num_runs <= 12


def test_of_a_fit_beside_its_steps():
    model = Counted(hierarchy)
    fit(model, AutoIAF(model), Y, num_steps=3, progress=False, seed=0)
    assert model.num_runs - 3 <= 100
