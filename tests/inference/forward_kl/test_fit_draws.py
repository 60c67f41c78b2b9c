# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
import signal

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import (
    AutoIAF,
    AutoMAF,
    AutoStructuredFlow,
    FlowDistribution,
    conditional_maf,
    maf,
)
from pyro_artransform.diagnostics import importance
from pyro_artransform.inference import DrawsConfig, DrawsResult, fit_draws
from pyro_artransform.transforms import chain, standardize, standardize_context
from tests.inference.forward_kl import skewed

#: Fewer steps, for tests of what a fit does and not of how well it does it.
SHORT = DrawsConfig(max_steps=40, look_every=10)


def fitted(*args, **kwargs):
    return fit_draws(*args, **{"progress": False, "seed": 0, "config": SHORT, **kwargs})


def base(dim=skewed.DIM):
    return dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)


def flow(data, **options):
    options = {"num_transforms": 2, "hidden_dims": 8, **options}
    return FlowDistribution(
        base(data.shape[-1]), chain([maf(data.shape[-1], **options), standardize(data)])
    )


def small(model):
    return AutoMAF(model, num_transforms=2, hidden_dims=8)


def gap(log_prob, n=20_000):
    """The KL divergence from the known density, and its standard error, by new draws."""
    fresh = skewed.sample(n)
    with torch.no_grad():
        ratios = skewed.log_prob(fresh) - log_prob(fresh)
    return ratios.mean().item(), ratios.std().item() / n**0.5


# How well


def test_density_of_a_known_distribution():
    """The Gaussian of the same moments is 0.41 nats away; 2,000 draws tell the rest to less than 0.1."""
    data = skewed.sample(2000)
    q = flow(data, hidden_dims=32)
    result = fit_draws(q, data, seed=0, progress=False)
    kl, se = gap(q.log_prob)
    assert -3 * se < kl < 0.1
    truth = skewed.log_prob(skewed.sample(50_000)).mean().item()
    # the same by the draws that were held out, to four of their standard errors
    assert abs(result.log_likelihood - (truth - kl)) < 4 * result.log_likelihood_se
    assert result.num_held_out == 200
    assert "no more probable" in result.stopped_because


def test_guide_by_draws_of_its_posterior():
    """As above; with such a guide importance sampling has the evidence, which is 0 in log."""
    draws = skewed.sites(skewed.sample(2000))
    guide = AutoMAF(skewed.model, num_transforms=2, hidden_dims=32)
    result = fit_draws(guide, draws, seed=0, progress=False)

    def log_prob(y):
        return guide.log_prob(skewed.sites(y)) + y[:, 2]

    kl, se = gap(log_prob)
    assert -3 * se < kl < 0.1
    truth = (skewed.log_prob(y := skewed.sample(50_000)) - y[:, 2]).mean().item()
    assert abs(result.log_likelihood - (truth - kl)) < 4 * result.log_likelihood_se
    assert result.start == "the Gaussian of the draws' moments"
    found = importance(skewed.model, guide, 4000)
    # k-hat is around 0.5: the smoothed tail biases by as much as a hundredth
    assert abs(found.log_evidence) < 4 * found.log_evidence_se + 0.02


def test_conditional_density_of_a_known_posterior():
    """theta ~ Normal(0, 1), x = theta + noise that grows with x's second coordinate: a Gaussian each."""
    theta, scale = torch.randn(4000, 1), torch.rand(4000, 1) + 0.2
    context = torch.cat([1000 * (theta + scale * torch.randn(4000, 1)), scale], -1)
    inner = conditional_maf(1, context_dim=2, num_transforms=1, hidden_dims=32)
    transform = chain([standardize_context(inner, context), standardize(theta)])
    q = dist.ConditionalTransformedDistribution(base(1), [transform])
    result = fit_draws(q, theta, context=context, seed=0, progress=False)
    variance = 1 / (1 + scale**-2)
    exact = dist.Normal(variance * context[:, :1] / 1000 / scale**2, variance.sqrt()).to_event(1)
    with torch.no_grad():
        kl = (exact.log_prob(theta) - q.condition(context).log_prob(theta)).mean().item()
    assert abs(kl) < 0.03
    assert result.log_likelihood == pytest.approx(exact.log_prob(theta).mean().item(), abs=0.2)


# What it does


def test_it_is_repeatable_and_leaves_the_generators():
    data, found = skewed.sample(300), []
    state = torch.get_rng_state()
    for _ in range(2):
        torch.manual_seed(3)
        q = flow(data)
        torch.set_rng_state(state)
        found.append(fitted(q, data).history)
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_result():
    data = skewed.sample(300)
    result = fitted(flow(data), data)
    assert isinstance(result, DrawsResult)
    assert (result.num_steps, result.num_held_out, result.num_skipped) == (40, 30, 0)
    assert len(result.history) == 1 + 4
    assert result.stopped_because.startswith("all 40 steps that it may take were taken")
    assert 0 < result.log_likelihood_se < 1
    first, *rest = repr(result).splitlines()
    assert first == (
        f"DrawsResult: {result.log_likelihood:.3f} ± {result.log_likelihood_se:.3f} nats a draw, of 30 "
        "that were held out"
    )
    assert [line.split()[0] for line in rest] == ["steps", "start"]


def test_a_gain_that_could_be_chance_is_none():
    """Of normal data a new flow is right already, and what 40 draws prefer is noise."""
    data = torch.randn(160, 3)
    q = flow(data)
    before = q.log_prob(data).detach()
    result = fitted(q, data, max_steps=50)
    assert "could be chance" in result.stopped_because
    torch.testing.assert_close(q.log_prob(data).detach(), before)


def test_it_ends_with_the_best_parameters():
    """With steps that are too large each look is worse than the start, which is what remains."""
    data = skewed.sample(300)
    q = flow(data)
    before = q.log_prob(data).detach()
    config = DrawsConfig(step_size=10.0, step_factors=(1.0,), max_steps=40, look_every=10)
    result = fitted(q, data, config=config)
    assert max(result.history) == result.history[0]
    torch.testing.assert_close(q.log_prob(data).detach(), before)


@pytest.mark.parametrize("kind", [AutoIAF, AutoMAF, AutoStructuredFlow])
def test_guides(kind):
    options = {} if kind is AutoStructuredFlow else {"num_transforms": 1, "hidden_dims": 8}
    guide = kind(skewed.model, **options)
    result = fitted(guide, skewed.sites(skewed.sample(300)))
    assert result.history[-1] > result.history[0] - 0.5
    assert all(value.isfinite().all() for value in guide.sample_posterior(5).values())


def test_guide_without_correlations():
    guide = AutoMAF(skewed.model, num_transforms=1, hidden_dims=8, full_rank=False)
    assert math.isfinite(fitted(guide, skewed.sites(skewed.sample(300))).log_likelihood)


def test_a_guide_that_is_good_already_goes_on():
    draws = skewed.sites(skewed.sample(2000))
    guide = AutoMAF(skewed.model)
    first = fitted(guide, draws, max_steps=300, config=None)
    before = guide.log_prob(draws).mean()
    second = fitted(guide, draws, max_steps=1)
    assert (first.start, second.start) == (
        "the Gaussian of the draws' moments",
        "the guide as it was",
    )
    assert guide.log_prob(draws).mean() > before - 0.02


@pytest.mark.parametrize("is_called", [False, True])
def test_the_next_call_puts_what_was_learned_into_the_store(is_called):
    guide = small(skewed.model)
    if is_called:
        guide()
    fitted(guide, skewed.sites(skewed.sample(100)))
    learned = {name: p.detach().clone() for name, p in guide.named_parameters()}
    guide()
    store = [p for _, p in pyro.get_param_store().named_parameters()]
    for name, parameter in guide.named_parameters():
        torch.testing.assert_close(parameter.detach(), learned[name])
        assert any(parameter is stored for stored in store)


def test_draws_by_chain():
    draws = {
        k: v.reshape(3, 100, *v.shape[1:]) for k, v in skewed.sites(skewed.sample(300)).items()
    }
    assert fitted(small(skewed.model), draws).num_held_out == 30


def test_guide_of_a_model_with_arguments():
    def model(count, scale=1.0):
        pyro.sample("z", dist.Normal(torch.zeros(count), scale).to_event(1))

    guide = small(model)
    fitted(guide, {"z": torch.randn(100, 3)}, 3, scale=2.0)
    assert guide.sample_posterior(2)["z"].shape == (2, 3)


def test_guide_without_its_model(tmp_path):
    guide = small(skewed.model)
    guide()
    guide.save(tmp_path / "guide.pt")
    loaded = AutoMAF.load(tmp_path / "guide.pt")
    assert fitted(loaded, skewed.sites(skewed.sample(100))).num_steps == 40


def test_transformed_distributions_of_pyro():
    """Of transforms that act on vectors and on numbers, from here and from elsewhere."""
    data = skewed.sample(1000).exp()
    transforms = [maf(3, hidden_dims=16), standardize(data.log()), dist.transforms.ExpTransform()]
    q = dist.TransformedDistribution(base(), transforms)
    before = q.log_prob(data).mean()
    fitted(q, data, max_steps=200)
    assert q.log_prob(data).mean() > before + 0.1


def test_flow_of_pyro():
    data = skewed.sample(1000)
    transforms = [dist.transforms.affine_autoregressive(3, [8]).inv, standardize(data)]
    q = dist.TransformedDistribution(base(), transforms)
    with pytest.raises(TypeError, match="transforms that are modules"):
        fitted(q, data)  # its inverse owns nothing
    q = dist.TransformedDistribution(
        base(), [dist.transforms.affine_autoregressive(3, [8]), standardize(data)]
    )
    before = q.log_prob(data).mean()
    fitted(q, data, max_steps=100)
    assert q.log_prob(data).mean() > before + 0.1


def test_float32():
    data = skewed.sample(300)
    q = flow(data)
    q.transforms[0].float()
    q.base_dist = dist.Normal(torch.zeros(3).float(), torch.ones(3).float()).to_event(1)
    assert math.isfinite(fitted(q, data).log_likelihood)


def test_under_no_grad():
    with torch.no_grad():
        data = skewed.sample(300)
        q = flow(data)
        result = fitted(q, data)
    assert result.history[-1] != result.history[0]


def test_interrupt_keeps_what_was_learned(monkeypatch):
    data = skewed.sample(300)
    q = flow(data)
    calls = []

    def interrupting(self, value):
        calls.append(value)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        return log_prob(self, value)

    log_prob = dist.Independent.log_prob
    monkeypatch.setattr(dist.Independent, "log_prob", interrupting)
    result = fitted(q, data)
    assert result.num_steps < 40
    assert result.stopped_because.startswith("it was interrupted")
    assert len(result.history) > 1


def test_bar(capsys):
    pytest.importorskip("tqdm")
    data = skewed.sample(100)
    fitted(flow(data), data, progress=True)
    shown = capsys.readouterr().err
    assert "40step" in shown
    assert "log-likelihood -" in shown
