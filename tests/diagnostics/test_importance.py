# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoNormal,
    AutoStructured,
    init_to_value,
)

from pyro_artransform import AutoIAF
from pyro_artransform.diagnostics import Importance, importance
from pyro_artransform.diagnostics.psis import WORST_KHAT
from tests.diagnostics import conjugate


def _guide_list(model, **options):
    guides = AutoGuideList(model)
    guides.append(AutoIAF(poutine.block(model, expose=["rate"]), **options))
    return guides


def _by_hand(data):
    pyro.sample("rate", dist.Gamma(10.0, 4.0))


def _with_auxiliary(data):
    latent = pyro.sample("latent", dist.Normal(0.8, 0.35), infer={"is_auxiliary": True})
    pyro.sample("rate", dist.Delta(latent.exp(), log_density=-latent))


def _with_auxiliary_point(data):
    half = pyro.sample("half", dist.Gamma(10.0, 8.0), infer={"is_auxiliary": True})
    double = dist.transforms.AffineTransform(0.0, 2.0)
    pyro.sample("rate", dist.TransformedDistribution(dist.Delta(half), double))


GUIDES = {
    **{kind.__name__: kind for kind in (AutoIAF, AutoNormal, AutoDiagonalNormal, AutoStructured)},
    "AutoGuideList": _guide_list,
    "by_hand": lambda model, **options: _by_hand,
    "auxiliary": lambda model, **options: _with_auxiliary,
    "transformed auxiliary": lambda model, **options: _with_auxiliary_point,
}


def assert_evidence(result, expected, within):
    """The estimate is right within four standard errors, and these are small."""
    assert abs(result.log_evidence - expected) < 4 * result.log_evidence_se
    assert result.log_evidence_se < within


@pytest.mark.parametrize("name", GUIDES)
def test_evidence_of_any_guide(name):
    located = init_to_value(values={"rate": torch.tensor(2.3)})
    guide = GUIDES[name](conjugate.gamma_poisson, init_scale=0.35, init_loc_fn=located)
    result = importance(conjugate.gamma_poisson, guide, 4000, conjugate.counts())
    expected = conjugate.gamma_poisson_evidence()
    assert_evidence(result, expected, 0.05)
    assert result.elbo < expected + 4 * result.elbo_se
    assert result.khat < 0.7
    assert result.has_good_khat
    assert 400 < result.ess < 4000
    assert (result.num_samples, result.num_nonfinite) == (4000, 0)


@pytest.mark.parametrize("number", [lambda mean: mean, torch.Tensor.item, torch.Tensor.sum])
def test_guides_in_a_plate_or_one_at_a_time(number):
    """Many draws at once have no single number; the sum over draws is wrong, and no shape tells."""

    def guide():
        mean = pyro.sample("mean", dist.Normal(1.0, 0.9))
        with pyro.plate("data", len(conjugate.REALS)):
            locs = 0.8 * torch.tensor(conjugate.REALS) + 0.2 * number(mean)
            pyro.sample("z", dist.Normal(locs, 0.55))

    result = importance(conjugate.local_normals, guide, 1000)
    assert_evidence(result, conjugate.local_normals_evidence(), 0.1)


def test_minibatch_of_the_guide_is_the_models():
    """The ELBO is unbiased; other indices in the model than in the guide would cost 2 nats."""
    reals = torch.tensor(conjugate.REALS)

    def guide():
        mean = pyro.sample("mean", dist.Normal(1.0, 0.9))
        with pyro.plate("data", 3, subsample_size=2) as indices:
            pyro.sample("z", dist.Normal(0.8 * reals[indices] + 0.2 * mean, 0.55))

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 3, subsample_size=2) as indices:
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=reals[indices])

    whole = importance(conjugate.local_normals, conjugate.local_guide, 1000)
    parts = importance(model, guide, 500)
    assert abs(parts.elbo - whole.elbo) < 4 * math.hypot(parts.elbo_se, whole.elbo_se)
    assert parts.elbo_se < 0.1


@pytest.mark.parametrize("guide", [AutoIAF, AutoDiagonalNormal])
def test_enumerated_latents_are_summed_out(guide):
    continuous = poutine.block(conjugate.mixture, hide=["kind"])
    located = init_to_value(values={"loc": torch.tensor(0.5)})
    fitted = guide(continuous, init_loc_fn=located, init_scale=0.8)
    result = importance(conjugate.mixture, fitted, 2000, torch.tensor(conjugate.REALS))
    assert_evidence(result, conjugate.mixture_evidence(), 0.05)


def test_the_posterior_itself():
    result = importance(conjugate.gamma_poisson, conjugate.gamma_guide, 2000, conjugate.counts())
    expected = conjugate.gamma_poisson_evidence()
    assert result.elbo == pytest.approx(expected, abs=1e-10)
    assert result.log_evidence == pytest.approx(expected, abs=1e-10)
    assert result.elbo_se < 1e-10
    assert result.log_evidence_se < 1e-6
    assert result.khat == 0
    assert result.ess == pytest.approx(2000)
    for words in ("k-hat               0.00", "(good)", "2000 of 2000"):
        assert words in repr(result)


@pytest.mark.parametrize("make", [AutoDelta, "partly"])
def test_a_point_is_no_posterior(make):
    """A guide that is a point at some site has an infinite density, whatever its trace says."""

    def partly():
        pyro.sample("mean", dist.Normal(1.0, 0.9))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Delta(torch.tensor(conjugate.REALS)))

    guide = partly if make == "partly" else make(conjugate.local_normals)
    result = importance(conjugate.local_normals, guide, 100)
    assert result.khat == WORST_KHAT
    assert result.elbo == -math.inf
    assert result.ess == 0
    assert result.num_nonfinite == 100


def _rare_branch():
    """Legal in Pyro, one draw at a time; in a plate one draw beyond 12 decides for all."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if (z.abs() > 12).any():
        pyro.factor("tail", torch.tensor(-20.0))


@pytest.mark.parametrize("guide_of", [AutoIAF, AutoNormal])
def test_a_branch_that_mixes_draws(guide_of):
    """Only draws of the guide take the branch; the weights are those of single draws."""
    guide = guide_of(_rare_branch, init_scale=4.0)
    pyro.set_rng_seed(0)
    with pytest.warns(UserWarning, match="many draws at once"):
        result = importance(_rare_branch, guide, 3000)
    assert abs(result.log_evidence) < 0.2


# From weights


def test_estimates_of_weights_of_a_known_distribution():
    """Log-normal weights of mean one: the ELBO is minus half of their variance."""
    sd = 0.3
    result = Importance.from_log_weights(sd * torch.randn(20_000) - sd**2 / 2)
    assert abs(result.elbo + sd**2 / 2) < 4 * result.elbo_se
    assert result.elbo_se == pytest.approx(sd / 20_000**0.5, rel=0.05)
    assert abs(result.log_evidence) < 4 * result.log_evidence_se
    assert result.log_evidence_se == pytest.approx((math.expm1(sd**2) / 20_000) ** 0.5, rel=0.05)
    assert result.ess == pytest.approx(20_000 * math.exp(-(sd**2)), rel=0.02)


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_draws_of_no_weight_are_rejected(value):
    """The guide without them has the ELBO of a density that is larger by the share left."""
    weights = torch.cat([0.1 * torch.randn(995), torch.full((5,), value)])
    result = Importance.from_log_weights(weights)
    assert result.num_nonfinite == 5
    assert result.elbo == pytest.approx(weights[:995].mean().item() + math.log(0.995))
    assert result.elbo <= result.log_evidence
    assert result.khat < 0.7
    assert "5 draws without a finite weight" in repr(result)


@pytest.mark.parametrize("khat", [0.3, 0.6, 0.7])
def test_standard_errors_of_the_evidence_without_a_variance(khat):
    """Of 60 Gaussian guides of a Gaussian; one of a finite variance gives a mean square of 3 at 0.7."""
    scale = (1 - khat) ** 0.5
    squares = []
    for _ in range(60):
        half = torch.randn(10_000, dtype=torch.float64).square() / 2
        found = Importance.from_log_weights(math.log(scale) + (1 - scale**2) * half)
        squares.append((found.log_evidence / found.log_evidence_se) ** 2)
    # the mean of 60 squares has a standard error of 0.18 if they are normal; k-hat is 0.05 too small
    assert 0.5 < sum(squares) / 60 < 2


@pytest.mark.parametrize("scale", [0.01, 0.3, 0.9, 3.0])
def test_a_gaussian_guide_of_a_gaussian(scale):
    """k is 1 - (its sd / the posterior's) squared; no estimate is above the evidence by four errors."""
    z = scale * torch.randn(10_000)
    result = Importance.from_log_weights(math.log(scale) - z**2 / 2 + (z / scale) ** 2 / 2)
    assert result.elbo <= 4 * result.elbo_se + 1e-12
    assert result.log_evidence <= 4 * result.log_evidence_se + 1e-12
    assert result.has_good_khat == (scale > 0.5)
    if scale < 1:
        assert abs(result.khat - (1 - scale**2)) < 4 * result.khat_se


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tail_that_cannot_be_fitted_is_heavy(value):
    weights = torch.randn(1000)
    weights[: 1000 if value == -torch.inf else 100] = value
    found = Importance.from_log_weights(weights)
    assert (found.tail_share, found.has_heavy_tail, found.has_good_khat) == (1.0, True, False)
