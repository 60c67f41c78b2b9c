# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The contract of a guide, for all guides."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim

from pyro_artransform.guides import AutoIAF
from pyro_artransform.testing.contracts import equal
from tests.guides import models
from tests.guides.named import FOREIGN, GUIDES


def check_guide(make, model, *args):
    """Checks that a guide keeps its contract on a model.

    Draws have the shapes, dtypes and supports of the sites; log densities agree with the guide's trace,
    also with path gradients; every effective parameter trains, also next to a second guide, which has
    separate parameters, and from a loaded param store; copies and pickles have the same density and train
    independently.

    :param model: a Pyro model in float64, with at least two latent dimensions.
    :param args: the model's arguments.
    :raises AssertionError: with the broken contract.
    """
    with pyro.get_param_store().scope():  # leaves the caller's store unchanged
        guide = make(model)
        guide(*args)
        _check_draws(guide)
        _check_trains("SVI", guide, model, args)
        latent = _check_densities(guide, args)
        density, before = guide.get_posterior().log_prob(latent), _parameters(guide)
        copies = {"deepcopy": copy.deepcopy(guide), "pickle": pickle.loads(pickle.dumps(guide))}
        copies["pickle"].model = model  # pickles leave it out
        for name, twin in copies.items():
            equal(twin.get_posterior(*args).log_prob(latent), density, f"{name}: another density")
        for name, other in {"a second guide": make(model), **copies}.items():
            other(*args)
            _check_trains(name, other, model, args)
            moved = _moved(guide, before)
            assert not moved, f"{name}: training it moves {len(moved)} parameters of the first"
        _check_store(guide, make(model), model, args)


def _parameters(guide):
    """Copies of the trained parameters."""
    named = guide.named_parameters()
    return {name: value.detach().clone() for name, value in named if value.requires_grad}


def _moved(guide, before):
    now = dict(guide.named_parameters())
    return [name for name, value in before.items() if not torch.equal(now[name], value)]


def _check_trains(where, guide, model, args):
    before = _parameters(guide)
    assert before, f"{where}: the guide has no parameters"
    svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(*args) for _ in range(4)]
    assert all(map(math.isfinite, losses)), f"{where}: losses of {losses}"
    still = sorted(before.keys() - _moved(guide, before))
    assert not still, f"{where}: {len(still)} of {len(before)} parameters never move: {still[0]}"
    wrong = [name for name, value in guide.named_parameters() if not value.isfinite().all()]
    assert not wrong, f"{where}: {wrong} are not finite after a few steps"


def _check_draws(guide):
    draws, what = guide.sample_posterior(5), "sample_posterior(5)"
    for name, site in guide.prototype_trace.nodes.items():
        value, like = draws[name], site["value"]
        expected, shape = (5, *like.shape), tuple(value.shape)
        assert shape == expected, f"{what}: '{name}' has shape {shape}, expected {expected}"
        assert value.dtype == like.dtype, f"{what}: '{name}' is {value.dtype}"
        assert site["fn"].support.check(value).all(), f"'{name}' left its support: {value}"
        shape = tuple(guide.quantiles([0.1, 0.9], num_samples=20)[name].shape)
        assert shape == (2, *like.shape), f"quantiles: '{name}' has shape {shape}"


def _check_densities(guide, args):
    trace = poutine.trace(guide).get_trace(*args)
    values = {name: trace.nodes[name]["value"] for name in guide.prototype_trace.nodes}
    wanted = "log_prob: differs for a draw whose density in the guide's trace is"
    expected = trace.log_prob_sum().detach()
    equal(guide.log_prob(values), expected, f"{wanted} {expected:.9g}", 1e-7)
    for path in (False, True):
        latent, log_q = guide.rsample_and_log_prob(5, path=path)
        if guide.prior_coordinates is not None:
            latent, ladj = guide.mapped_density().to_unconstrained(latent)
            log_q = log_q - ladj
        expected = guide.get_posterior().log_prob(latent.detach())
        wanted = f"rsample_and_log_prob(path={path}): not the density of the posterior"
        equal(log_q, expected, wanted, 1e-7)
    return latent.detach()


def _check_store(guide, fresh, model, args):
    store, where = pyro.get_param_store(), "a loaded param store"
    with store.scope():
        guide(*args)
        state = copy.deepcopy(store.get_state())
    with store.scope(state):
        fresh(*args)
        for value, found in zip(guide.parameters(), fresh.parameters(), strict=True):
            equal(found, value, f"{where}: the guide does not have its parameters")
        _check_trains(where, fresh, model, args)


@pytest.mark.parametrize("name", [*GUIDES, *FOREIGN])
def test_guides(name):
    new = {**GUIDES, **FOREIGN}[name]
    pyro.param("kept", torch.ones(()))
    check_guide(new, models.gaussian if "iaf" in name else models.regression, models.data())
    assert list(pyro.get_param_store()) == ["kept"]


@pytest.mark.filterwarnings("ignore:.*does not hold the coordinates")
def test_a_guide_in_coordinates_of_the_prior():
    """Their lambda is no parameter that trains, and draws are not on the unconstrained space."""

    def groups(values):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("groups", 4):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=values[:4])

    guide = AutoIAF(groups)
    guide(models.data())
    assert guide.prior_coordinates is not None
    check_guide(AutoIAF, groups, models.data())
