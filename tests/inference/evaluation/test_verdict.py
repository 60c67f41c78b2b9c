# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pytest
import torch

from pyro_artransform.diagnostics import Importance
from pyro_artransform.diagnostics.checks import Check, Verdict
from pyro_artransform.diagnostics.convergence import ModeShares
from pyro_artransform.inference.evaluation.verdict import NOT_SEARCHED, FitStatus, LostModes, judge

NOTHING = LostModes(0.0, 0, was_searched=True)
SOME = LostModes(0.03, 1, was_searched=True)
LOST = LostModes(0.3, 2, was_searched=True)


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


LATE = {
    "cut_short": Check.CUT_SHORT.failed(
        reason="the time limit was reached after step 0", remedy="increase max_seconds"
    ),
    "remedy": "",
}
#: log weights, what was found elsewhere, how the fit ended, and words of the verdict
NOT_TRUSTED = {
    "heavy tail": (lambda: heavy(1e-2), NOTHING, {}, ["k-hat is", "does not cover"]),
    "gap": (lambda: weights(1.0), NOTHING, {}, ["nats below the log evidence"]),
    "noise": (lambda: 0.5 * torch.randn(50), NOTHING, {}, ["the standard error of the ELBO is"]),
    "zero density": (some_zero, NOTHING, {}, ["not finite at 7 of 4007 draws"]),
    "nothing": (lambda: torch.full((100,), torch.nan), NOTHING, {}, ["100 of 100"]),
    "round-off": (rounded, NOTHING, {}, ["round-off of torch.float32"]),
    "no digits": (without_digits, NOTHING, {}, ["of torch.float64", "Use tighter priors"]),
    "lost modes": (
        weights,
        LOST,
        {},
        ["30 %", "2 other", "no draws. If modes differ by labels", "priors)."],
    ),
    "heavy tail and lost modes": (
        lambda: heavy(1e-2),
        LOST,
        {},
        ["k-hat is", "30 %", "break the symmetry"],
    ),
    "interrupted": (
        weights,
        NOTHING,
        {"is_interrupted": True, **LATE},
        ["the time limit was reached"],
    ),
    "cut short": (lambda: heavy(1e-2), NOTHING, LATE, ["the time limit was reached", "k-hat is"]),
    "cut short, with modes": (weights, LOST, LATE, ["almost no draws."]),
    "skipped": (weights, NOTHING, {"skipped_share": 0.5}, ["50 % of the steps"]),
    "point": (lambda: torch.full((100,), -torch.inf), None, {"is_point": True}, ["AutoDelta"]),
    "random": (weights, None, {"is_random": True}, ["not judged", "subsamples", "pass loader="]),
}
#: where a better guide, or chains, would help
REMEDIED = {"heavy tail", "gap", "noise"}
TRUSTED = {
    "good": (weights, NOTHING, {}, ["chains found no other modes"]),
    "not searched": (weights, None, {}, ["other modes were not searched for"]),
    # k-hat has no scale: where all weights are alike it says nothing of the posterior
    "light tail": (lambda: heavy(1e-8), NOTHING, {}, ["% of the weight"]),
    "a small mode": (weights, SOME, {}, ["but about 3 % of the posterior is in 1 other mode"]),
    "start failed": (
        weights,
        NOTHING,
        {"start_failed": True},
        ["started from its own initial values"],
    ),
    "cut short, and good": (weights, NOTHING, LATE, ["chains found no other modes"]),
}


@pytest.mark.parametrize("case", [*NOT_TRUSTED, *TRUSTED])
def test_a_verdict_is_one_sentence_that_says_why(case):
    log_weights, lost, status, words = {**NOT_TRUSTED, **TRUSTED}[case]
    found = Importance.from_log_weights(log_weights())
    how = FitStatus(**{"remedy": "draws=1000", **status})
    verdict = judge(how, found, lost or NOT_SEARCHED)
    assert verdict.trusted == (case in TRUSTED)
    assert verdict.words.startswith("Trusted: " if verdict.trusted else "Not trusted: ")
    assert verdict.words.endswith(".")
    for some in words:
        assert some in verdict.words
    if not verdict.trusted and "cut_short" in status:  # nothing is known of the guide
        assert verdict.words.startswith(
            "Not trusted: the time limit was reached after step 0: increase"
        )
        assert "Break" not in verdict.words
    assert ("Use draws=1000" in verdict.words) == (case in REMEDIED)
    if case in {"round-off", "point"}:  # no other objections, which rest on such weights
        assert "does not cover" not in verdict.words
        assert "log density of the model" not in verdict.words
    is_good = verdict.trusted and lost == NOTHING
    assert ("chains found no other modes" in verdict.words) == is_good


@pytest.mark.parametrize(
    ("khat", "is_said"), [(0.75, True), (0.65, True), (0.79, False), (0.61, False)]
)
def test_a_borderline_khat_is_called_so(khat, is_said):
    found = Importance.from_log_weights(weights())
    verdict = judge(FitStatus(), replace(found, khat=khat, khat_se=0.08, tail_share=0.5))
    assert verdict.trusted == (khat < 0.7)
    assert ("borderline, within one standard error" in verdict.words) == is_said


def test_a_remedy_is_told_once_after_all_that_it_is_for():
    one, two = (Check.GAP.failed(gap=gap, remedy="Use more") for gap in (0.2, 0.3))
    point = Check.POINT.failed()
    verdict = Verdict((one, two, point), notes=("A note.",), marginals="Marginals unknown.")
    told = f"{one.sentence}; {two.sentence}. Use more; {point.sentence}. Use AutoIAF."
    assert verdict.words == f"Not trusted: {told} A note. Marginals unknown."
    names = [name for name, _ in verdict.rows()]
    assert names == ["failed", "failed", "remedy", "failed", "remedy", "note"]
    rows = [*verdict.rows(after=[one, two])]
    assert [text for name, text in rows if name == "failed"][2] == point.sentence
    # as many rows as failed checks, of which the first two are known
    assert [name for name, _ in rows] == ["failed", "failed", "failed", "remedy", "note"]
    assert rows[0] == rows[1] == ("failed", "the same as of the draws, above")


def test_shares_near_one_have_no_exponent():
    """As in "1e+02 %"."""
    for check in (Check.DIVERGENCES, Check.TAIL):
        assert "100 %" in check.failed(percent=100.0, name="z", has_proposals=False).sentence
    shares, unknown = torch.tensor([0.998, 0.002]), torch.full((2,), torch.nan)
    assert "2 modes with about 99.8 %, about 0.2 % of" in str(ModeShares(shares, unknown, ("z",)))
