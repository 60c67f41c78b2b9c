# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_artransform.diagnostics.checks import Check, Verdict
from pyro_artransform.diagnostics.plates import PlateDiagnostics
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


def test_fields_are_shown(result):
    floats = (result.elbo_se, result.log_evidence_se, result.khat_se, result.seconds)
    assert all(map(math.isfinite, (*floats, *result.history)))
    assert 0 < result.ess <= result.num_samples
    assert result.num_gradients >= 30 * 8
    assert result.importance.elbo == result.elbo
    text = " ".join(repr(result).split())
    stopped = result.stopped_because
    for words in (f"{result.elbo:.3f}", "k-hat", "ESS", "log evidence", stopped):
        assert words in text
    assert "one draw at a time" not in text
    assert max(map(len, repr(result).splitlines())) <= 100


POINT, COARSE = Check.POINT.failed(), Check.ROUNDED.failed(sites="z")


def test_the_answer_comes_first_and_remedies_after_what_failed(result):
    chains = result.chains
    bad = replace(chains, trusted=False, judged=Verdict((COARSE,)))
    for ok, draws in ((True, replace(chains, trusted=True, judged=Verdict())), (False, bad)):
        judged = Verdict((COARSE, POINT), notes=("A note.",))
        shown = replace(result, chains=draws, trusted=False, judged=judged)
        assert shown.failed == shown.chains.failed
        lines = repr(shown).splitlines()
        assert lines[0].startswith(f"Draws trusted: {'yes, ' if ok else 'no, 1 check failed'}")
        about = next(k for k, line in enumerate(lines) if "About the guide alone" in line)
        assert lines[about].endswith("not trusted, 2 checks failed")
        told = [line.split()[0] for line in lines[1:about] if line[2] != " "]
        after = [line.split()[0] for line in lines[about + 1 :] if line[2] != " "]
        assert told == ([] if ok else ["failed", "remedy"])
        # what the draws have as well is told once, and counted here
        expected = ["failed", *["remedy"] * ok, "failed", "remedy", "note"]
        assert after[: len(expected)] == expected
        assert " ".join(repr(shown).split()).count(COARSE.sentence) == 1


def test_of_a_guide_alone(result):
    alone = replace(result, chains=None, draws=None)
    good = replace(alone, trusted=True, judged=Verdict(praise="All is well."))
    assert good.failed == ()
    assert repr(good).startswith("Guide trusted: yes\n  why           All is well\n")
    bad = replace(alone, trusted=False, judged=Verdict((POINT,)))
    assert bad.failed == (POINT,)
    assert repr(bad).startswith(
        "Guide trusted: no, 1 check failed\n  failed        the guide has a point mass"
    )
    assert "\n  remedy        Use AutoIAF\n" in repr(bad)


def test_a_summary_is_that_of_the_draws_or_of_the_guide(result):
    columns = "mean", "sd", "5%", "50%", "95%", "ess_bulk", "ess_tail", "r_hat"
    assert result.summary()["loc"].keys() == {*columns}
    torch.testing.assert_close(
        result.summary()["loc"]["mean"], result.chains.by_chain["loc"].mean()
    )
    torch.manual_seed(0)
    found = replace(result, chains=None, draws=None).summary()
    expected = result.guide.sample_posterior(10_000)
    for name, columns in found.items():
        assert (columns["mean"] - expected[name].mean()).abs() < 0.2 * expected[name].std()
    assert "mean          sd" in repr(found)


def test_a_guide_of_any_kind_is_summarized_and_predicted_from(result):
    guide = AutoMultivariateNormal(models.regression)
    guide()
    other = replace(result, chains=None, draws=None, guide=guide)
    assert other.summary().keys() == {"loc", "scale"}
    assert other.predict()["y"].shape == (1000, 6)


def test_predictions_of_new_rows():
    """Of a product with a vector, which Pyro's Predictive does not take."""
    torch.manual_seed(0)
    x = torch.randn(60, 2)
    y = x @ torch.tensor([1.0, -2.0]) + 0.1 * torch.randn(60)

    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ b, 0.1), obs=y)

    result = quick_fit(model, x, y, seed=0, progress=False)
    new = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for found in (result, result.chains, replace(result, chains=None, draws=None)):
        predicted = found.predict(new)["y"]
        assert predicted.shape[1:] == (3,)
        assert (predicted.mean(0) - new @ torch.tensor([1.0, -2.0])).abs().max() < 0.1
        assert (predicted.std(0) - 0.1).abs().max() < 0.05


def test_an_arviz_data_set(result):
    """Of the draws of the chains, or of the guide."""
    pytest.importorskip("arviz")
    size = result.chains.by_chain["loc"].numel()
    assert result.to_inference_data().log_likelihood["y"].size == size * 6
    alone = replace(result, chains=None, draws=None)
    assert alone.to_inference_data().posterior["loc"].shape == (1, 1000)
    for missing, words in (({"model": None}, "a model, got none"), ({"guide": None}, "a guide or")):
        with pytest.raises(ValueError, match=words):
            replace(alone, **missing).to_inference_data()


def test_what_went_wrong_is_shown(result):
    total = result.chains.by_chain["loc"].numel()
    for count, told in (
        (0, " gradients"),
        (65, f" gradients, 65 of {total:,} trajectories diverged"),
    ):
        shown = replace(result, chains=replace(result.chains, num_divergent=count))
        assert shown.rows()["chains"].endswith(told)
    odd = replace(result, num_skipped=2, culprits={"y": 2}, one_at_a_time="a branch")
    assert "2 steps, because of y (2)" in repr(odd)
    assert "one draw at a time (a branch)" in repr(odd)
    assert "too small" not in repr(replace(result, khat=0.6))
    zero = torch.zeros(3)
    numbers = dict.fromkeys(("khat", "khat_se", "tail_share", "gap"), zero)
    elements = PlateDiagnostics(plate="rows", index=None, **numbers)
    shared = replace(result, khat=0.6, elements={"rows": elements})
    assert shared.rows()["k-hat"].startswith("0.60 ± ")
    assert shared.rows()["k-hat"].endswith(", for the shared latents")
    odd = replace(result, khat=0.8, log_evidence=-3.0, log_evidence_se=0.5, importance=None)
    assert odd.rows()["log evidence"] == "-3.000 ± 0.500 (unreliable: k-hat is above 0.7)"


@pytest.mark.parametrize("draws", [True, False, None])
@pytest.mark.parametrize("guide", [True, False])
def test_ok_is_about_the_draws_where_there_are_some(result, draws, guide):
    chains = None if draws is None else replace(result.chains, trusted=draws)
    assert replace(result, chains=chains, trusted=guide).ok == (guide if draws is None else draws)
