# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace

from pyro_artransform import FitResult


def test_fields(fitted_once):
    result = fitted_once
    assert isinstance(result, FitResult)
    floats = ("elbo", "elbo_se", "log_evidence", "log_evidence_se", "khat", "khat_se", "ess")
    for name in (*floats, "seconds"):
        assert isinstance(getattr(result, name), float), name
        assert math.isfinite(getattr(result, name)), name
    assert result.elbo < result.log_evidence + 4 * result.log_evidence_se
    assert 0 < result.ess <= result.num_samples
    assert isinstance(result.trusted, bool)
    assert len(result.history) == result.num_steps == 30
    assert all(map(math.isfinite, result.history))
    assert (result.num_skipped, result.culprits) == (0, {})
    assert result.num_gradients >= 30 * 8
    assert "30 steps" in result.stopped_because
    ways = ("last", "averaged", "best", "last before the tails", "averaged on the way")
    assert result.end in ways
    assert result.importance.elbo == result.elbo


def test_shown(fitted_once):
    text = repr(fitted_once)
    assert text.splitlines()[0] == f"FitResult: {fitted_once.verdict}"
    stopped = fitted_once.stopped_because
    for words in (f"{fitted_once.elbo:.3f}", "k-hat", "ESS", "log evidence", stopped):
        assert words in text
    assert "after the other" not in text


def test_what_went_wrong_is_shown(fitted_once):
    odd = replace(fitted_once, num_skipped=2, culprits={"y": 2}, one_at_a_time="a branch")
    assert "2 steps, because of y (2)" in repr(odd)
    assert "one draw after the other (a branch)" in repr(odd)
    assert "too small" not in repr(replace(fitted_once, khat=0.6))
    odd = replace(fitted_once, khat=0.8, log_evidence=-3.0, log_evidence_se=0.5)
    assert odd.rows()["log evidence"] == "-3.000 ± 0.500 (most often too small: k-hat is above 0.7)"
