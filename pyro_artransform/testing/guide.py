# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a guide, as assertions."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from ..guides import AutoAutoregressive

Model = Callable[..., Any]
Args = tuple[Any, ...]
Draws = dict[str, Tensor]


def check_guide(make: Callable[[Model], AutoAutoregressive], model: Model, *args: Any) -> None:
    """Checks that a guide keeps its contract on a model.

    Draws have the shapes, dtypes and supports of the sites; log-densities are those of the guide's trace,
    also with path gradients; every parameter that can act trains, also next to a second guide, whose
    parameters are its own, and from a store that was loaded; copies and pickles have the same density and
    train apart.

    :param model: a Pyro model in float64, with at least two latent dimensions.
    :param args: its arguments.
    :raises AssertionError: that says which contract broke.
    """
    # in a store of its own: the caller's stays as it is
    with pyro.get_param_store().scope():
        guide = make(model)
        guide(*args)
        _check_draws(guide)
        _check_trains("SVI", guide, model, args)
        _check_densities(guide, args)
        before, second = _parameters(guide), make(model)
        second(*args)
        _check_trains("a second guide", second, model, args)
        moved = _moved(guide, before)
        assert not moved, f"training a second guide moves {len(moved)} parameters of the first"
        _check_copies(guide, model, args)
        _check_store(guide, make(model), model, args)


def _parameters(guide: AutoAutoregressive) -> Draws:
    return {name: value.detach().clone() for name, value in guide.named_parameters()}


def _moved(guide: AutoAutoregressive, before: Draws) -> list[str]:
    now = dict(guide.named_parameters())
    return [name for name, value in before.items() if not torch.equal(now[name], value)]


def _check_trains(where: str, guide: AutoAutoregressive, model: Model, args: Args) -> None:
    before = _parameters(guide)
    assert before, f"{where}: the guide has no parameters"
    svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 0.01}), Trace_ELBO())
    for step in range(4):
        loss = svi.step(*args)
        assert math.isfinite(loss), f"{where}: a loss of {loss} at step {step}"
    still = sorted(before.keys() - _moved(guide, before))
    assert not still, f"{where}: {len(still)} of {len(before)} parameters never move: {still[0]}"
    for name, value in guide.named_parameters():
        assert value.isfinite().all(), f"{where}: '{name}' is not finite after a few steps"


def _check_draws(guide: AutoAutoregressive) -> None:
    sites = guide.prototype_trace.nodes
    draws, what = guide.sample_posterior(5), "sample_posterior(5)"
    for name, site in sites.items():
        value, like = draws[name], site["value"]
        expected, shape = (5, *like.shape), tuple(value.shape)
        assert shape == expected, f"{what}: '{name}' has shape {shape}, expected {expected}"
        assert value.dtype == like.dtype, f"{what}: '{name}' is {value.dtype}"
        assert site["fn"].support.check(value).all(), f"'{name}' left its support: {value}"
        shape = tuple(guide.quantiles([0.1, 0.9], num_samples=20)[name].shape)
        assert shape == (2, *like.shape), f"quantiles: '{name}' has shape {shape}"


def _check_densities(guide: AutoAutoregressive, args: Args) -> None:
    trace: Any = poutine.trace(guide).get_trace(*args)
    values = {name: trace.nodes[name]["value"] for name in guide.prototype_trace.nodes}
    expected, found = trace.log_prob_sum(), guide.log_prob(values)
    assert abs(expected - found) <= 1e-7 * (1 + abs(expected)), (
        f"log_prob: {found} for a draw whose density in the guide's trace is {expected}"
    )
    for path in (False, True):
        latent, log_q = guide.rsample_and_log_prob(5, path=path)
        expected = guide.get_posterior().log_prob(latent.detach())
        assert ((log_q - expected).abs() <= 1e-7 * (1 + expected.abs())).all(), (
            f"rsample_and_log_prob(path={path}): {log_q}, where the posterior has {expected}"
        )


def _check_copies(guide: AutoAutoregressive, model: Model, args: Args) -> None:
    latent = guide.rsample_and_log_prob(5)[0].detach()
    density = guide.get_posterior().log_prob(latent)
    before = _parameters(guide)
    copies = {"deepcopy": copy.deepcopy(guide), "pickle": pickle.loads(pickle.dumps(guide))}
    for way, twin in copies.items():
        found = twin.get_posterior().log_prob(latent)
        assert torch.equal(found, density), f"{way}: another density"
        _check_trains(way, twin, model, args)
        moved = _moved(guide, before)
        assert not moved, f"{way}: training the copy moves {len(moved)} parameters of the original"


def _check_store(
    guide: AutoAutoregressive, fresh: AutoAutoregressive, model: Model, args: Args
) -> None:
    store, values = pyro.get_param_store(), _parameters(guide).values()
    with store.scope():
        guide(*args)
        state = copy.deepcopy(store.get_state())
    with store.scope(state):
        fresh(*args)
        found = _parameters(fresh).values()
        same = all(torch.equal(a, b) for a, b in zip(values, found, strict=True))
        assert same, "a loaded param store: the guide does not have its parameters"
        _check_trains("a loaded param store", fresh, model, args)
