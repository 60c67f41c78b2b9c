# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What Pyro builds on a fitted guide: chains in its base space, and forecasts."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam

from pyro_artransform import AutoIAF, AutoStructuredFlow
from pyro_artransform.joint import LogJoint
from tests.guides.idioms.models import GUIDES, examples
from tests.inference.conftest import quick_fit


@pytest.mark.parametrize("kind", GUIDES)
def test_nuts_from_a_fitted_guide(kind):
    """A model with a plate; the chain's energy is minus the density of the guide's space."""
    example = examples()["baseball"]
    guide = GUIDES[kind](example.model)
    quick_fit(example.model, guide, *example.with_data(), num_steps=10, progress=False)

    neutra = NeuTraReparam(guide.requires_grad_(False))
    kernel = NUTS(poutine.reparam(example.model, config=lambda _: neutra), max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=8, warmup_steps=4, disable_progbar=True)

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


class Walk(ForecastingModel):
    """A random walk with noise, as Pyro's tutorial on forecasting has it."""

    def model(self, zero_data, covariates):
        start = pyro.sample("start", dist.Normal(0.0, 10.0).expand([1]).to_event(1))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(torch.zeros(1), 0.3).to_event(1))
        self.predict(dist.Normal(torch.zeros(1), 0.1), drift.cumsum(-2) + start)


@pytest.mark.parametrize("kind", [AutoIAF, AutoStructuredFlow])
def test_forecast(kind):
    """The posterior is a Gaussian, which a fit finds without steps."""
    data, covariates = torch.linspace(3.0, 5.0, 10)[:, None], torch.zeros(14, 0)
    model = Walk()
    guide = kind(model)
    quick_fit(model, guide, data, covariates[:10], num_steps=1, progress=False)
    options = {"guide": guide, "num_steps": 0, "log_every": 0}
    drawn = Forecaster(model, data, covariates[:10], **options)(data, covariates, num_samples=400)
    assert drawn.shape == (400, 4, 1)
    # from the last datum on, 0.3 a step; the last state is known to 0.1, as the noise is. Five standard
    # errors of 400 draws
    for step in range(4):
        sd = drawn[:, step].std()
        assert abs(drawn[:, step].mean() - 5.0) < 0.05 + 5 * sd / 20
        expected = (0.09 * (step + 1) + 0.02) ** 0.5
        assert abs(sd / expected - 1) < 5 / 800**0.5
