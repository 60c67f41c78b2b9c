# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Chains in the base space of a fitted guide, in three lines."""

import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.reparam import NeuTraReparam

from pyro_artransform import AutoIAF, AutoStructuredFlow
from pyro_artransform.joint import LogJoint
from tests.guides.idioms.models import example_of_baseball
from tests.inference.conftest import quick_fit

GUIDES = {
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAF": lambda model: AutoIAF(model, num_transforms=1, hidden_dims=8),
    "AutoStructuredFlow": lambda model: AutoStructuredFlow(model, hidden_dim=4),
}


@pytest.mark.parametrize("kind", GUIDES)
def test_nuts_from_a_fitted_guide(kind):
    """A model with a plate; the chain's energy is minus the density of the guide's space."""
    example = example_of_baseball()
    guide = GUIDES[kind](example.model)
    quick_fit(example.model, guide, *example.with_data(), num_steps=10, progress=False)

    neutra = NeuTraReparam(guide.requires_grad_(False))
    kernel = NUTS(poutine.reparam(example.model, config=lambda _: neutra), max_tree_depth=3)
    mcmc = MCMC(kernel, num_samples=8, warmup_steps=8, disable_progbar=True)

    mcmc.run(*example.with_data())
    base = mcmc.get_samples()["loc_shared_latent"]
    # a plate of the model is one more dimension on its right
    samples = neutra.transform_sample(base.unsqueeze(-2))
    assert {name: tuple(value.shape) for name, value in samples.items()} == {
        **{"loc": (8, 1), "scale": (8, 1), "alpha": (8, 6)}
    }
    assert base.std() > 0.1
    transform = guide.get_transform()
    z = transform(base)
    log_joint = LogJoint(example.model, example.with_data())
    for name, value in log_joint.latents.constrain(z).items():
        assert torch.allclose(value, samples[name].reshape(value.shape))
    expected = log_joint(z) + transform.log_abs_det_jacobian(base, z)
    found = [-kernel.potential_fn({"loc_shared_latent": row}) for row in base]
    assert torch.allclose(torch.stack(found), expected)
