# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The Pareto tail of importance weights: k-hat, and smoothed weights."""

import importlib
import math
import warnings

import pytest
import torch

from pyro_artransform.diagnostics import fit_tail, smooth_tail
from pyro_artransform.diagnostics.importance import WORST_KHAT

INF, NAN = math.inf, math.nan


def pareto_log_weights(k, size=10_000):
    """Log weights whose tail is exactly Pareto of index k."""
    return k * torch.empty(size).exponential_()


CONSTANT = {
    "zeros": torch.zeros(1000),
    "round_off": -1e4 + torch.linspace(0, 2e-11, 1000, dtype=torch.float64),
    "float32_of_100_000_nats": torch.full((1000,), -1e5, dtype=torch.float32),
    "float32_round_off": torch.full((1000,), -123.4).nextafter(torch.zeros(1000)),
    "tied_at_the_top": torch.sin(torch.arange(1000.0)).clamp(max=0.0),
    # of a density of many nats, whose round-off is above that of the weights
    "tied_by_round_off": 2.0**-47 * torch.arange(10_000).lt(110).double(),
}
HOPELESS = {
    "one_draw": torch.tensor([3.0]),
    "four_draws_in_the_tail": torch.zeros(20),
    "float32_of_ten_million_nats": -1e7 + torch.linspace(0, 16, 1000).float(),
    "all_zero": torch.full((100,), -INF),
    "one_infinite": torch.tensor([0.0] * 999 + [INF]),
    "two_percent_nan": torch.tensor([0.0] * 98 + [NAN] * 2),
    "one_draw_outweighs_all": torch.tensor([0.0] * 999 + [50.0]),
}
FINITE = {
    "half_zero": torch.cat([torch.randn(500), torch.full((500,), -INF)]),
    "one_percent_nan": torch.cat([torch.randn(990), torch.full((10,), NAN)]),
    "ties": torch.randn(2000).round(),
    "three_above_ties": torch.tensor([0.0] * 997 + [1.0, 2.0, 3.0]),
    "tiny_spread": 1e-9 * torch.randn(1000, dtype=torch.float64),
    "half_precision": torch.randn(1000).half(),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_weights_have_a_khat_of_zero(name):
    assert fit_tail(CONSTANT[name]).khat == 0
    assert torch.equal(smooth_tail(CONSTANT[name]), CONSTANT[name].double())


@pytest.mark.parametrize("name", HOPELESS)
def test_weights_that_mean_nothing_have_the_largest_khat(name):
    assert fit_tail(HOPELESS[name]).khat == WORST_KHAT


@pytest.mark.parametrize("name", FINITE)
def test_khat_is_finite(name):
    tail = fit_tail(FINITE[name])
    assert math.isfinite(tail.khat)
    assert tail.khat < WORST_KHAT
    assert 0 < tail.khat_se < 1
    smoothed = smooth_tail(FINITE[name])
    assert smoothed.shape == FINITE[name].shape
    assert not smoothed.isnan().any()
    assert smoothed.max() <= FINITE[name][FINITE[name].isfinite()].max()


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0])
def test_standard_error_by_simulation(k):
    """60 fits of 300 tail weights: their sd is known to 9 %, their mean to an eighth of it.

    The prior of Pyro's routine counts as ten more weights, at 0.5. An exponential tail has an index of 0.
    """
    bounded = torch.empty(60, 10_000).exponential_().log()
    tails = [fit_tail(pareto_log_weights(k) if k else weights) for weights in bounded]
    khats = torch.tensor([tail.khat for tail in tails])
    se = torch.tensor([tail.khat_se for tail in tails]).mean()
    assert abs(khats.mean() - (300 * k + 10 * 0.5) / 310) < 0.5 * se
    assert 0.75 * se < khats.std() < 1.3 * se


@pytest.mark.parametrize("k", [0.2, 0.9])
def test_smoothed_weights_are_arvizs(k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
    weights = pareto_log_weights(k, 4000)
    expected, khat = arviz.psislw(weights.numpy().copy())
    tail = fit_tail(weights)
    assert tail.khat == pytest.approx(float(khat), abs=1e-6)
    found = smooth_tail(weights, tail).log_softmax(0)
    assert torch.allclose(found, torch.as_tensor(expected).flatten(), atol=1e-5)


def test_smoothing_keeps_order_and_mass_below_and_takes_no_gradient():
    weights = pareto_log_weights(0.6).requires_grad_()
    before = weights.detach().clone()
    smoothed, tail = smooth_tail(weights), fit_tail(weights)
    below = weights <= tail.log_cutoff
    assert (~below).sum() == tail.size == 300
    assert torch.equal(smoothed[below], weights[below])
    assert torch.equal(smoothed.argsort(), weights.argsort())
    assert not smoothed.requires_grad
    assert torch.equal(weights.detach(), before)


def test_tail_of_index_zero_is_exponential():
    """The limit of the quantiles of small indices."""
    weights = pareto_log_weights(0.5)
    tail = fit_tail(weights)
    limit, near = (smooth_tail(weights, tail._replace(khat=k)) for k in (0.0, 1e-6))
    assert torch.allclose(limit, near, atol=1e-4)
    assert not torch.equal(limit, weights)


def test_a_fit_that_fails_is_the_worst(monkeypatch):
    module = importlib.import_module("pyro_artransform.diagnostics.importance")
    monkeypatch.setattr(module, "fit_generalized_pareto", lambda _: (NAN, NAN))
    weights = pareto_log_weights(0.5)
    assert fit_tail(weights).khat == WORST_KHAT
    assert torch.equal(smooth_tail(weights), weights)


@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match=r"log_weights: expected shape \(S,\), got"):
        fit_tail(torch.zeros(shape))
