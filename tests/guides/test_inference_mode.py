# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Guides inside ``torch.inference_mode``: they draw there, and train afterwards."""

import copy

import pytest
import torch
from pyro import poutine

from pyro_artransform.guides import AutoIAF
from tests.guides import models
from tests.guides.named import GUIDES
from tests.guides.training import redraw_after_call, trains


def test_a_copy_trains():
    guide = redraw_after_call(AutoIAF(models.regression, hidden_dims=8))
    with torch.inference_mode():
        twin = copy.deepcopy(guide)
    trains(twin, [guide])


def test_a_guide_that_was_set_up_there_trains(tmp_path):
    guide = AutoIAF(models.regression, hidden_dims=8)
    with torch.inference_mode():
        guide.sample_posterior(3, models.data())
    trains(guide)
    guide.save(tmp_path / "guide")
    with torch.inference_mode():
        loaded = AutoIAF.load(tmp_path / "guide", models.regression)
    trains(loaded)


@pytest.mark.parametrize("name", GUIDES)
def test_draws_and_densities(name):
    guide = redraw_after_call(GUIDES[name](models.regression))
    posterior = guide.get_posterior()
    with torch.inference_mode():
        draws = guide.sample_posterior(4)
        log_prob = guide.log_prob(draws)
        assert guide.quantiles([0.5], num_samples=10)["loc"].shape == (1,)
        assert guide.median(num_samples=10)["scale"] > 0
        trace = poutine.trace(guide).get_trace(models.data())
        assert trace.log_prob_sum().isfinite()
        latent, log_q = guide.rsample_and_log_prob(4)
        assert torch.allclose(posterior.log_prob(latent), log_q)
        assert posterior.log_prob(posterior.sample()).isfinite()
    assert torch.allclose(guide.log_prob({k: v.clone() for k, v in draws.items()}), log_prob)
    trains(guide)
