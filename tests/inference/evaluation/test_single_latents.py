# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value

from pyro_artransform import fit
from pyro_artransform.inference.config import EvaluationConfig, FitConfig
from pyro_artransform.inference.evaluation.evaluate import (
    ModelAndGuide,
    evaluate,
    look_at_marginals,
)
from pyro_artransform.inference.evaluation.verdict import FitStatus
from pyro_artransform.inference.result import FitResult
from pyro_artransform.joint import LogJoint
from tests.diagnostics.autoregression import PathGuide, model_of
from tests.inference import models
from tests.inference.conftest import QUICK

ZERO = torch.zeros(())
OFF = torch.cat([torch.zeros(39), torch.full((1,), 0.35)])
CONFIG = replace(QUICK.evaluation, num_chains=64, num_chain_steps=6)


def evaluated(model, guide, *args, config=CONFIG):
    guide(*args)
    subject = ModelAndGuide(model, guide, args, {}, LogJoint(model, args))
    return subject, evaluate(subject, None, FitStatus(), FitConfig(evaluation=config))


def alternating(x):
    """Useless weights, and marginals that are right: errors that cancel along a path."""
    scale = 1 + 0.15 * (1 - 2 * (torch.arange(x.shape[-1]) % 2))
    scale = torch.cat([torch.ones(1), scale[1:]])
    return scale * x, scale.log().sum().expand(len(x))


def test_single_latents_are_right_where_the_joint_is_not():
    subject, evaluation = evaluated(model_of(100), PathGuide(100, distort=alternating))
    assert not evaluation.verdict.trusted
    look = look_at_marginals(subject, evaluation, CONFIG)
    assert look.trusted is True
    assert look.found.num_chains == 64
    fields = look.result_fields(evaluation)
    assert fields.keys() < set(FitResult.__dataclass_fields__)
    assert fields["verdict"].startswith("Not trusted: ")
    assert "Single latents can be trusted: means of all 100 latents within" in fields["verdict"]
    assert fields["trusted"] is False
    assert fields["marginals_trusted"] is True


def test_single_latents_are_wrong_as_well():
    subject, evaluation = evaluated(model_of(100), PathGuide(100, 0.7))
    look = look_at_marginals(subject, evaluation, CONFIG)
    assert look.trusted is False
    assert "Nor can single latents be trusted: " in look.words
    assert "sds are off by more than 15 %" in look.words


def test_weights_that_are_trusted_tell_of_single_latents():
    subject, evaluation = evaluated(model_of(100), PathGuide(100))
    assert evaluation.verdict.trusted
    look = look_at_marginals(subject, evaluation, CONFIG)
    assert look.trusted is True
    assert (look.found.num_chains, look.found.num_gradients) == (0, 0)
    assert look.found.mean_bound < 0.01
    assert "by weights" in repr(look.found)
    words = look.result_fields(evaluation)["verdict"]
    assert words.startswith("Trusted: ")
    assert "Of single latents, as far as the guide draws: means of all 100 latents within" in words


def test_one_latent_may_be_off_where_the_joint_is_trusted():
    """One mean is 0.35 sd off, which costs 0.06 nats."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(40), 1.0).to_event(1))

    guide = AutoNormal(model, init_scale=1.0, init_loc_fn=init_to_value(values={"z": OFF}))
    subject, evaluation = evaluated(model, guide)
    assert evaluation.verdict.trusted
    look = look_at_marginals(subject, evaluation, CONFIG)
    assert look.trusted is False
    assert "1 of 40 means is off by more than 0.15 sd (that of z[39] by 0.3" in look.words


def test_chains_tell_where_weights_leave_it_open():
    few = replace(CONFIG, max_kept=100 * 20)
    subject, evaluation = evaluated(model_of(100), PathGuide(100, 0.98), config=few)
    assert evaluation.verdict.trusted
    assert len(evaluation.drawn.latents) == 20
    look = look_at_marginals(subject, evaluation, few)
    assert look.trusted is True
    assert look.found.num_chains == 64
    assert "Of single latents, by short chains: means of all 100 latents within" in look.words


def test_more_draws_tell_where_weights_of_few_latents_leave_it_open():
    few = replace(CONFIG, max_kept=10 * 10, num_for_few=10)
    subject, evaluation = evaluated(model_of(10), PathGuide(10, 0.92), config=few)
    assert len(evaluation.drawn.latents) == 10
    assert "errors are known too little" in look_at_marginals(subject, evaluation, few).words
    more = replace(few, num_for_few=4000)
    assert look_at_marginals(subject, evaluation, more).trusted is True


def test_no_chains_for_few_latents():
    subject, evaluation = evaluated(model_of(29), PathGuide(29, 0.5))
    assert not evaluation.verdict.trusted
    assert look_at_marginals(subject, evaluation, CONFIG) == (None, None, "")
    assert EvaluationConfig().min_for_chains == 30


def test_the_only_sd_of_a_trusted_guide_may_be_off():
    """0.75 of the posterior's, which costs 0.07 nats."""

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoNormal(model, init_scale=0.75, init_loc_fn=init_to_value(values={"z": ZERO}))
    subject, evaluation = evaluated(model, guide, config=replace(CONFIG, num_samples=10_000))
    assert evaluation.verdict.trusted
    look = look_at_marginals(subject, evaluation, CONFIG)
    assert look.trusted is False
    assert "1 of 1 sds is off by more than 15 % (that of z is 0.7" in look.words


def test_missed_modes_are_of_single_latents_too():
    subject, evaluation = evaluated(model_of(100), PathGuide(100, distort=alternating))
    look = look_at_marginals(subject, evaluation._replace(lost_mass=0.5), CONFIG)
    assert look.trusted is False
    assert "as long as one stays in the modes" in look.words


def _by_loop():
    z = pyro.sample("z", dist.Normal(torch.zeros(30), 1.0).to_event(1))
    if z[0] > 0:
        pyro.factor("none", torch.tensor(0.0))


def _subsampled():
    loc = pyro.sample("loc", dist.Normal(torch.zeros(30), 1.0).to_event(1))
    with pyro.plate("data", 10, subsample_size=5) as indices:
        pyro.sample("y", dist.Normal(loc[..., :1], 1.0), obs=torch.ones(10)[indices])


@pytest.mark.parametrize(
    ("model", "words"), [(_by_loop, "one draw after the other"), (_subsampled, "sub-samples")]
)
def test_where_chains_are_not_run_it_is_said(model, words):
    subject, evaluation = evaluated(model, AutoNormal(model, init_scale=0.2))
    look = look_at_marginals(subject, evaluation, CONFIG)
    assert look.found is None
    assert look.trusted is None
    assert "Single latents were not looked at" in look.words
    assert words in look.words


def _stepwise():
    """A density without a gradient anywhere."""
    z = pyro.sample("z", dist.Normal(torch.zeros(30), 1.0).to_event(1).mask(False))
    pyro.factor("steps", -(z.detach() ** 2).sum(-1))


def test_a_density_without_a_gradient_is_said():
    subject, evaluation = evaluated(_stepwise, AutoNormal(_stepwise, init_scale=0.2))
    look = look_at_marginals(subject, evaluation, CONFIG)
    assert look.trusted is None
    assert "Single latents could not be looked at" in look.words


def test_a_point_is_not_looked_at():
    subject, evaluation = evaluated(model_of(30), AutoDelta(model_of(30)))
    assert look_at_marginals(subject, evaluation, CONFIG) == (None, None, "")


def test_in_a_fit(quick):
    """A mean-field fit of a correlated path: the verdict and the table say what is wrong."""
    model = model_of(40)
    config = replace(quick, evaluation=CONFIG)
    guide = AutoNormal(model, init_scale=0.3)
    result = fit(model, guide, num_steps=30, num_particles=8, progress=False, config=config)
    assert result.marginals_trusted is False
    assert result.marginals.mean_shift["z"].shape == (40,)
    assert result.verdict.endswith(f"{result.marginals.words}.")
    assert "marginals" in result.rows()


def test_few_latents_in_a_fit():
    guide = models.small(models.regression)
    result = fit(
        models.regression, guide, num_steps=20, num_particles=8, progress=False, config=QUICK
    )
    assert result.trusted == (result.marginals is not None)
