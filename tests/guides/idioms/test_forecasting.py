# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Forecasts of `pyro.contrib.forecast` with a guide of ours."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer.autoguide import AutoNormal

from pyro_artransform import AutoIAF, AutoStructuredFlow, fit


class Walk(ForecastingModel):
    """A random walk with noise, as Pyro's tutorial on forecasting has it."""

    def model(self, zero_data, covariates):
        start = pyro.sample("start", dist.Normal(0.0, 10.0).expand([1]).to_event(1))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(torch.zeros(1), 0.3).to_event(1))
        self.predict(dist.Normal(torch.zeros(1), 0.1), drift.cumsum(-2) + start)


GUIDES = {"AutoNormal": AutoNormal, "AutoIAF": AutoIAF, "AutoStructuredFlow": AutoStructuredFlow}


@pytest.mark.parametrize("kind", GUIDES)
def test_forecast(kind):
    data, covariates = torch.linspace(3.0, 5.0, 10)[:, None], torch.zeros(14, 0)
    model = Walk()
    guide = GUIDES[kind](model)
    num_steps = 3
    if kind != "AutoNormal":  # the posterior is a Gaussian, which a fit finds without steps
        fit(model, guide, data, covariates[:10], progress=False)
        num_steps = 0
    options = {"num_steps": num_steps, "log_every": 0}
    forecaster = Forecaster(model, data, covariates[:10], guide=guide, **options)
    drawn = forecaster(data, covariates, num_samples=400)
    assert drawn.shape == (400, 4, 1)
    if kind == "AutoNormal":
        return
    # from the last datum on, 0.3 a step; the last state is known to 0.1, as the noise is. Five standard
    # errors of 400 draws
    for step in range(4):
        sd = drawn[:, step].std()
        assert abs(drawn[:, step].mean() - 5.0) < 0.05 + 5 * sd / 20
        expected = (0.09 * (step + 1) + 0.02) ** 0.5
        assert abs(sd / expected - 1) < 5 / 800**0.5
