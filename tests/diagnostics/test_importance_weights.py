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
    values = LogJoint(model).latents.constrain(latent)
    for i in range(5):
        row = {name: value[i] for name, value in values.items()}
        log_p = poutine.trace(poutine.condition(model, row)).get_trace().log_prob_sum()
        assert weights[i] == pytest.approx((log_p - _density(guide, row)).item(), abs=1e-8)


def _density(guide, row):
    if isinstance(guide, AutoIAF):
        return guide.log_prob(row)
    if isinstance(guide, AutoNormal):
        # all sites are on the real line
        parameters = {k: (getattr(guide.locs, k), getattr(guide.scales, k)) for k in row}
        return sum(dist.Normal(*parameters[k]).log_prob(row[k]).sum() for k in row)
    return poutine.trace(poutine.condition(guide, row)).get_trace().log_prob_sum()


def test_chunks():
    sizes = []

    class Guide(AutoIAF):
        def rsample_and_log_prob(self, n, path=False):
            sizes.append(n)
            return super().rsample_and_log_prob(n, path)

    latent, weights = log_weights(conjugate.local_normals, Guide(conjugate.local_normals), 2500)
    assert latent.shape == (2500, 4)
    assert weights.shape == (2500,)
    assert not weights.requires_grad
    assert sizes == [1000, 1000, 500]


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


# Guides that are not of the model


class _ThreeNumbers:
    def __call__(self):
        pass

    def rsample_and_log_prob(self, n, path=False):
        return torch.zeros(n, 3), torch.zeros(n)


def test_guides_of_other_latents():
    def only_mean():
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"all latents of the model, got none for \['z'\]"):
        importance(conjugate.local_normals, only_mean, 10)
    with pytest.raises(ValueError, match=r"latents of shape \(10, 4\) .* got \(10, 3\)"):
        importance(conjugate.local_normals, _ThreeNumbers(), 10)

    def only_kind(data):
        with pyro.plate("data", len(data)):
            pyro.sample("kind", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"all latents of the model, got none for \['loc'\]"):
        importance(conjugate.mixture, only_kind, 10, torch.tensor(conjugate.REALS))


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
    for use in (importance, psis_resample):
        with pytest.raises(ValueError, match="made for another model"):
            use(model, AutoIAF(funnel), 20)
    with pytest.raises(ValueError, match="made for another model"):
        fit(model, AutoIAF(funnel), num_steps=2, progress=False)


@pytest.mark.parametrize(
    "distribution", [dist.Uniform(0.0, 10.0), dist.Bernoulli(0.5)], ids=["u", "mixture"]
)
@pytest.mark.parametrize("infer", [{}, {"is_auxiliary": True}], ids=["", "auxiliary"])
def test_guides_whose_density_of_the_latents_is_not_known(distribution, infer):
    """The density of the auxiliary site came into the ELBO, 2.3 nats above the evidence."""

    def guide():
        u = pyro.sample("u", distribution, infer=infer)
        pyro.sample("z", dist.Normal(0.1 * u, 1.0))

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"others that determine them by a Delta.*got \['u'\]"):
        importance(model, guide, 10)


def test_a_guide_that_broadcasts_in_a_plate():
    def pair(loc):
        with pyro.plate("pair", 2):
            pyro.sample("z", dist.Normal(loc, 1.0))

    with pytest.raises(ValueError, match=r'site "z", invalid log_prob shape'):
        importance(lambda: pair(0.0), lambda: pair(torch.zeros(2, 1)), 10)


# Mini-batches, discrete sites and guides that run the model


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


@pytest.mark.parametrize(
    "distribution",
    [dist.Bernoulli(0.9), dist.OneHotCategorical(torch.tensor([0.9, 0.1]))],
)
def test_discrete_sites_of_few_values_are_no_points(distribution):
    """Three draws that are the same, of type float, were taken for AutoDelta: an ELBO of -inf."""

    def model():
        k = pyro.sample("k", distribution)
        pyro.sample("z", dist.Normal(3 * k.sum(), 1.0))

    result = importance(model, model, 100)
    assert (result.elbo, result.log_evidence) == (0.0, 0.0)


def test_the_only_entry_of_a_simplex_is_no_point():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(1)))
        pyro.sample("z", dist.Normal(0.0, 0.1))

    assert abs(importance(model, AutoNormal(model, init_scale=0.1), 100).elbo) < 1e-6


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
