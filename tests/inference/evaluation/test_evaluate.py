# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
import re
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal, init_to_value

from pyro_artransform.diagnostics import fit_tail
from pyro_artransform.diagnostics.checks import Check
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide, Weighted
from pyro_artransform.inference.evaluation import evaluate as evaluation
from pyro_artransform.inference.evaluation.evaluate import (
    draw,
    evaluate,
    evaluate_minibatches,
    lost_modes,
)
from pyro_artransform.inference.evaluation.verdict import FitStatus
from pyro_artransform.inference.optimization.minibatches import PassEstimate
from pyro_artransform.inference.result import FitResult
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling.run_mcmc import from_nothing
from tests.diagnostics.conjugate import PathGuide, alternating, path
from tests.inference import loaders, models
from tests.sampling.densities import two_modes

OFF = torch.cat([torch.zeros(39), torch.full((1,), 0.35)])


def subject_of(model, guide, *args):
    guide(*args)
    return ModelAndGuide(model, guide, args, {}, LogJoint(model, args))


@pytest.fixture(autouse=True)
def num_samples(monkeypatch):
    def set_to(count):
        monkeypatch.setattr(evaluation, "_NUM_SAMPLES", count)

    set_to(500)
    return set_to


def evaluated(model, guide):
    return evaluate(subject_of(model, guide), FitStatus())


def guide_at(model, loc, scale_tril, start=None):
    guide = models.small(model, init_loc_fn=init_to_value(values=start or {"z": loc}))
    guide.set_up()
    guide.start_at(loc, scale_tril)
    return guide


def good_guide():
    return guide_at(models.gaussian, torch.ones(3), torch.tensor(models.SCALE_TRIL))


def test_a_good_guide():
    found = evaluated(models.gaussian, good_guide())
    assert found["trusted"]
    assert found.keys() < set(FitResult.__dataclass_fields__)
    assert found["num_samples"] == 500
    assert found["khat"] == found["importance"].khat
    assert abs(found["elbo"]) < 1e-6
    assert abs(found["log_evidence"]) < 1e-6


class TooNarrow:
    """A posterior with tails so heavy for its guide that the index of the weights is ``khat``.

    They are the tails of a Normal seen by a narrower one, and of so little weight that the gap is small.
    """

    def __init__(self, khat, share=0.05):
        self.khat, self.share = khat, share
        latents = SimpleNamespace(latent_dim=1)
        self.log_joint = SimpleNamespace(is_random=False, strategy="", latents=latents)

    def weighted_draws(self, count):
        z = torch.randn(count, 1)
        tail = 0.5 * self.khat * z.square().sum(-1) + 0.5 * math.log(1 - self.khat)
        rest = torch.full_like(tail, math.log1p(-self.share))
        yield Weighted(z, {}, torch.logaddexp(tail + math.log(self.share), rest))


@pytest.mark.parametrize(
    ("khat", "most", "more"),
    [(0.8, 10**6, 9000), (0.5, 10**6, 7000), (0.8, 4000, 4000), (0.8, 999, 0), (0.1, 10**6, 0)],
)
def test_more_draws_near_the_limit_of_khat(khat, most, more, monkeypatch):
    torch.manual_seed(2)
    monkeypatch.setattr(evaluation, "_NUM_MORE", 9000)
    log_weights, latents, _ = draw(TooNarrow(khat), 1000, max_more_draws=most)
    assert log_weights.shape == (1000 + more,)
    assert latents.shape == (1000, 1)
    found = fit_tail(log_weights)
    assert abs(found.khat - khat) < 3 * found.khat_se


def test_a_pass_over_a_loader():
    x, y = loaders.rows(10)
    guide = AutoNormal(loaders.regression)
    subject = subject_of(loaders.regression, guide, x, y)
    seen = PassEstimate(-3.0, 0.1, 500, 5, 1.0)
    found = evaluate_minibatches(subject, seen, FitStatus(), "of noise")
    assert not found["trusted"]
    assert "the ELBO of all data is -3.000 ± 0.100" in found["verdict"]
    assert "unknown, since of noise. " in found["verdict"]
    assert "check the method on simulated data" in found["verdict"]
    assert (found["elbo"], found["num_samples"]) == (-3.0, 500)
    assert math.isnan(found["khat"])
    assert found["importance"] is None


def test_a_model_that_mixes_draws(num_samples):
    """One draw of the guide takes a branch that no draw of the prior took: all would weigh less."""
    num_samples(2000)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if (z.abs() > 2.5).any():
            pyro.factor("tail", torch.tensor(-20.0))

    guide = guide_at(model, torch.zeros(1), torch.eye(1), {"z": torch.tensor(0.0)})
    log_joint = LogJoint(model).by_strategy("plate")
    subject = ModelAndGuide(model, guide, (), {}, log_joint)
    with pytest.warns(UserWarning, match="many draws at once"):
        found = evaluate(subject, FitStatus())
    # 25 ± 5 draws take the branch; one by one, else all of them would
    assert abs(found["log_evidence"] - math.log(0.98758)) < 0.02
    assert "one at a time" in found["verdict"]
    assert log_joint.strategy == "plate"  # others share the density


@pytest.mark.parametrize(("dtype", "is_coarse"), [(torch.float32, True), (torch.float64, False)])
def test_draws_that_their_dtype_hardly_tells_apart(dtype, is_coarse):
    """1 - z is about 4e-8, and the numbers of float32 there are 6e-8 apart."""
    loc = torch.tensor(17.0, dtype=dtype)

    def model():
        z = pyro.sample("z", dist.Uniform(torch.zeros_like(loc), 1.0))
        pyro.sample("x", dist.Exponential(torch.ones_like(loc) * 1e7), obs=1 - z)

    guide = guide_at(model, loc[None], torch.eye(1, dtype=dtype), {"z": loc.sigmoid()})
    words = evaluated(model, guide)["verdict"]
    assert ("the posterior of site z is hardly wider than the spacing" in words) == is_coarse


# Beside the draws of an ensemble


def chains_of(model, num_samples=400, **options):
    ensemble = from_nothing(LogJoint(model), num_samples)
    ensemble.run(num_samples, **options)
    return ensemble


def judged(model, guide, ensemble, num_samples=4000):
    with patch.object(evaluation, "_NUM_SAMPLES", num_samples):
        return evaluate(subject_of(model, guide), FitStatus(), ensemble=ensemble)


def test_single_latents_are_right_where_the_joint_is_not():
    model = partial(path, 100)
    found = judged(model, PathGuide(100, distort=alternating), chains_of(model, 1000))
    assert found.keys() < set(FitResult.__dataclass_fields__)
    assert found["verdict"].startswith("Not trusted: ")
    assert " Marginals trusted: all means within 0." in found["verdict"]
    assert found["trusted"] is False
    assert found["marginals_trusted"] is True


def test_single_latents_are_wrong_as_well():
    model = partial(path, 100)
    found = judged(model, PathGuide(100, 0.7), chains_of(model))
    assert not found["marginals"].trusted
    assert " Marginals not trusted: " in found["verdict"]
    assert "sds are off by more than 15 %" in found["verdict"]


@pytest.mark.parametrize(
    ("loc", "scale", "words"),
    [
        # which costs 0.06 nats
        (OFF, 1.0, "1 of 40 means is off by more than 0.15 posterior sd (z[39] by 0."),
        # and 0.07
        (torch.zeros(1), 0.75, "1 of 1 sds is off by more than 15 % (z[0]: 0.7"),
    ],
    ids=["mean", "sd"],
)
def test_a_latent_that_is_off_though_weights_are_good(loc, scale, words):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(len(loc)), 1.0).to_event(1))

    start = init_to_value(values={"z": loc.to(torch.get_default_dtype())})
    guide = AutoNormal(model, init_scale=scale, init_loc_fn=start)
    found = judged(model, guide, chains_of(model, 2000), 10_000)
    assert [failed.check for failed in found["judged"].failed] == [Check.MARGINALS]
    assert not found["marginals"].trusted
    assert words in found["verdict"]


def test_without_chains_that_have_mixed_single_latents_are_not_checked():
    apart = chains_of(two_modes(3, 20.0, 0.4), most=16)
    assert not apart.convergence().has_mixed
    for ensemble, reason in ((None, "there are no chains"), (apart, "chains have not mixed")):
        found = judged(models.gaussian, good_guide(), ensemble)
        assert found["marginals"] is None
        assert found["verdict"].endswith(f"Marginals not checked, since {reason}.")
        assert found["trusted"] == (ensemble is None)
    assert "chains have not mixed: R-hat is" in found["verdict"]


def test_a_mode_that_the_guide_has_lost():
    """Of 30 %, 20 sds away: no weight says so."""
    model = two_modes(2, 20.0, 0.7)
    ensemble = chains_of(model)
    locs = torch.tensor([[-10.0, -10.0], [10.0, 10.0]])
    found = judged(model, guide_at(model, locs[0], torch.eye(2)), ensemble)
    assert found["khat"] < 0.7
    assert not found["trusted"]
    assert re.search("about (2[5-9]|3[0-5]) % of the posterior is in 1 other", found["verdict"])
    one, other = locs[:, None] + torch.randn(2, 1000, 2)
    assert lost_modes(ensemble, torch.cat([one, other])) == (0.0, 0, True, ())
    # a tenth of what it should have is enough
    assert lost_modes(ensemble, torch.cat([one, other[:40]])).num_lost == 0
    assert lost_modes(ensemble, torch.cat([one, other[:10]])).num_lost == 1
    assert lost_modes(ensemble, other).lost_mass == pytest.approx(0.7, abs=0.05)


def test_chains_that_found_no_other_modes():
    found = judged(models.gaussian, good_guide(), chains_of(models.gaussian))
    assert found["trusted"]
    assert "and chains found no other modes." in found["verdict"]
