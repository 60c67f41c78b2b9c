# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.diagnostics import Importance
from pyro_artransform.inference.config import EvaluationConfig
from pyro_artransform.inference.evaluation.missed_modes import MissedModes
from pyro_artransform.inference.evaluation.verdict import FitStatus
from pyro_artransform.inference.evaluation.verdict import judge as judge_by

NOTHING_ELSE = MissedModes(0.0, 0.001, 0.0, 0)


def judge(importance, missed, status):
    return judge_by(importance, missed, status, EvaluationConfig())


def weights(spread=0.05, size=4000):
    return Importance.from_log_weights(spread * torch.randn(size) - spread**2 / 2)


def heavy(scale):
    """Weights ``1 + scale * x`` of a Pareto variable x of index 1.5."""
    return Importance.from_log_weights((scale * torch.rand(10_000) ** -1.5).log1p())


def test_good():
    verdict = judge(weights(), NOTHING_ELSE, FitStatus())
    assert verdict.trusted
    assert verdict.words.startswith("Trusted: ")
    assert "no start found mass elsewhere" in verdict.words


def test_missed_modes_were_not_computed():
    verdict = judge(weights(), None, FitStatus())
    assert verdict.trusted
    assert "start" not in verdict.words


def not_trusted(importance, missed, status, words):
    verdict = judge(importance, missed, status)
    assert not verdict.trusted
    assert verdict.words.startswith("Not trusted: ")
    assert words in verdict.words
    return verdict.words


def test_heavy_tail():
    found = heavy(1e-2)
    assert found.khat > 0.7
    assert "psis_resample" in not_trusted(found, NOTHING_ELSE, FitStatus(), "k-hat is")


def test_tail_that_weighs_nothing():
    """k-hat has no scale: where all weights are alike it says nothing of the posterior."""
    found = heavy(1e-8)
    assert found.khat > 0.7
    assert found.ess > 9990
    verdict = judge(found, NOTHING_ELSE, FitStatus())
    assert verdict.trusted
    assert "% of the weight" in verdict.words


def test_gap():
    assert weights(1.0).khat < 0.7
    not_trusted(
        weights(1.0), MissedModes(0.0, 0.01, 0.0, 0), FitStatus(), "nats below the log evidence"
    )


def test_noise():
    found = Importance.from_log_weights(0.5 * torch.randn(50))
    not_trusted(found, NOTHING_ELSE, FitStatus(), "is known to")


def test_draws_without_a_density():
    log_weights = 0.05 * torch.randn(4000)
    log_weights[:7] = -torch.inf
    found = Importance.from_log_weights(log_weights)
    not_trusted(found, NOTHING_ELSE, FitStatus(), "zero or fails at 7 of 4000 draws")
    nothing = Importance.from_log_weights(torch.full((100,), torch.nan))
    not_trusted(nothing, MissedModes(math.nan, math.nan, 0.0, 0), FitStatus(), "100 of 100")


def test_lost_modes():
    words = not_trusted(weights(), MissedModes(math.nan, 0.1, 0.3, 2), FitStatus(), "30 %")
    assert "2 other" in words
    assert "starts disagree" in words
    assert judge(weights(), MissedModes(math.nan, 0.1, 0.01, 1), FitStatus()).trusted


def test_evidence_around():
    not_trusted(weights(), MissedModes(0.4, 0.01, 0.0, 0), FitStatus(), "0.40 nats more evidence")
    # within its own noise it says nothing
    assert judge(weights(), MissedModes(0.4, 0.2, 0.0, 0), FitStatus()).trusted
    assert judge(weights(), MissedModes(math.nan, math.nan, 0.0, 0), FitStatus()).trusted


def test_steps():
    not_trusted(weights(), NOTHING_ELSE, FitStatus(is_complete=False), "interrupted")
    not_trusted(weights(), NOTHING_ELSE, FitStatus(skipped_share=0.5), "50 % of the steps")
    assert judge(weights(), NOTHING_ELSE, FitStatus(skipped_share=0.01)).trusted


def test_point_and_minibatch():
    point = Importance.from_log_weights(torch.full((100,), -torch.inf))
    words = not_trusted(point, None, FitStatus(is_point=True), "AutoDelta")
    assert "density is zero" not in words
    words = not_trusted(weights(), None, FitStatus(is_subsampled=True), "sub-samples")
    assert "diagnostics.importance" in words


@pytest.mark.parametrize("missed", [None, MissedModes(0.4, 0.01, 0.5, 1)], ids=str)
def test_several_objections_are_one_sentence(missed):
    words = judge(heavy(1.0), missed, FitStatus(skipped_share=0.5, is_complete=False)).words
    assert words.endswith(".")
    assert words.count("Not trusted") == 1
    assert words.count(";") >= 2
