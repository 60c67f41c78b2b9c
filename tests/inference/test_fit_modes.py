# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors with several modes, none of which is an image of another one."""

import sys

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoIAF, fit
from pyro_artransform.guides import MixtureGuide
from pyro_artransform.inference import FitResult
from pyro_artransform.sampling import StopReason, mcmc, modes
from tests.inference.conftest import Interrupting
from tests.sampling.densities import two_modes


def square(y):
    """A square is seen, and the prior knows a little of the sign."""
    a = pyro.sample("a", dist.Normal(0.3, 1.0))
    pyro.sample("y", dist.Normal(a**2, 0.3), obs=y)


def mass_below_zero():
    a = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    log_density = dist.Normal(0.3, 1.0).log_prob(a) + dist.Normal(a**2, 0.3).log_prob(
        torch.tensor(2.0)
    )
    density = log_density.softmax(0)
    evidence = log_density.logsumexp(0) + torch.log(a[1] - a[0])
    return float(density[a < 0].sum()), float(evidence)


def test_a_flow_for_each_mode(tmp_path):
    result = fit(square, torch.tensor(2.0), seed=0)
    share, evidence = mass_below_zero()
    assert isinstance(result.guide, MixtureGuide)
    assert result.ok
    assert result.trusted
    assert result.log_evidence == pytest.approx(evidence, abs=4 * result.log_evidence_se + 1e-3)
    least = int(result.modes.share.argmin())
    assert float(result.modes.se[least]) < 0.01  # by weights, not by the number of draws
    assert float(result.modes.share[least]) == pytest.approx(
        share, abs=4 * float(result.modes.se[least])
    )
    assert "has a flow for each of 2 modes with" in result.verdict
    assert "which differ in a; others may exist" in result.verdict
    assert "MixtureGuide, for 2 modes" in repr(result)
    draws = result.guide.sample_posterior(4000)["a"]
    # four standard errors
    assert float((draws < 0).double().mean()) == pytest.approx(share, abs=0.03)
    result.save(tmp_path / "result.pt")
    loaded = FitResult.load(tmp_path / "result.pt", square)
    assert str(loaded.modes) == str(result.modes)


def test_a_guide_of_the_user_stays_as_it_is():
    result = fit(square, AutoIAF(square), torch.tensor(2.0), seed=0)
    assert isinstance(result.guide, AutoIAF)
    assert not isinstance(result.guide, MixtureGuide)
    assert result.chains.trusted
    assert not result.trusted  # it has one of the modes
    assert result.modes.se[0] > 0.01  # those of the chains


@pytest.fixture
def apart(monkeypatch):
    """A model whose chains stay in modes: proposals from moments of draws are never near one.

    As if modes were strongly bent.
    """
    moments = modes.IndependentProposals.at_modes

    def far(base, share):
        return moments([part + 1e3 for part in base], share)

    monkeypatch.setattr(modes.IndependentProposals, "at_modes", far)
    return two_modes(1, 40.0, 0.3)


def test_chains_that_stay_in_modes_jump_by_the_flows(apart):
    assert mcmc(apart, seed=0).stopped_because == StopReason.APART.value
    result = fit(apart, seed=0)
    assert result.chains.stopped_because == StopReason.ENOUGH.value
    assert result.ok
    assert float(result.modes.share.min()) == pytest.approx(0.3, abs=0.01)
    left = float((result.chains.by_chain["z"][..., 0] < 0).double().mean())
    # four standard errors
    assert left == pytest.approx(0.3, abs=4 * (0.21 / 400) ** 0.5)


def test_an_interrupt_keeps_draws_that_jumps_would_begin_anew(apart, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Interrupting())
    result = fit(apart, seed=0, progress=True)
    assert (
        "Training the guide of these modes, between which chains then jump" in sys.stderr.getvalue()
    )
    assert result.chains.stopped_because == StopReason.APART.value
    assert not result.ok
    assert torch.isfinite(result.draws["z"]).all()
