# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What a fit to draws refuses, warns of and skips."""

import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoAmortized, FlowDistribution, conditional_maf, maf
from pyro_artransform.inference import DrawsConfig, FitError
from pyro_artransform.transforms import standardize
from tests.inference.forward_kl import skewed, test_fit_draws
from tests.inference.forward_kl.test_fit_draws import base, fitted, flow, small

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


def test_steps_that_are_not_finite_are_skipped_and_end_it():
    data = skewed.sample(100)
    q = flow(data)
    with torch.no_grad():
        next(iter(q.transforms[0].parameters())).fill_(torch.nan)
    with (
        pytest.warns(UserWarning, match="the density begins nan nats"),
        pytest.raises(FitError, match="not finite in 10 steps in a row"),
    ):
        fitted(q, data, config=DrawsConfig(max_skips=10))


# Bad input


def test_far_start_is_warned_of():
    data = 1000 + skewed.sample(100)
    q = FlowDistribution(base(), maf(3, hidden_dims=8))
    with pytest.warns(
        UserWarning, match=r"end the flow with transforms.standardize\(draws\)"
    ) as found:
        fitted(q, data)
    assert found[0].filename == test_fit_draws.__file__


def bad_calls():
    data = skewed.sample(100)
    q, guide = flow(data), small(skewed.model)
    conditional = dist.ConditionalTransformedDistribution(base(), [conditional_maf(3, 2)])
    draws, context = skewed.sites(data), torch.randn(100, 2)
    at_edge = {**draws, "size": torch.zeros(100)}
    amortized = AutoAmortized(skewed.model)
    fixed = dist.TransformedDistribution(base(), [standardize(data)])
    return {
        "no density": (maf(3), data, {}, TypeError, "density: expected a guide .* got Inverse"),
        "amortized": (amortized, draws, {}, TypeError, "one vector of all latents.* AutoAmortized"),
        "nothing to train": (fixed, data, {}, TypeError, "modules with parameters"),
        "few": (q, data[:19], {}, ValueError, "draws: expected 20 or more, got 19"),
        "shape": (
            q,
            data[:, :2],
            {},
            ValueError,
            r"expected shape \(n, \*event_shape\) = \(n, 3\)",
        ),
        "dimensions": (q, data[0], {}, ValueError, r"draws: expected shape \(n, D\)"),
        "nan": (
            q,
            data / 0 * 0,
            {},
            ValueError,
            "draws: expected finite numbers, got others in 100",
        ),
        "constant": (q, data * 0, {}, ValueError, r"got constant ones: \[0, 1, 2\]"),
        "a tensor": (
            guide,
            data,
            {},
            TypeError,
            "draws: expected a dict of the values of each site",
        ),
        "a site": (guide, {"pair": data}, {}, ValueError, "values: expected the sites"),
        "at an edge": (guide, at_edge, {}, ValueError, "size|got 100 of 100 at an edge"),
        "context of a guide": (guide, draws, {"context": context}, ValueError, "none for a guide"),
        "context": (q, data, {"context": context}, ValueError, "none for a density without one"),
        "no context": (conditional, data, {}, ValueError, "expected one for each draw, got none"),
        "rows of context": (
            conditional,
            data,
            {"context": context[:5]},
            ValueError,
            "context: expected a row for each of 100 draws, got 5",
        ),
        "arguments": (q, data, {"y": 3}, ValueError, "arguments of a model for a guide only"),
        "steps": (q, data, {"max_steps": 0}, ValueError, "max_steps: expected a positive integer"),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_input(name):
    density, draws, options, error, words = bad_calls()[name]
    with pytest.raises(error, match=words):
        fitted(density, draws, **options)


def test_guide_whose_parameters_are_fixed():
    guide = small(skewed.model)
    guide()
    guide.requires_grad_(False)
    with pytest.raises(ValueError, match="density: expected parameters to train, got none"):
        fitted(guide, skewed.sites(skewed.sample(100)))


def test_batch_shape():
    q = dist.TransformedDistribution(base().expand((5,)), [maf(3, hidden_dims=8)])
    with pytest.raises(ValueError, match=r"and a batch shape \(5,\)"):
        fitted(q, skewed.sample(100))


def test_inference_mode():
    data = skewed.sample(100)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"outside of torch\.inference_mode"),
    ):
        fitted(flow(data), data)
