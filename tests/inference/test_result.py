# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace

import pytest
import torch

from pyro_artransform.inference.evaluation.elements import Elements
from tests.inference import models
from tests.inference.conftest import quick_fit


@pytest.fixture(scope="module")
def result():
    """The result of a quick fit, that all tests here look at."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    guide, options = models.small(models.regression), {"num_steps": 30, "num_particles": 8}
    result = quick_fit(models.regression, guide, seed=0, progress=False, **options)
    torch.set_default_dtype(dtype)
    return result


def test_fields(result):
    floats = (result.elbo_se, result.log_evidence_se, result.khat_se, result.seconds)
    assert all(map(math.isfinite, (*floats, *result.history)))
    assert 0 < result.ess <= result.num_samples
    assert result.num_gradients >= 30 * 8
    assert result.importance.elbo == result.elbo


def test_shown(result):
    text = repr(result)
    assert text.splitlines()[0] == f"FitResult: {result.verdict}"
    stopped = result.stopped_because
    for words in (f"{result.elbo:.3f}", "k-hat", "ESS", "log evidence", stopped):
        assert words in text
    assert "after the other" not in text


def test_what_went_wrong_is_shown(result):
    odd = replace(result, num_skipped=2, culprits={"y": 2}, one_at_a_time="a branch")
    assert "2 steps, because of y (2)" in repr(odd)
    assert "one draw after the other (a branch)" in repr(odd)
    assert "too small" not in repr(replace(result, khat=0.6))
    zero = torch.zeros(3)
    numbers = dict.fromkeys(("khat", "khat_se", "tail_share", "gap"), zero)
    elements = Elements(plate="rows", index=None, **numbers)
    shared = replace(result, khat=0.6, elements=elements)
    assert shared.rows()["k-hat"].startswith("0.60 ± ")
    assert shared.rows()["k-hat"].endswith(", of what all elements share")
    odd = replace(result, khat=0.8, log_evidence=-3.0, log_evidence_se=0.5, importance=None)
    assert odd.rows()["log evidence"] == "-3.000 ± 0.500 (most often too small: k-hat is above 0.7)"


def test_ok_is_about_the_draws_where_there_are_some(result):
    draws = replace(result.chains, trusted=True)
    assert replace(result, chains=draws, trusted=False).ok
    assert not replace(result, chains=replace(draws, trusted=False), trusted=True).ok
    assert replace(result, chains=None, trusted=True).ok
    assert not replace(result, chains=None, trusted=False).ok
