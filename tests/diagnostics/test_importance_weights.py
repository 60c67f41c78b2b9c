# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
import warnings

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.stats import fit_generalized_pareto

from pyro_artransform import AutoIAF, fit
from pyro_artransform.diagnostics import fit_tail, importance
from pyro_artransform.diagnostics.importance_weights import log_weights
from pyro_artransform.diagnostics.psis import WORST_KHAT, fit_tails, smooth_tail
from pyro_artransform.model.protocols import FlowGuide
from tests.diagnostics import conjugate


def test_arguments_of_both():
    def model(data, scale=1.0):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=data)

    def guide(data, scale=1.0):
        pyro.sample("z", dist.Normal(0.8 * data, 0.8**0.5))

    data = torch.tensor(0.7)
    _, weights = log_weights(model, guide, 10, (data,), {"scale": 2.0})
    evidence = dist.Normal(0.0, 5.0**0.5).log_prob(data)
    assert torch.allclose(weights, evidence.expand(10))


@pytest.mark.parametrize("make", [AutoIAF, AutoNormal])
def test_a_guide_first_met_here_trains(make):
    """Its parameters are made while no gradients are kept."""
    guide = make(conjugate.local_normals)
    log_weights(conjugate.local_normals, guide, 10)
    # lambda, which chooses coordinates, is a parameter that does not train
    trained = [p for name, p in guide.named_parameters() if not name.endswith(("centered", "unit"))]
    before = [parameter.detach().clone() for parameter in trained]
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = pyro.infer.SVI(conjugate.local_normals, guide, optim, pyro.infer.Trace_ELBO())
    for _ in range(4):
        svi.step()
    assert before
    assert not any(map(torch.equal, before, trained))


# Guides that are not of the model


class _ThreeNumbers(FlowGuide):
    def __call__(self):
        pass

    def rsample_and_log_prob(self, n, path=False):
        return torch.zeros(n, 3), torch.zeros(n)


def normal(loc=0.0):
    pyro.sample("z", dist.Normal(loc, 1.0))


def by_another(**infer):
    """The density of the auxiliary site came into the ELBO, 2.3 nats above the evidence."""
    return lambda: normal(0.1 * pyro.sample("u", dist.Uniform(0.0, 10.0), infer=infer))


def pair(loc=0.0):
    with pyro.plate("pair", 2):
        normal(loc)


def only_mean():
    pyro.sample("mean", dist.Normal(0.0, 1.0))


def of_discrete_latents():
    pyro.sample("loc", dist.Normal(0.4, 0.7))
    with pyro.plate("data", len(conjugate.REALS)):
        pyro.sample("kind", dist.Bernoulli(0.3))


def mixture():
    conjugate.mixture(torch.tensor(conjugate.REALS))


LOCAL, BY_DELTA = conjugate.local_normals, r"that determine them through a Delta.*got \['u'\]"
DISCRETE = "got draws of the discrete kind: enumerate"
REFUSED = [
    (LOCAL, only_mean, 10, r"all latents of the model, got none for \['z'\]"),
    (LOCAL, _ThreeNumbers(), 10, r"latents of shape \(10, 4\) .* got \(10, 3\)"),
    (LOCAL, only_mean, 0, "expected a positive integer, got 0"),
    (normal, by_another(), 10, BY_DELTA),
    (normal, by_another(is_auxiliary=True), 10, f"auxiliary ones {BY_DELTA}"),
    (pair, lambda: pair(torch.zeros(2, 1)), 10, r'site "z", invalid log_prob shape'),
    (mixture, of_discrete_latents, 10, DISCRETE),
    (poutine.infer_config(mixture, lambda site: {}), of_discrete_latents, 10, DISCRETE),
]


@pytest.mark.parametrize(("model", "guide", "num_samples", "words"), REFUSED)
def test_what_is_refused(model, guide, num_samples, words):
    with pytest.raises(ValueError, match=words):
        importance(model, guide, num_samples)


def funnel():
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    theta = pyro.sample("theta", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(1.0))


def other_order():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.sample("y", dist.Normal(theta, scale), obs=torch.tensor(1.0))


def other_shapes():
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([1]).to_event(1))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta, scale.sum(-1)), obs=torch.tensor(1.0))


other_names = poutine.reparam(funnel, {"theta": LocScaleReparam(0.0)})


@pytest.mark.parametrize("model", [other_names, other_order, other_shapes])
def test_a_guide_of_another_model(model):
    """Its latents have as many dimensions, so that no number shows it."""
    with pytest.raises(ValueError, match="expected a guide for this model"):
        importance(model, AutoIAF(funnel), 20)
    with pytest.raises(ValueError, match="expected a guide for this model"):
        fit(model, AutoIAF(funnel), num_steps=2, progress=False)


# Mini-batches, and guides that run the model


@pytest.mark.parametrize("guide", ["flow", "by hand"])
def test_each_draw_sees_a_mini_batch_of_its_own(guide):
    """The standard error knows of the noise of mini-batches, 14 nats; with one for all it was 0.1."""
    data = torch.randn(100)
    precision = 1.0 + len(data)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data), subsample_size=20) as indices:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=data[indices])

    def posterior():
        pyro.sample("mean", dist.Normal(data.sum() / precision, precision**-0.5))

    if guide == "flow":
        posterior = AutoIAF(model)
        posterior.set_up()
        posterior.start_at(data.sum()[None] / precision, torch.tensor([[precision**-0.5]]))
    result = importance(model, posterior, 400)
    covariance = torch.eye(100) + 1.0
    exact = dist.MultivariateNormal(torch.zeros(100), covariance).log_prob(data)
    assert abs(result.elbo - exact) < 4 * result.elbo_se
    assert 0.3 < result.elbo_se < 2.0


def test_the_only_entry_of_a_simplex_is_no_point():
    def simplex():
        pyro.sample("p", dist.Dirichlet(torch.ones(1)))
        pyro.sample("z", dist.Normal(0.0, 0.1))

    assert abs(importance(simplex, AutoNormal(simplex, init_scale=0.1), 100).elbo) < 1e-6


@pytest.mark.parametrize(
    "guide_of", [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger]
)
def test_messenger_guides(guide_of):
    """They run the model themselves: its data are not part of the guide's density."""
    data, model = conjugate.counts(), conjugate.gamma_poisson
    guide = guide_of(model, init_scale=0.5)
    for of in (guide, lambda data: guide(data)):
        result = importance(model, of, 1000, data)
        error = result.log_evidence - conjugate.gamma_poisson_evidence()
        assert abs(error) < 4 * result.log_evidence_se + 0.02


# The Pareto tail: k-hat, and smoothed weights

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
    tail = fit_tail(CONSTANT[name])
    assert tail.khat == 0
    assert torch.equal(smooth_tail(CONSTANT[name], tail), CONSTANT[name].double())


@pytest.mark.parametrize("name", HOPELESS)
def test_weights_that_mean_nothing_have_the_largest_khat(name):
    assert fit_tail(HOPELESS[name]).khat == WORST_KHAT


@pytest.mark.parametrize("name", FINITE)
def test_khat_is_finite(name):
    tail = fit_tail(FINITE[name])
    assert math.isfinite(tail.khat)
    assert tail.khat < WORST_KHAT
    assert 0 < tail.khat_se < 1
    smoothed = smooth_tail(FINITE[name], tail)
    assert smoothed.shape == FINITE[name].shape
    assert not smoothed.isnan().any()
    assert smoothed.max() <= FINITE[name][FINITE[name].isfinite()].max()


def test_tails_of_columns_are_pyros_of_each():
    columns = [weights for kind in (CONSTANT, HOPELESS, FINITE) for weights in kind.values()]
    columns = [weights.double() for weights in columns if len(weights) == 1000]
    columns += [pareto_log_weights(k, 1000) for k in (0.01, 0.5, 1.5, 20.0)]
    for weights, tail in zip(columns, fit_tails(torch.stack(columns, 1))):
        assert tuple(tail) == pytest.approx(tuple(fit_tail(weights)), nan_ok=True)
        if math.isfinite(tail.scale):
            above = weights[weights > tail.log_cutoff]
            assert len(above) == tail.size
            expected = fit_generalized_pareto((above - tail.log_cutoff).expm1())
            assert (tail.khat, tail.scale) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0])
def test_standard_error_by_simulation(k):
    """60 fits of 300 tail weights: their sd is known to 9 %, their mean to an eighth of it.

    The prior counts as ten more weights, at 0.5. An exponential tail has an index of 0.
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


def test_tail_of_index_zero_is_exponential():
    """The limit of the quantiles of small indices."""
    weights = pareto_log_weights(0.5)
    tail = fit_tail(weights)
    limit, near = (smooth_tail(weights, tail._replace(khat=k)) for k in (0.0, 1e-6))
    assert torch.allclose(limit, near, atol=1e-4)
    assert not torch.equal(limit, weights)


@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match=r"log_weights: expected shape \(S,\), got"):
        fit_tail(torch.zeros(shape))
