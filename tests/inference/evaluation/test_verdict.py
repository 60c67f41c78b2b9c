# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.diagnostics import Importance
from pyro_artransform.inference.evaluation.missed_modes import SecondOpinion
from pyro_artransform.inference.evaluation.verdict import Facts, judge

NOTHING_ELSE = SecondOpinion(0.0, 0.001, 0.0, 0)


def weights(spread=0.05, size=4000):
    return Importance.from_log_weights(spread * torch.randn(size) - spread**2 / 2)


def heavy(scale):
    """Weights ``1 + scale * x`` of a Pareto variable x of index 1.5."""
    return Importance.from_log_weights((scale * torch.rand(10_000) ** -1.5).log1p())


def test_good():
    verdict = judge(weights(), NOTHING_ELSE, Facts())
    assert verdict.trusted
    assert verdict.words.startswith("Trusted: ")
    assert "no start found mass elsewhere" in verdict.words


def test_nobody_looked_elsewhere():
    verdict = judge(weights(), None, Facts())
    assert verdict.trusted
    assert "start" not in verdict.words


def not_trusted(importance, second, facts, words):
    verdict = judge(importance, second, facts)
    assert not verdict.trusted
    assert verdict.words.startswith("Not trusted: ")
    assert words in verdict.words
    return verdict.words


def test_heavy_tail():
    found = heavy(1e-2)
    assert found.khat > 0.7
    assert "psis_resample" in not_trusted(found, NOTHING_ELSE, Facts(), "k-hat is")


def test_tail_that_weighs_nothing():
    """k-hat has no scale: where all weights are alike it says nothing of the posterior."""
    found = heavy(1e-8)
    assert found.khat > 0.7
    assert found.ess > 9990
    verdict = judge(found, NOTHING_ELSE, Facts())
    assert verdict.trusted
    assert "% of the weight" in verdict.words


def test_gap():
    assert weights(1.0).khat < 0.7
    not_trusted(
        weights(1.0), SecondOpinion(0.0, 0.01, 0.0, 0), Facts(), "nats below the log evidence"
    )


def test_noise():
    found = Importance.from_log_weights(0.5 * torch.randn(50))
    not_trusted(found, NOTHING_ELSE, Facts(), "is known to")


def test_draws_without_a_density():
    log_weights = 0.05 * torch.randn(4000)
    log_weights[:7] = -torch.inf
    found = Importance.from_log_weights(log_weights)
    not_trusted(found, NOTHING_ELSE, Facts(), "zero or fails at 7 of 4000 draws")
    nothing = Importance.from_log_weights(torch.full((100,), torch.nan))
    not_trusted(nothing, SecondOpinion(math.nan, math.nan, 0.0, 0), Facts(), "100 of 100")


def test_lost_modes():
    words = not_trusted(weights(), SecondOpinion(math.nan, 0.1, 0.3, 2), Facts(), "30 %")
    assert "2 other" in words
    assert "starts disagree" in words
    assert judge(weights(), SecondOpinion(math.nan, 0.1, 0.01, 1), Facts()).trusted


def test_evidence_around():
    not_trusted(weights(), SecondOpinion(0.4, 0.01, 0.0, 0), Facts(), "0.40 nats more evidence")
    # within its own noise it says nothing
    assert judge(weights(), SecondOpinion(0.4, 0.2, 0.0, 0), Facts()).trusted
    assert judge(weights(), SecondOpinion(math.nan, math.nan, 0.0, 0), Facts()).trusted


def test_steps():
    not_trusted(weights(), NOTHING_ELSE, Facts(is_over=False), "interrupted")
    not_trusted(weights(), NOTHING_ELSE, Facts(skipped_share=0.5), "50 % of the steps")
    assert judge(weights(), NOTHING_ELSE, Facts(skipped_share=0.01)).trusted


def test_point_and_minibatch():
    point = Importance.from_log_weights(torch.full((100,), -torch.inf))
    words = not_trusted(point, None, Facts(is_point=True), "AutoDelta")
    assert "density is zero" not in words
    words = not_trusted(weights(), None, Facts(is_subsampled=True), "sub-samples")
    assert "diagnostics.importance" in words


@pytest.mark.parametrize("second", [None, SecondOpinion(0.4, 0.01, 0.5, 1)], ids=str)
def test_several_objections_are_one_sentence(second):
    words = judge(heavy(1.0), second, Facts(skipped_share=0.5, is_over=False)).words
    assert words.endswith(".")
    assert words.count("Not trusted") == 1
    assert words.count(";") >= 2
