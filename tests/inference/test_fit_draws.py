# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import signal
import sys

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import (
    AutoAmortized,
    AutoIAF,
    AutoMAF,
    AutoStructuredFlow,
    FlowDistribution,
    conditional_maf,
    maf,
)
from pyro_artransform.diagnostics import importance
from pyro_artransform.inference import FitError, fit_draws
from pyro_artransform.inference.optimization import training
from pyro_artransform.transforms import chain, standardize, standardize_context
from tests.inference import skewed


@pytest.fixture(autouse=True)
def frequent_checks(monkeypatch):
    # the name of the module in its package is that of the function
    module = sys.modules["pyro_artransform.inference.fit_draws"]
    monkeypatch.setattr(module, "_CHECK_EVERY", 10)
    return module


def fitted(*args, **kwargs):
    """A fit of few steps, for tests of what it does and not of how well it does it."""
    return fit_draws(*args, **{"progress": False, "seed": 0, "max_steps": 40, **kwargs})


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
    result = fitted(guide, draws, max_steps=300)

    def log_prob(y):
        return guide.log_prob(skewed.sites(y)) + y[:, 2]

    kl, se = gap(log_prob)
    assert -3 * se < kl < 0.1
    truth = (skewed.log_prob(y := skewed.sample(50_000)) - y[:, 2]).mean().item()
    assert abs(result.log_likelihood - (truth - kl)) < 4 * result.log_likelihood_se
    found = importance(skewed.model, guide, 4000)
    # k-hat is around 0.5: the smoothed tail biases by as much as a hundredth
    assert abs(found.log_evidence) < 4 * found.log_evidence_se + 0.02
    # it goes on from where it is
    again = fitted(guide, draws, max_steps=1)
    assert result.start == "the Gaussian of the draws' moments"
    assert again.start == "the guide as it was"
    assert gap(log_prob)[0] < kl + 0.02


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


def test_the_result_is_repeatable_and_leaves_the_generators():
    data, state, found = skewed.sample(300), torch.get_rng_state(), []
    for _ in range(2):
        torch.manual_seed(3)
        q = flow(data)
        torch.set_rng_state(state)
        found.append(fitted(q, data))
    result = found[0]
    assert result.history == found[1].history
    assert torch.equal(torch.get_rng_state(), state)
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


def test_it_ends_with_the_best_parameters(monkeypatch, frequent_checks):
    """With steps that are too large each check is worse than the start, which is what remains."""
    monkeypatch.setattr(frequent_checks, "_STEP_SIZE", 10.0)
    data = skewed.sample(300)
    q = flow(data)
    before = q.log_prob(data).detach()
    result = fitted(q, data)
    assert max(result.history) == result.history[0]
    torch.testing.assert_close(q.log_prob(data).detach(), before)


@pytest.mark.parametrize("kind", ["IAF", "full", "independent", "structured"])
def test_guides(kind):
    options = {"num_transforms": 1, "hidden_dims": 8}
    guide = {
        "IAF": lambda: AutoIAF(skewed.model, **options),
        "full": lambda: AutoMAF(skewed.model, **options),
        "independent": lambda: AutoMAF(skewed.model, full_rank=False, **options),
        "structured": lambda: AutoStructuredFlow(skewed.model),
    }[kind]()
    result = fitted(guide, skewed.sites(skewed.sample(300)), max_steps=20)
    assert result.history[-1] > result.history[0] - 0.5
    assert all(value.isfinite().all() for value in guide.sample_posterior(5).values())


def test_the_next_call_puts_what_was_learned_into_the_store():
    guide = small(skewed.model)
    guide()
    fitted(guide, skewed.sites(skewed.sample(100)))
    learned = {name: p.detach().clone() for name, p in guide.named_parameters()}
    guide()
    store = [p for _, p in pyro.get_param_store().named_parameters()]
    for name, parameter in guide.named_parameters():
        torch.testing.assert_close(parameter.detach(), learned[name])
        assert any(parameter is stored for stored in store)


def test_transformed_distributions_of_pyro():
    """Of transforms that act on vectors and on numbers, from here and from elsewhere."""
    data = skewed.sample(1000).exp()
    transforms = [maf(3, hidden_dims=16), standardize(data.log()), dist.transforms.ExpTransform()]
    q = dist.TransformedDistribution(base(), transforms)
    before = q.log_prob(data).mean()
    fitted(q, data, max_steps=200)
    assert q.log_prob(data).mean() > before + 0.1


@pytest.mark.parametrize("is_inverse", [False, True])
def test_flow_of_pyro(is_inverse):
    """Its inverse, which owns no parameters, is trained as well."""
    data = skewed.sample(1000)
    flow = dist.transforms.affine_autoregressive(3, [8])
    transforms = [flow.inv if is_inverse else flow, standardize(data)]
    result = fitted(dist.TransformedDistribution(base(), transforms), data, max_steps=20)
    assert result.history[-1] > result.history[0]


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


# Steps that are not finite


def test_skipped_steps_are_counted(monkeypatch):
    data = skewed.sample(300)
    q, calls = flow(data), []

    def failing(self, value):
        calls.append(value)
        return log_prob(self, value) * (torch.nan if len(calls) in (5, 6) else 1.0)

    log_prob = dist.Independent.log_prob
    monkeypatch.setattr(dist.Independent, "log_prob", failing)
    result = fitted(q, data)
    assert (result.num_steps, result.num_skipped) == (40, 2)
    assert "skipped  2 steps" in repr(result)


def test_many_steps_in_a_row_that_are_not_finite_end_it(monkeypatch):
    monkeypatch.setattr(training, "_MAX_SKIPS", 10)
    data = skewed.sample(100)
    q = flow(data)
    with torch.no_grad():
        next(iter(q.transforms[0].parameters())).fill_(torch.nan)
    with (
        pytest.warns(UserWarning, match="the density begins nan nats"),
        pytest.raises(
            FitError, match="not finite in 10 steps in a row, because of the log-density of draws"
        ),
    ):
        fitted(q, data)


# Bad input


def test_far_start_is_warned_of():
    data = 1000 + skewed.sample(100)
    q = FlowDistribution(base(), maf(3, hidden_dims=8))
    with pytest.warns(
        UserWarning, match=r"end the flow with transforms.standardize\(draws\)"
    ) as found:
        fitted(q, data)
    assert found[0].filename == __file__


def bad_calls():
    data = skewed.sample(100)
    q, guide = flow(data), small(skewed.model)
    conditional = dist.ConditionalTransformedDistribution(base(), [conditional_maf(3, 2)])
    draws, context = skewed.sites(data), torch.randn(100, 2)
    at_edge = {**draws, "size": torch.zeros(100)}
    amortized = AutoAmortized(skewed.model)
    fixed = dist.TransformedDistribution(base(), [standardize(data)])
    batch = dist.TransformedDistribution(base().expand((5,)), [maf(3, hidden_dims=8)])
    given = {"context": context}

    def with_data(values):
        skewed.model()

    return {
        "never called": (AutoIAF(with_data), draws, {}, TypeError, "set_up, with the .* 'values'"),
        "no density": (maf(3), data, {}, TypeError, "density: expected a guide .* got Inverse"),
        "amortized": (amortized, draws, {}, TypeError, "one vector of all latents.* AutoAmortized"),
        "nothing to train": (fixed, data, {}, TypeError, "density: expected parameters to train"),
        "few": (q, data[:19], {}, ValueError, "draws: expected 20 or more, got 19"),
        "batch shape": (batch, data, {}, ValueError, r"batch shape \(5,\)"),
        "nan": (q, data / 0 * 0, {}, ValueError, "draws: expected finite .* in 100"),
        "a tensor": (guide, data, {}, TypeError, "draws: expected a dict of the values of each"),
        "a site": (guide, {"pair": data}, {}, ValueError, "values: expected the sites"),
        "at an edge": (guide, at_edge, {}, ValueError, "size|got 100 of 100 at an edge"),
        "context": (q, data, given, ValueError, "none, for a density without one"),
        "no context": (conditional, data, {}, ValueError, "expected one for each draw, got none"),
        "rows": (conditional, data, {"context": context[:5]}, ValueError, "100 draws, got 5"),
        "arguments": (q, data, {"y": 3}, ValueError, "arguments of a model for a guide only"),
        "steps": (q, data, {"max_steps": 0}, ValueError, "max_steps: expected a positive integer"),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_input(name):
    density, draws, options, error, words = bad_calls()[name]
    with pytest.raises(error, match=words):
        fitted(density, draws, **options)


def test_inference_mode():
    data = skewed.sample(100)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"outside of torch\.inference_mode"),
    ):
        fitted(flow(data), data)
