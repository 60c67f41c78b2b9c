# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.diagnostics import Importance
from pyro_artransform.inference.evaluation.missed_modes import NOT_SEARCHED, MissedModes
from pyro_artransform.inference.evaluation.verdict import FitStatus, judge

NOTHING = MissedModes(0.0, 0.001, 0.0, 0)
UNKNOWN = MissedModes(math.nan, math.nan, 0.0, 0)
SOME = NOTHING._replace(lost_mass=0.03, num_lost=1)
LOST = MissedModes(math.nan, 0.1, 0.3, 2)


def weights(spread=0.05, size=4000):
    return spread * torch.randn(size) - spread**2 / 2


def heavy(scale):
    """Weights ``1 + scale * x`` of a Pareto variable x of index 1.5."""
    return (scale * torch.rand(10_000) ** -1.5).log1p()


def some_zero():
    return torch.cat([weights(), torch.full((7,), -torch.inf)])


def rounded():
    """In float32 a density of ten million nats is known to a nat: nothing is known of the tail."""
    return -1e7 + torch.randint(0, 3, (4000,), dtype=torch.float32)


def without_digits():
    """An ELBO of a few draws that the model all but rules out."""
    return torch.cat([weights(), torch.full((10,), -1e86)])


LATE = {"cut_short": "the time was over after 0 steps: give more seconds", "remedy": ""}
#: log weights, what was found elsewhere, how the fit ended, and words of the verdict
NOT_TRUSTED = {
    "heavy tail": (lambda: heavy(1e-2), NOTHING, {}, ["k-hat is", "does not reach"]),
    "gap": (lambda: weights(1.0), NOTHING, {}, ["nats below the log evidence"]),
    "noise": (lambda: 0.5 * torch.randn(50), NOTHING, {}, ["is known to"]),
    "zero density": (some_zero, NOTHING, {}, ["zero or fails at 7 of 4007 draws"]),
    "nothing": (lambda: torch.full((100,), torch.nan), UNKNOWN, {}, ["100 of 100"]),
    "round-off": (rounded, NOTHING, {}, ["round-off of torch.float32"]),
    "no digits": (without_digits, NOTHING, {}, ["of torch.float64", "Use tighter priors"]),
    "lost modes": (weights, LOST, {}, ["30 %", "2 other", "starts disagree. Break the symmetry"]),
    "evidence around": (weights, MissedModes(0.4, 0.01), {}, ["0.40 nats more", "Use draws"]),
    "interrupted": (weights, NOTHING, {"is_interrupted": True, **LATE}, ["the time was over"]),
    "cut short": (lambda: heavy(1e-2), NOTHING, LATE, ["the time was over", "k-hat is"]),
    "cut short, with modes": (weights, LOST, LATE, ["disagree."]),
    "skipped": (weights, NOTHING, {"skipped_share": 0.5}, ["50 % of the steps"]),
    "point": (lambda: torch.full((100,), -torch.inf), None, {"is_point": True}, ["AutoDelta"]),
    "random": (weights, None, {"is_random": True}, ["sub-samples", "diagnostics.importance"]),
}
#: where a better guide, or chains, would help
REMEDIED = {"heavy tail", "gap", "noise", "evidence around"}
TRUSTED = {
    "good": (weights, NOTHING, {}, ["no start found mass elsewhere"]),
    "not searched": (weights, None, {}, ["mass elsewhere was not searched for"]),
    "not searchable": (weights, NOTHING._replace(searched_by="none"), {}, ["not searched for"]),
    # k-hat has no scale: where all weights are alike it says nothing of the posterior
    "light tail": (lambda: heavy(1e-8), NOTHING, {}, ["% of the weight"]),
    "mass elsewhere": (weights, SOME, {}, ["but about 3 % of the posterior is in 1 other mode"]),
    "start failed": (weights, NOTHING, {"start_failed": True}, ["where its arguments put it"]),
    "cut short, and good": (weights, NOTHING, LATE, ["no start found mass elsewhere"]),
    # within its own noise it says nothing
    "noisy evidence around": (weights, MissedModes(0.4, 0.2), {}, []),
    "unknown evidence around": (weights, UNKNOWN, {}, []),
}


@pytest.mark.parametrize("case", [*NOT_TRUSTED, *TRUSTED])
def test_a_verdict_is_one_sentence_that_says_why(case):
    log_weights, missed, status, words = {**NOT_TRUSTED, **TRUSTED}[case]
    found = Importance.from_log_weights(log_weights())
    how = FitStatus(**{"remedy": "draws=1000", **status})
    verdict = judge(how, found, missed or NOT_SEARCHED)
    assert verdict.trusted == (case in TRUSTED)
    assert verdict.words.startswith("Trusted: " if verdict.trusted else "Not trusted: ")
    assert verdict.words.endswith(".")
    for some in words:
        assert some in verdict.words
    if not verdict.trusted and "cut_short" in status:  # nothing is known of the guide
        assert verdict.words.startswith("Not trusted: the time was over after 0 steps: give more")
        assert "Break" not in verdict.words
    assert ("Use draws=1000" in verdict.words) == (case in REMEDIED)
    if case in {"round-off", "point"}:  # no other objections, which rest on such weights
        assert "does not reach" not in verdict.words
        assert "density is zero" not in verdict.words
    by_curvature = missed is not None and missed.searched_by == "curvature" and not missed.num_lost
    assert ("no start found" in verdict.words) == (verdict.trusted and by_curvature)
