# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import html
import math

import pytest

from pyro_artransform import FitResult
from tests.inference import models
from tests.inference.conftest import quick_fit as fit


@pytest.fixture
def result():
    guide = models.small(models.regression)
    return fit(models.regression, guide, num_steps=30, num_particles=8, progress=False)


def test_fields(result):
    assert isinstance(result, FitResult)
    names = (
        "elbo",
        "elbo_se",
        "log_evidence",
        "log_evidence_se",
        "khat",
        "khat_se",
        "ess",
        "seconds",
    )
    for name in names:
        assert isinstance(getattr(result, name), float), name
        assert math.isfinite(getattr(result, name)), name
    assert result.elbo < result.log_evidence + 4 * result.log_evidence_se
    assert 0 < result.ess <= result.num_samples
    assert isinstance(result.trusted, bool)
    assert isinstance(result.verdict, str)
    assert len(result.history) == result.num_steps == 30
    assert all(math.isfinite(elbo) for elbo in result.history)
    assert result.num_skipped == 0
    assert result.num_gradients >= 30 * 8
    assert "30 steps" in result.stopped_because
    ways = ("last", "averaged", "best", "last before the tails", "averaged on the way")
    assert result.end in ways
    assert result.importance.elbo == result.elbo
    assert result.culprits == {}


def test_shown(result):
    text = repr(result)
    assert text.splitlines()[0] == f"FitResult: {result.verdict}"
    for words in (f"{result.elbo:.3f}", "k-hat", "ESS", "log evidence", result.stopped_because):
        assert words in text
    page = result._repr_html_()
    assert html.escape(result.verdict) in page
    assert page.count("<tr>") == page.count("</tr>") == len(result.rows())


def test_what_is_shown_is_escaped(result):
    import dataclasses

    odd = dataclasses.replace(result, verdict="<b> & co", num_skipped=2, culprits={"<y>": 2})
    page = odd._repr_html_()
    assert "<b>" not in page
    assert "<y>" not in page
    assert "&lt;y&gt;" in page
    assert "2 steps, because of <y> (2)" in repr(odd)


def test_evidence_that_a_large_khat_makes_too_small(result):
    import dataclasses

    assert "too small" not in repr(dataclasses.replace(result, khat=0.6))
    odd = dataclasses.replace(result, khat=0.8, log_evidence=-3.0, log_evidence_se=0.5)
    assert odd.rows()["log evidence"] == "-3.000 ± 0.500 (most often too small: k-hat is above 0.7)"


def test_model_that_is_looped_over_is_named(result):
    import dataclasses

    odd = dataclasses.replace(result, one_at_a_time="RuntimeError: a branch")
    assert "one draw after the other (RuntimeError: a branch)" in repr(odd)
