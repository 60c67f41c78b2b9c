# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What errors and warnings of a fit say of the arguments of the model, and of its guide."""

from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal

from pyro_artransform import AutoIAF, mcmc
from tests.inference import models
from tests.inference.conftest import quick_fit

few = partial(quick_fit, num_particles=4, progress=False)


def test_a_distribution_is_data():
    """Although it can be called: it is an argument of the model, and no guide."""

    def model(prior):
        pyro.sample("y", dist.Normal(pyro.sample("z", prior), 1.0), obs=torch.ones(()))

    assert "z" in few(model, dist.Normal(0.0, 1.0), num_steps=2).guide.median()


@pytest.mark.parametrize("verb", [few, partial(mcmc, progress=False)])
@pytest.mark.parametrize("guide", [AutoNormal, AutoIAF])
def test_a_guide_is_no_model(verb, guide):
    """As in ``fit(AutoIAF(model))``, also with the model in place of the guide."""
    words = rf"the first argument is the model, got the guide {guide.__name__}.* fit\(model, guide"
    for rest in ((), (models.location,)):
        with pytest.raises(TypeError, match=words):
            verb(guide(models.location), *rest)
