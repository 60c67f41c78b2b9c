# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What errors and warnings of a fit say of the arguments of the model, and of its guide."""

from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoStructured

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


def test_what_the_param_store_had_is_said():
    """A guide of Pyro's takes it for its own, so that a seed does not repeat a fit."""

    def fitted(guide, **options):
        return quick_fit(models.location, guide, num_steps=2, progress=False, **options)

    guide = AutoNormal(models.location)
    fitted(guide)
    fitted(guide)  # goes on, as it should
    with pytest.warns(
        UserWarning, match=r"starts from values already in the param store .*AutoNormal\."
    ):
        fitted(AutoNormal(models.location))


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoStructured])
@pytest.mark.parametrize("size", [None, 1, 2])
def test_what_a_guide_of_pyro_finds_in_the_store(kind, size):
    """It takes a parameter of any shape, and one that broadcasts for all elements of a plate."""

    def model(size):
        loc = torch.zeros(()) if size is None else torch.zeros(size)
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(loc.dim()))
        with pyro.plate("plate", size or 3):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(size or 3))

    kind(model)(size)
    with pytest.raises(ValueError, match=r"of shape \(.* an earlier guide .*clear_param_store\(\)"):
        few(model, kind(model), 3, num_steps=2)
    pyro.clear_param_store()
    few(model, kind(model), 3, num_steps=2)
