# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value

from pyro_artransform.inference.evaluation.evaluate import (
    ModelAndGuide,
    evaluate,
    evaluate_minibatches,
)
from pyro_artransform.inference.evaluation.verdict import FitStatus
from pyro_artransform.inference.objectives.minibatch_elbo import PassEstimate
from pyro_artransform.inference.result import FitResult
from pyro_artransform.joint import LogJoint
from tests.inference import loaders, models


def subject_of(model, guide, *args):
    guide(*args)
    return ModelAndGuide(model, guide, args, {}, LogJoint(model, args))


def good_guide():
    guide = models.small(models.gaussian)
    guide.set_up()
    guide.start_at(torch.ones(3), torch.tensor(models.SCALE_TRIL))
    return guide


def test_a_good_guide(quick):
    subject = subject_of(models.gaussian, good_guide())
    found = evaluate(subject, None, FitStatus(), quick.evaluation)
    assert found.verdict.trusted
    fields = found.result_fields()
    assert fields.keys() < set(FitResult.__dataclass_fields__)
    assert fields["num_samples"] == quick.evaluation.num_samples
    assert fields["importance"] is found.weights
    assert fields["khat"] == found.weights.khat
    assert abs(fields["elbo"]) < 1e-6
    assert abs(fields["log_evidence"]) < 1e-6


def test_a_missed_mode(quick):
    model = models.two_modes(3, 20.0, 0.5)
    guide = models.small(model, init_loc_fn=init_to_value(values={"z": torch.zeros(3)}))
    guide.set_up()
    guide.start_at(torch.zeros(3), torch.eye(3))
    found = evaluate(subject_of(model, guide), None, FitStatus(), quick.evaluation)
    assert not found.verdict.trusted
    assert "starts disagree" in found.verdict.words


def test_a_fit_that_was_interrupted(quick):
    status = FitStatus(is_complete=False)
    found = evaluate(subject_of(models.gaussian, good_guide()), None, status, quick.evaluation)
    assert "interrupted" in found.verdict.words
    assert abs(found.elbo) < 1e-6


def test_a_guide_that_is_a_point(quick):
    guide = AutoDelta(models.location)
    found = evaluate(subject_of(models.location, guide), None, FitStatus(), quick.evaluation)
    assert "AutoDelta" in found.verdict.words


def test_a_model_that_draws_mini_batches(quick):
    guide = AutoNormal(models.subsampled)
    subject = subject_of(models.subsampled, guide)
    found = evaluate(subject, None, FitStatus(), quick.evaluation)
    assert "sub-samples" in found.verdict.words
    fields = found.result_fields()
    assert fields["importance"] is None
    assert not math.isnan(fields["khat"])
    assert fields["num_samples"] == quick.evaluation.num_noisy_samples


class Pass:
    """An objective that knows what its pass over a loader gives."""

    def __init__(self, log_weights):
        self._found = PassEstimate(-3.0, 0.1, 500, 5, 1.0, log_weights)

    def over_a_pass(self):
        return self._found


@pytest.mark.parametrize("known", [True, False])
def test_a_pass_over_a_loader(known, quick):
    x, y = loaders.rows(10)
    guide = AutoNormal(loaders.regression)
    subject = subject_of(loaders.regression, guide, x, y)
    objective = Pass(0.01 * torch.randn(500) - 3.0 if known else None)
    found = evaluate_minibatches(subject, objective, FitStatus(), quick.evaluation)
    assert not found.verdict.trusted
    assert "the ELBO of all data is -3.000 ± 0.100" in found.verdict.words
    assert ("mass elsewhere" in found.verdict.words) == known
    assert ("diagnostics.sbc" in found.verdict.words) != known
    fields = found.result_fields()
    assert (fields["elbo"], fields["num_samples"]) == (-3.0, 500)
    assert math.isnan(fields["khat"]) != known
    assert fields["importance"] is found.weights


def test_a_pass_with_a_point(quick):
    x, y = loaders.rows(loaders.SIZE)
    subject = subject_of(loaders.regression, AutoDelta(loaders.regression), x, y)
    found = evaluate_minibatches(subject, Pass(None), FitStatus(), quick.evaluation)
    assert "AutoDelta" in found.verdict.words
    assert "of a batch, on the average," in found.verdict.words
