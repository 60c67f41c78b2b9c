# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal, init_to_value

from pyro_artransform.diagnostics import fit_tail
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide, Weighted
from pyro_artransform.inference.config import EvaluationConfig
from pyro_artransform.inference.evaluation.evaluate import (
    MarginalVerdict,
    draw,
    evaluate,
    evaluate_minibatches,
    judge_marginals,
)
from pyro_artransform.inference.evaluation.missed_modes import NOT_SEARCHED, MissedModes
from pyro_artransform.inference.evaluation.verdict import FitStatus
from pyro_artransform.inference.optimization.minibatches import PassEstimate
from pyro_artransform.inference.result import FitResult
from pyro_artransform.joint import LogJoint
from pyro_artransform.time_limit import TimeLimit
from tests.diagnostics.conjugate import PathGuide, alternating, path
from tests.inference import loaders, models
from tests.inference.conftest import QUICK

OFF = torch.cat([torch.zeros(39), torch.full((1,), 0.35)])
CONFIG = replace(QUICK.evaluation, num_by_chains=400, max_by_chains=150)


def subject_of(model, guide, *args):
    guide(*args)
    return ModelAndGuide(model, guide, args, {}, LogJoint(model, args))


def evaluated(model, guide, config=CONFIG):
    subject = subject_of(model, guide)
    return subject, evaluate(subject, FitStatus(), replace(QUICK, evaluation=config))


def guide_at(model, loc, scale_tril, start=None):
    """A guide that is a Gaussian."""
    guide = models.small(model, init_loc_fn=init_to_value(values=start or {"z": loc}))
    guide.set_up()
    guide.start_at(loc, scale_tril)
    return guide


def good_guide():
    return guide_at(models.gaussian, torch.ones(3), torch.tensor(models.SCALE_TRIL))


def test_a_good_guide():
    _, found = evaluated(models.gaussian, good_guide())
    assert found.verdict.trusted
    fields = found.result_fields(MarginalVerdict())
    assert fields.keys() < set(FitResult.__dataclass_fields__)
    assert fields["num_samples"] == CONFIG.num_samples
    assert fields["importance"] is found.weights
    assert fields["khat"] == found.weights.khat
    assert abs(fields["elbo"]) < 1e-6
    assert abs(fields["log_evidence"]) < 1e-6


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
    [(0.7, 10**6, 9000), (0.9, 10**6, 9000), (0.7, 4000, 4000), (0.7, 999, 0), (0.1, 10**6, 0)],
)
def test_more_draws_near_the_limit_of_khat(khat, most, more):
    torch.manual_seed(0)
    config = EvaluationConfig(num_samples=1000, num_more_samples=9000)
    log_weights, latents = draw(TooNarrow(khat), config, max_more_draws=most)
    assert log_weights.shape == (1000 + more,)
    assert latents.shape == (1000, 1)
    found = fit_tail(log_weights)
    assert abs(found.khat - khat) < 3 * found.khat_se


def test_a_guide_that_is_a_point():
    _, found = evaluated(models.location, AutoDelta(models.location))
    assert "AutoDelta" in found.verdict.words


def test_a_model_that_draws_mini_batches():
    _, found = evaluated(models.subsampled, AutoNormal(models.subsampled))
    assert "sub-samples" in found.verdict.words
    fields = found.result_fields(MarginalVerdict())
    assert fields["importance"] is None
    assert not math.isnan(fields["khat"])
    assert fields["num_samples"] == CONFIG.num_noisy_samples


def test_a_pass_over_a_loader():
    x, y = loaders.rows(10)
    guide = AutoNormal(loaders.regression)
    subject = subject_of(loaders.regression, guide, x, y)
    seen = PassEstimate(-3.0, 0.1, 500, 5, 1.0)
    found = evaluate_minibatches(subject, seen, FitStatus(), "of noise")
    assert not found.verdict.trusted
    assert "the ELBO of all data is -3.000 ± 0.100" in found.verdict.words
    assert "not known, since of noise. " in found.verdict.words
    assert "diagnostics.sbc" in found.verdict.words
    fields = found.result_fields(MarginalVerdict())
    assert (fields["elbo"], fields["num_samples"]) == (-3.0, 500)
    assert math.isnan(fields["khat"])
    assert fields["importance"] is None


def test_a_model_that_mixes_draws():
    """One draw of the guide takes a branch that no draw of the prior took: all would weigh less."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if (z.abs() > 2.5).any():
            pyro.factor("tail", torch.tensor(-20.0))

    guide = guide_at(model, torch.zeros(1), torch.eye(1), {"z": torch.tensor(0.0)})
    log_joint = LogJoint(model)
    log_joint.strategy, log_joint.obstacle = "plate", ""
    subject = ModelAndGuide(model, guide, (), {}, log_joint)
    config = replace(QUICK, evaluation=replace(CONFIG, num_samples=2000))
    with pytest.warns(UserWarning, match="many draws at once"):
        found = evaluate(subject, FitStatus(), config)
    # 25 ± 5 draws take the branch; one by one, else all of them would
    assert abs(found.weights.log_evidence - math.log(0.98758)) < 0.02
    assert "one at a time" in found.verdict.words
    assert log_joint.strategy == "vmap"


@pytest.mark.parametrize(("dtype", "is_coarse"), [(torch.float32, True), (torch.float64, False)])
def test_draws_that_their_dtype_hardly_tells_apart(dtype, is_coarse):
    """1 - z is about 4e-8, and the numbers of float32 there are 6e-8 apart."""
    loc = torch.tensor(17.0, dtype=dtype)

    def model():
        z = pyro.sample("z", dist.Uniform(torch.zeros_like(loc), 1.0))
        pyro.sample("x", dist.Exponential(torch.ones_like(loc) * 1e7), obs=1 - z)

    guide = guide_at(model, loc[None], torch.eye(1, dtype=dtype), {"z": loc.sigmoid()})
    words = evaluated(model, guide)[1].verdict.words
    assert ("the posterior of site z is about as narrow as the spacing" in words) == is_coarse


# Single latents


def checked(model, guide, config=CONFIG):
    subject, evaluation = evaluated(model, guide, config)
    return evaluation, judge_marginals(subject, evaluation, config)


def test_single_latents_are_right_where_the_joint_is_not():
    config = replace(CONFIG, num_samples=4000)
    guide = PathGuide(100, distort=alternating)
    subject, evaluation = evaluated(partial(path, 100), guide, config)
    found = judge_marginals(subject, evaluation, config)
    assert not evaluation.verdict.trusted
    assert found.trusted is True
    assert found.found.num_chains > 0
    fields = evaluation.result_fields(found)
    assert fields.keys() < set(FitResult.__dataclass_fields__)
    assert fields["verdict"].startswith("Not trusted: ")
    assert "Single latents can be trusted: means of all 100 latents within" in fields["verdict"]
    assert fields["trusted"] is False
    assert fields["marginals_trusted"] is True
    assert "not searched" not in fields["verdict"]
    # within the modes that the guide has
    lost = MissedModes(lost_mass=0.5, num_lost=1)
    found = judge_marginals(subject, evaluation._replace(missed=lost), config)
    assert found.trusted is False
    assert "as long as one stays in the modes" in found.words
    # of more latents than are searched
    found = judge_marginals(subject, evaluation._replace(missed=NOT_SEARCHED), config)
    assert found.trusted is True
    assert found.words.endswith(". Mass elsewhere was not searched for.")


def test_single_latents_are_wrong_as_well():
    _, found = checked(partial(path, 100), PathGuide(100, 0.7))
    assert found.trusted is False
    assert "Nor can single latents be trusted: " in found.words
    assert "sds are off by more than 15 %" in found.words


def test_weights_that_are_trusted_tell_of_single_latents():
    evaluation, found = checked(partial(path, 100), PathGuide(100))
    assert evaluation.verdict.trusted
    assert found.trusted is True
    assert found.found.num_chains == 0
    assert found.found.mean_bound < 0.01
    assert "by weights" in repr(found.found)
    words = evaluation.result_fields(found)["verdict"]
    assert words.startswith("Trusted: ")
    assert "Of single latents, as far as the guide draws: means of all 100 latents within" in words


@pytest.mark.parametrize(
    ("loc", "scale", "words"),
    [
        # which costs 0.06 nats
        (OFF, 1.0, "1 of 40 means is off by more than 0.15 sd (that of z[39] by 0.3"),
        # and 0.07
        (torch.zeros(1), 0.75, "1 of 1 sds is off by more than 15 % (that of z[0] is 0.7"),
    ],
    ids=["mean", "sd"],
)
def test_a_latent_may_be_off_where_the_joint_is_trusted(loc, scale, words):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(len(loc)), 1.0).to_event(1))

    start = init_to_value(values={"z": loc.to(torch.get_default_dtype())})
    guide = AutoNormal(model, init_scale=scale, init_loc_fn=start)
    evaluation, found = checked(model, guide, replace(CONFIG, num_samples=10_000))
    assert evaluation.verdict.trusted
    assert found.trusted is False
    assert words in found.words


def _wider_tails():
    """A tenth of the posterior is half as wide again as the guide is: weights have no variance."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    tail = dist.Normal(0.0, 1.5).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    pyro.factor("tails", torch.logaddexp(math.log(0.9) + 0 * tail, math.log(0.1) + tail).sum(-1))


@pytest.mark.parametrize("kind", [AutoDiagonalNormal, AutoNormal])
def test_where_weights_of_the_guide_leave_it_open(kind):
    """Draws further out than the guide's tell, or, of a guide without a transform, chains."""
    located = init_to_value(values={"z": torch.zeros(3)})
    guide = kind(_wider_tails, init_scale=1.0, init_loc_fn=located)
    config = replace(CONFIG, num_samples=10_000)
    evaluation, found = checked(_wider_tails, guide, config)
    assert evaluation.verdict.trusted
    assert evaluation.weights.khat > 0.4
    by, bound = "by chains", 0.06
    if kind is AutoDiagonalNormal:
        by, bound = "as far as the guide draws", 0.02
    assert (found.found.num_chains > 0) == (kind is AutoNormal)
    assert f"Of single latents, {by}: means of all 3 latents within" in found.words
    # the sd of the posterior is the root of 1.125
    assert (found.found.sd_ratio["z"] - 1.125**-0.5).abs().max() < bound


def _by_loop():
    z = pyro.sample("z", dist.Normal(torch.zeros(30), 1.0).to_event(1))
    if float(z[0].detach()) > 0:
        pyro.factor("none", torch.tensor(0.0))


@pytest.mark.parametrize(
    ("model", "words"), [(_by_loop, "one draw after the other"), (models.subsampled, "sub-samples")]
)
def test_where_chains_are_not_run_it_is_said(model, words):
    _, found = checked(model, AutoNormal(model, init_scale=0.2))
    assert found.found is None
    assert found.trusted is None
    assert "Single latents were not checked" in found.words
    assert words in found.words


def _stepwise():
    """A density without a gradient anywhere."""
    z = pyro.sample("z", dist.Normal(torch.zeros(30), 1.0).to_event(1).mask(False))
    pyro.factor("steps", -(z.detach() ** 2).sum(-1))


def test_a_density_without_a_gradient_is_said():
    _, found = checked(_stepwise, AutoNormal(_stepwise, init_scale=0.2))
    assert found.trusted is None
    assert "Single latents could not be checked" in found.words


def test_chains_without_time_are_said():
    """Ctrl-C at the first density of chains, which have one draw each then."""
    limit, is_due = TimeLimit(), []

    def model():
        if is_due:
            is_due.pop()
            limit.interrupt()
        return path(100)

    subject, evaluation = evaluated(model, PathGuide(100, 0.7))
    is_due.append(True)
    with limit:
        found = judge_marginals(subject, evaluation, CONFIG)
    assert found == (None, None, " Single latents were not checked: there was no time.")
