# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

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

from pyro_artransform import AutoIAF, fit
from pyro_artransform.diagnostics import importance, log_weights, psis_resample
from pyro_artransform.joint import LogJoint
from tests.diagnostics import conjugate


@pytest.mark.parametrize("guide", [AutoIAF, AutoNormal, "by hand"])
def test_weights_are_those_of_the_latents(guide):
    """Of each draw: the log joint minus the density that the guide's trace gives it."""
    model = conjugate.local_normals
    guide = conjugate.local_guide if guide == "by hand" else guide(model, init_scale=0.5)
    latent, weights = log_weights(model, guide, 5)
    log_joint = LogJoint(model)
    values = log_joint.latents.constrain(latent)
    for i in range(5):
        row = {name: value[i] for name, value in values.items()}
        log_p = poutine.trace(poutine.condition(model, row)).get_trace().log_prob_sum()
        log_q = _density(guide, row, latent[i])
        assert weights[i] == pytest.approx((log_p - log_q).item(), abs=1e-8)


def _density(guide, row, latent):
    if isinstance(guide, AutoIAF):
        return guide.log_prob(row)
    if isinstance(guide, AutoNormal):
        # all sites are on the real line
        return sum(
            dist.Normal(guide.locs.get_parameter(name), getattr(guide.scales, name))
            .log_prob(value)
            .sum()
            for name, value in row.items()
        )
    return poutine.trace(poutine.condition(guide, row)).get_trace().log_prob_sum()


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2500])
def test_chunks(monkeypatch, count):
    sizes = []

    class Guide(AutoIAF):
        def rsample_and_log_prob(self, n, path=False):
            sizes.append(n)
            assert not torch.is_grad_enabled()
            return super().rsample_and_log_prob(n, path)

    latent, weights = log_weights(conjugate.local_normals, Guide(conjugate.local_normals), count)
    assert latent.shape == (count, 4)
    assert weights.shape == (count,)
    assert not weights.requires_grad
    assert sum(sizes) == count
    assert max(sizes) <= 1000


def test_log_joint_of_the_caller_is_used():
    class Shifted(LogJoint):
        def __call__(self, z):
            return super().__call__(z) + 100

    model = conjugate.local_normals
    guide = AutoIAF(model)
    guide()
    pyro.set_rng_seed(0)
    _, expected = log_weights(model, guide, 10, log_joint=LogJoint(model))
    pyro.set_rng_seed(0)
    _, found = log_weights(model, guide, 10, log_joint=Shifted(model))
    assert torch.allclose(found, expected + 100)


def test_arguments_of_both():
    def model(data, scale=1.0):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=data)

    data, kwargs = torch.tensor(0.7), {"scale": 2.0}

    def guide(data, scale=1.0):
        pyro.sample("z", dist.Normal(0.8 * data, 0.8**0.5))

    _, weights = log_weights(model, guide, 10, (data,), kwargs)
    evidence = dist.Normal(0.0, 5.0**0.5).log_prob(data)
    assert torch.allclose(weights, evidence.expand(10))


def test_no_latent_vector_of_a_discrete_guide():
    model = poutine.infer_config(conjugate.mixture, lambda site: {})
    with pytest.raises(ValueError, match="expected neither discrete sites nor"):
        log_weights(model, conjugate.mixture_guide, 10, (torch.tensor(conjugate.REALS),))


def test_handlers_around_it_see_nothing():
    with poutine.trace() as traced:
        log_weights(conjugate.local_normals, conjugate.local_guide, 10)
        log_weights(conjugate.local_normals, AutoIAF(conjugate.local_normals), 10)
    assert set(traced.trace.nodes) <= {"_INPUT", "_RETURN"}


@pytest.mark.parametrize("make", [AutoIAF, AutoNormal])
def test_a_guide_first_met_here_trains(make):
    """Its parameters are made while no gradients are kept."""
    guide = make(conjugate.local_normals)
    log_weights(conjugate.local_normals, guide, 10)
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = pyro.infer.SVI(conjugate.local_normals, guide, optim, pyro.infer.Trace_ELBO())
    for _ in range(4):
        svi.step()
    assert before
    assert not any(map(torch.equal, before, guide.parameters()))


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


@pytest.mark.parametrize(
    "model",
    [
        poutine.reparam(funnel, {"theta": LocScaleReparam(0.0)}),
        other_order,
        other_shapes,
    ],
    ids=["names", "order", "shapes"],
)
def test_a_guide_of_another_model(model):
    """Its latents have as many dimensions, so that no number shows it."""
    for compare in (importance, psis_resample):
        with pytest.raises(ValueError, match="made for another model"):
            compare(model, AutoIAF(funnel), 20)
    with pytest.raises(ValueError, match="made for another model"):
        fit(model, AutoIAF(funnel), num_steps=2, progress=False)


def _subsampled_counts(data):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(data), subsample_size=len(data) - 1) as indices:
        pyro.sample("y", dist.Poisson(rate), obs=data[indices])


@pytest.mark.parametrize(
    "guide_of", [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger]
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_messenger_guides(guide_of, is_wrapped):
    """They run the model themselves: its data are no part of the guide's density."""
    data = conjugate.counts()
    guide = guide_of(conjugate.gamma_poisson, init_scale=0.5)
    result = importance(
        conjugate.gamma_poisson, (lambda data: guide(data)) if is_wrapped else guide, 2000, data
    )
    expected = conjugate.gamma_poisson_evidence()
    assert abs(result.log_evidence - expected) < 4 * result.log_evidence_se + 0.02


def test_messenger_guide_of_minibatches():
    data = conjugate.counts()
    guide = AutoNormalMessenger(_subsampled_counts, init_scale=0.3)
    result = importance(_subsampled_counts, guide, 300, data)
    assert abs(result.log_evidence - conjugate.gamma_poisson_evidence()) < 3.0
