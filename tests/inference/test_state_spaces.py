# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""State-space models by loops: a fit ends with an answer, or with a sentence that says why there is none."""

import math

import pytest
import torch

from pyro_artransform import AutoStructuredFlow, fit
from pyro_artransform.inference.initialization.start import find_start
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling.run_mcmc import from_nothing
from tests.inference.state_spaces import MODELS, simulated

QUICK_MODELS = ("ar2", "student level", "dynamic poisson")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_MODELS else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_start_is_found_in_single_precision(name):
    torch.set_default_dtype(torch.float32)
    model, y = MODELS[name], simulated(MODELS[name], 4)
    guide = AutoStructuredFlow(model)
    guide.set_up(4, y)
    log_joint = LogJoint(model, (4, y)).with_coordinates(guide.prior_coordinates)
    ensemble = from_nothing(log_joint, 50)
    ensemble.run(50, most=32)
    found = find_start(log_joint, guide, ensemble)
    z, log_q = guide.rsample_and_log_prob(500)
    # the median of other draws: in the neck of a scale a Gaussian has draws of any density
    median = (log_joint(z) - log_q).median().item()
    assert abs(median - found.elbo) < 20.0


@pytest.mark.slow
@pytest.mark.parametrize("draws", [None, 100])
@both_dtypes
@pytest.mark.parametrize(
    ("name", "num"), [*((name, 30) for name in MODELS), ("local linear trend", 100)]
)
def test_a_fit_of_some_seconds(name, num, dtype, draws):
    """The ELBO has digits, or the verdict says that nothing is known."""
    torch.set_default_dtype(dtype)
    model, y = MODELS[name], simulated(MODELS[name], num)
    result = fit(model, num, y, draws=draws, seed=0, max_seconds=20, progress=False)
    assert math.isfinite(result.elbo)
    if abs(result.elbo) * torch.finfo(dtype).eps > 1:
        assert not result.trusted
        assert "round-off" in result.verdict
    if draws:
        assert all(value.isfinite().all() for value in result.draws.values())
