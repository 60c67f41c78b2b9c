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


def check_guide(
    make: Callable[[Model], AutoAutoregressive],
    model: Model,
    *args: Any,
    picklable: bool = True,
    atol: float = 1e-7,
) -> None:
    """Checks that a guide keeps its contract on a model.

    Draws have the shapes, dtypes and supports of the sites; the log-density of a draw is the one that
    Pyro finds in the guide's trace; every parameter that can act trains, also next to a second guide,
    whose parameters are its own, and from a store that was loaded; copies and pickles have the same
    density and train apart; the path gradient has the value of the density.

    :param make: builds a guide of a model.
    :param model: a Pyro model in float64, with at least two latent dimensions.
    :param args: its arguments.
    :param picklable: False for a flow around a local function.
    :param atol: the tolerance of log-densities.
    :raises AssertionError: that says which contract broke.
    """
    # in a store of its own: the caller's stays as it is
    with pyro.get_param_store().scope():
        guide = make(model)
        guide(*args)
        _check_draws(guide)
        _check_trains("SVI", guide, model, args)
        _check_densities(guide, args, atol)
        _check_second_guide(guide, make(model), model, args)
        _check_copies(guide, model, args, picklable)
        _check_store(guide, make(model), model, args)


def _parameters(guide: AutoAutoregressive) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in guide.named_parameters()}


def _count_moved(guide: AutoAutoregressive, before: dict[str, Tensor]) -> int:
    now = dict(guide.named_parameters())
    return sum(not torch.equal(now[name], value) for name, value in before.items())


def _check_trains(where: str, guide: AutoAutoregressive, model: Model, args: Args) -> None:
    before = _parameters(guide)
    assert before, f"{where}: the guide has no parameters"
    svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 0.01}), Trace_ELBO())
    for step in range(4):
        loss = svi.step(*args)
        assert math.isfinite(loss), f"{where}: a loss of {loss} at step {step}"
    now = _parameters(guide)
    still = [name for name, value in before.items() if torch.equal(now[name], value)]
    assert not still, f"{where}: {len(still)} of {len(before)} parameters never move: {still[0]}"
    for name, value in now.items():
        assert value.isfinite().all(), f"{where}: '{name}' is not finite after a few steps"


def _check_draws(guide: AutoAutoregressive) -> None:
    draws = guide.sample_posterior(5)
    for name, site in guide.prototype_trace.nodes.items():
        shape, value = site["value"].shape, draws[name]
        assert value.shape == (5, *shape), (
            f"sample_posterior(5): '{name}' has shape {tuple(value.shape)}, expected {(5, *shape)}"
        )
        assert value.dtype == site["value"].dtype, f"sample_posterior: '{name}' is {value.dtype}"
        assert site["fn"].support.check(value).all(), f"'{name}' left its support: {value}"
        quantiles = guide.quantiles([0.1, 0.9], num_samples=20)[name]
        assert quantiles.shape == (2, *shape), (
            f"quantiles: '{name}' has shape {tuple(quantiles.shape)}, expected {(2, *shape)}"
        )


def _check_densities(guide: AutoAutoregressive, args: Args, atol: float) -> None:
    trace: Any = poutine.trace(guide).get_trace(*args)
    values = {name: trace.nodes[name]["value"] for name in guide.prototype_trace.nodes}
    expected, found = trace.log_prob_sum(), guide.log_prob(values)
    assert abs(expected - found) <= atol * (1 + abs(expected)), (
        f"log_prob: {found} for a draw whose density in the guide's trace is {expected}"
    )
    for path in (False, True):
        latent, log_q = guide.rsample_and_log_prob(5, path=path)
        expected = guide.get_posterior().log_prob(latent.detach())
        assert ((log_q - expected).abs() <= atol * (1 + expected.abs())).all(), (
            f"rsample_and_log_prob(path={path}): {log_q}, where the posterior has {expected}"
        )


def _check_second_guide(
    guide: AutoAutoregressive, second: AutoAutoregressive, model: Model, args: Args
) -> None:
    before = _parameters(guide)
    second(*args)
    _check_trains("a second guide", second, model, args)
    moved = _count_moved(guide, before)
    assert not moved, f"training a second guide moves {moved} parameters of the first"


def _check_copies(guide: AutoAutoregressive, model: Model, args: Args, picklable: bool) -> None:
    ways: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy}
    if picklable:
        ways["pickle"] = lambda g: pickle.loads(pickle.dumps(g))
    latent = guide.rsample_and_log_prob(5)[0].detach()
    density = guide.get_posterior().log_prob(latent)
    before = _parameters(guide)
    for way, through in ways.items():
        twin = through(guide)
        assert torch.equal(twin.get_posterior().log_prob(latent), density), (
            f"{way}: another density"
        )
        _check_trains(way, twin, model, args)
        moved = _count_moved(guide, before)
        assert not moved, f"{way}: training the copy moves {moved} parameters of the original"


def _check_store(
    guide: AutoAutoregressive, fresh: AutoAutoregressive, model: Model, args: Args
) -> None:
    store, values = pyro.get_param_store(), list(_parameters(guide).values())
    with store.scope():
        guide(*args)
        state = copy.deepcopy(store.get_state())
    with store.scope(state):
        fresh(*args)
        found = list(_parameters(fresh).values())
        same = all(torch.equal(a, b) for a, b in zip(values, found, strict=True))
        assert same, "a loaded param store: the guide does not have its parameters"
        _check_trains("a loaded param store", fresh, model, args)
