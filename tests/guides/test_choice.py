# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Which guide a model gets where the user gives it no guide."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoAmortized, AutoIAF, AutoStructuredFlow
from pyro_artransform.guides.choice import _MOST_FOR_IAF, choose_guide


def path(size):
    pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def groups(size, subsample_size):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", size, subsample_size=subsample_size):
        pyro.sample("z", dist.Normal(mean, 1.0))


def rows(size):
    z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
    with pyro.plate("rows", 1000, subsample_size=10):
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(10))


def improper():
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(()))


MANY = _MOST_FOR_IAF + 1
CHOICES = [
    (path, (1,), AutoIAF, "for 1 latent"),
    (path, (_MOST_FOR_IAF,), AutoIAF, f"for {_MOST_FOR_IAF} latents"),
    (path, (MANY,), AutoStructuredFlow, f"for {MANY} latents"),
    (groups, (6, 3), AutoAmortized, "for latents in the subsampled plate 'groups'"),
    # a mini-batch may lack dependencies
    (rows, (MANY,), AutoIAF, f"for {MANY} latents and subsampled data"),
    (improper, (), AutoIAF, "for 1 latent"),
]


@pytest.mark.parametrize(("model", "args", "kind", "reason"), CHOICES)
def test_choice(model, args, kind, reason):
    guide, why = choose_guide(model, args)
    assert type(guide) is kind
    assert why == reason
    assert guide(*args).keys() >= {"z"}


def test_a_mini_batch_may_lack_dependencies_and_leaves_no_trace():
    """Also where nothing in the model says that it is one, as where it is scaled by hand."""
    before = torch.get_rng_state()
    with pyro.poutine.trace() as tracer:
        guide, why = choose_guide(path, (MANY,), is_minibatch=True)
    assert type(guide) is AutoIAF
    assert why == f"for {MANY} latents and subsampled data"
    assert torch.equal(torch.get_rng_state(), before)
    assert not tracer.trace.nodes


def test_models_that_no_guide_covers():
    with pytest.raises(ValueError, match="no continuous latent: expected at least one"):
        choose_guide(lambda: None)
    with pytest.raises(
        ValueError, match="site 'k' is a discrete latent; if it is data, pass it as obs="
    ):
        choose_guide(lambda: pyro.sample("k", dist.Bernoulli(0.5)))


@pytest.mark.parametrize("seed", range(4))
def test_a_density_that_is_not_a_number_for_some_values(seed):
    """A start of the fit is found elsewhere, as Pyro's own guides are set up."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("log", z.log())

    torch.manual_seed(seed)
    guide, _ = choose_guide(model)
    assert isinstance(guide, AutoIAF)
