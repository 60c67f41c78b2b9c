# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How slow a model is, said before a fit begins."""

import time
import warnings

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoIAF, fit
from pyro_artransform.joint import LogJoint
from pyro_artransform.joint.speed import seconds_of_gradient, warn_if_slow

X = torch.linspace(-1.0, 1.0, 10).reshape(5, 2)


def regression():
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(X.type_as(beta) @ beta, 1.0), obs=torch.ones(5))


def by_loop(seconds=0.0):
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    time.sleep(seconds)
    scale = 2.0 if float(beta.detach()) > 9 else 1.0
    pyro.sample("y", dist.Normal(beta, scale), obs=torch.tensor(1.0))


def said(log_joint):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_slow(log_joint, log_joint.reason)
    return [str(warning.message) for warning in caught]


def test_a_fast_model_says_nothing():
    log_joint, state = LogJoint(regression), torch.get_rng_state()
    assert said(log_joint) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_a_slow_model_says_what_makes_it_slow(monkeypatch):
    monkeypatch.setattr("pyro_artransform.joint.speed._SLOW", 0.0)
    log_joint = LogJoint(regression)
    assert log_joint.strategy == "vmap"
    (words,) = said(log_joint)
    assert "64 draws and its gradient take about 0 seconds" in words
    assert "by the strategy 'vmap'" in words
    assert "test_speed.py, line" in words
    assert "@ beta" in words


@pytest.mark.parametrize(("seconds", "is_slow"), [(0.0, False), (0.05, True)])
def test_a_model_by_loop_says_why_and_how_long(seconds, is_slow):
    log_joint = LogJoint(by_loop, (seconds,))
    (words,) = said(log_joint)
    assert "one draw after the other" in words
    assert "scale = 2.0 if float(beta.detach()) > 9 else 1.0" in words
    assert ("seconds, a thousand such steps" in words) is is_slow
    if is_slow:
        assert 64 * seconds <= seconds_of_gradient(log_joint) < 100 * 64 * seconds


def test_a_fit_says_it_once():
    with pytest.warns(UserWarning, match="test_speed.py, line") as caught:
        fit(by_loop, AutoIAF(by_loop), num_steps=1, num_particles=1, progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
