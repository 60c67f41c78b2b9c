# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Chains by replays of a captured density, beside those by calls."""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import torch

from pyro_artransform.model.replay import execution, recording
from pyro_artransform.sampling import Ensemble, mcmc
from tests.model.replay.test_capture import hierarchy


def test_chains_are_the_same_with_torchscript_and_without(monkeypatch, caplog):
    execution._say_that_torchscript_is_missing.cache_clear()

    def draws():
        return mcmc(hierarchy, draws=40, seed=0, progress=False, num_chains=8)

    found = [draws()]
    assert not caplog.records
    for name in ("Graph", "_create_function_from_graph"):
        monkeypatch.delattr(torch._C, name)
    # PyTorch itself calls these two
    jit = SimpleNamespace(_builtins=torch.jit._builtins, is_scripting=lambda: False)
    monkeypatch.setattr(torch, "jit", jit)
    found.append(draws())
    assert ["no TorchScript" in record.message for record in caplog.records] == [True]
    assert all(each.trusted for each in found)
    for each in found[:-1]:  # chains amplify round-off
        torch.testing.assert_close(
            each.by_chain["z"], found[-1].by_chain["z"], rtol=1e-4, atol=1e-4
        )


def test_draws_of_another_density_are_dropped(monkeypatch):
    """The model is another one after some replays, which a comparison finds out."""
    replays, replayed = [], recording.Replay.__call__

    def model():
        loc = 2.0 if len(replays) > 20 else 0.0
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 2**0.5).to_event(1))
        # at twice the location: the posterior is Normal(loc, 1)
        pyro.sample("y", dist.Normal(z, 2**0.5).to_event(1), obs=torch.full((2,), 2 * loc))

    def replay(self, *inputs):
        replays.append(1)
        return replayed(self, *inputs)

    anew, begin_anew = [], Ensemble._forget
    monkeypatch.setattr(recording.Replay, "__call__", replay)
    monkeypatch.setattr(Ensemble, "_forget", lambda self: begin_anew(anew.append(1) or self))
    found = mcmc(model, draws=400, seed=0, progress=False, num_chains=16)
    assert anew
    assert (found.by_chain["z"].mean((0, 1)) - 2.0).abs().max() < 0.25
