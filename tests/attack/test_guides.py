# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Guides of random models: densities, draws, predictions and importance weights, against Pyro."""

import warnings
from functools import partial

import torch
from hypothesis import assume
from hypothesis import strategies as st
from pyro import poutine

from pyro_artransform import AutoAutoregressive, AutoIAF, AutoMAF, spline_autoregressive
from pyro_artransform.diagnostics import importance
from pyro_artransform.diagnostics.importance_weights import log_weights
from pyro_artransform.testing import redraw
from tests.attack.effort import attack
from tests.attack.models import densities_by_pyro, random_models, runs_in_pyro

GUIDES = {
    "iaf": partial(AutoIAF, num_transforms=2, hidden_dims=4),
    "maf": partial(AutoMAF, num_transforms=1, hidden_dims=[5, 4]),
    "diagonal": partial(AutoIAF, num_transforms=1, hidden_dims=3, full_rank=False),
    "spline": partial(AutoAutoregressive, flow=partial(spline_autoregressive, hidden_dims=4)),
}
#: what is refused with a reason, by this package or by Pyro: supports that depend on other latents, and
#: that of GeneralizedPareto, which PyTorch says is an interval up to infinity
REFUSALS = (
    "depends on other latents",
    "no continuous latent",
    "no latent variables",
    "is a discrete latent",
    "in the sequential plate",
    "can be mapped",
)


def made(kind, model, number):
    """A guide at random parameters; none where it refuses the model, and has a reason."""
    guide = GUIDES[kind](model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guide.set_up()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        assume(not any(reason in str(error) for reason in REFUSALS))
        raise
    start = {
        n: v.clone()
        for n, v in guide.transform.state_dict().items()
        if n.endswith(("loc", "log_scale"))
    }
    redraw(guide.transform, 0.5, number)
    guide.transform.load_state_dict(start, strict=False)
    return guide


@st.composite
def cases(draw):
    model = draw(random_models())
    return draw(st.sampled_from(sorted(GUIDES))), model, draw(st.integers(0, 99))


@attack(few=9, case=cases())
def test_draws_and_densities(case):
    """Densities by a guide's trace, its own draws and given values; shapes, supports and order of draws."""
    kind, random, number = case
    model = random.wrapped()
    assume(runs_in_pyro(model))
    guide = made(kind, model, number)
    torch.manual_seed(number)
    latents = guide._spec.latents
    with torch.no_grad():
        z, log_q = guide.rsample_and_log_prob(5)
        values, ladj = latents.constrain_with_ladj(z)
        inside = latents.unconstrain_with_ladj(values)[0]
        sure = ((inside - z).abs() <= 1e-9 * (1 + z.abs())).all(-1)  # the way back keeps the digits
        found = guide.log_prob(values)
        assert torch.allclose(found[sure], (log_q - ladj)[sure], rtol=1e-6, atol=1e-6)
        assert torch.allclose(guide.get_posterior().log_prob(z), log_q, rtol=1e-7, atol=1e-7)
        with poutine.block():
            trace = poutine.trace(guide).get_trace()
        drawn = {name: trace.nodes[name]["value"] for name in latents.sites}
        if sure.all():
            assert torch.allclose(guide.log_prob(drawn), trace.log_prob_sum(), rtol=1e-5, atol=1e-5)
    _, by_path = guide.rsample_and_log_prob(3, path=True)
    assert by_path.isfinite().all()
    draws, median = guide.sample_posterior(7), guide.median(num_samples=50)
    quantiles = guide.quantiles([0.1, 0.5, 0.9], num_samples=50)
    for name, site in latents.sites.items():
        value = draws[name]
        assert (value.shape, median[name].shape) == ((7, *site.shape), site.shape)
        is_inside = site.support.check(value).all() or value.abs().max() > 1e6
        assert is_inside or _rounded(site, value)
        assert quantiles[name].shape == (3, *site.shape)
        assert (quantiles[name].diff(dim=0) >= 0).all()


def _rounded(site, value):
    """Whether values are outside by round-off alone: a Cholesky factor, a simplex."""
    again = site.bijection(site.bijection.inv(value))
    return bool((again - value).abs().max() < 1e-6)


@attack(few=6, case=cases())
def test_importance_weights(case):
    """Of a guide that was never trained, against Pyro's trace of the model at each draw."""
    kind, random, number = case
    model = random.wrapped()
    assume(runs_in_pyro(model))
    guide = made(kind, model, number)
    torch.manual_seed(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z, weights = log_weights(model, guide, 20)
        result = importance(model, guide, 60)
    with torch.no_grad():
        log_q = guide.get_posterior().log_prob(z)
        expected = densities_by_pyro(model, z) - log_q
    sure = expected.isfinite()
    assert torch.allclose(weights[sure], expected[sure], rtol=1e-6, atol=1e-6), (weights, expected)
    assert result.num_samples == 60
    if result.num_nonfinite < 60:
        assert result.elbo <= result.log_evidence + 1e-6 + 4 * result.elbo_se
