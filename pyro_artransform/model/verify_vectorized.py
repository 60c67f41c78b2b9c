# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The vectorized log density of draws, verified by single runs at the draws that matter most."""

import copy
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .vectorization import MIXED, STRATEGIES, describe, tolerance

# relative to the usual tolerance; in float32 0.01 nats for a log density of 1e4, the round-off of its sum
_TIGHT = 0.01
# number of draws compared at either extreme of the weights, and of differing draws evaluated again in copies
_NUM_EXTREME = 2


class Checked(NamedTuple):
    """The log density of draws, and the strategy that agrees with single runs."""

    values: Tensor
    strategy: str
    obstacle: str  #: why the next faster strategy does not suit the model


@torch.no_grad()
def checked(log_joint: Any, z: Tensor, log_q: Tensor | None = None) -> Checked:
    """Evaluates the log density of draws, without gradients, by a strategy that agrees with single runs.

    A branch such as ``if (z > 2).any()`` mixes draws only where one of them takes it, so strategies are
    compared at the draws themselves.

    :param z: draws, shape ``(n, latent_dim)``.
    :param log_q: the log density of the proposal at the draws, shape ``(n,)``; then single runs, if needed,
        are limited to draws of extreme weights and a few others. By default all draws are compared.
    """
    state, density, obstacle = torch.get_rng_state(), copy.copy(log_joint), log_joint.obstacle
    for density.strategy in STRATEGIES[STRATEGIES.index(log_joint.strategy) :]:
        torch.set_rng_state(state)
        try:
            values = density(z)
        except Exception as error:  # a branch that cannot take many draws
            if density.strategy == "loop":
                raise
            obstacle = describe(error)
            continue
        if density.strategy == "loop" or len(z) == 1:
            break
        after = torch.get_rng_state()
        agrees = _agrees(density, z, values, log_q, state)
        torch.set_rng_state(after)
        if agrees:
            break
        obstacle = MIXED
    return Checked(values, density.strategy, obstacle)


def _agrees(density: Any, z: Tensor, values: Tensor, log_q: Tensor | None, state: Tensor) -> bool:
    """Whether vectorized values equal those of single draws from the same random state."""
    rows, single = _one_by_one(density, z, None if log_q is None else values - log_q, state)
    tol, differs = _TIGHT * tolerance(single), (values[rows] - single).abs().nan_to_num(torch.inf)
    # NaN in place of a number counts as the largest difference
    differs[torch.isclose(values[rows], single, tol, tol, equal_nan=True)] = -1.0
    for k in differs.argsort(descending=True)[:_NUM_EXTREME].tolist():
        if differs[k] >= 0:
            # a batch of copies of the draw tells mixed draws from an ill-conditioned density
            torch.set_rng_state(state)
            found = values[rows[k]], density(z[rows[k]].expand_as(z))[rows[k]]
            if not torch.allclose(*found, tol, tol, equal_nan=True):
                return False
    return True


def _one_by_one(
    density: Any, z: Tensor, log_weights: Tensor | None, state: Tensor
) -> tuple[list[int], Tensor]:
    """Indices of the draws to compare, and their log densities, NaN where the model fails.

    Draws in a plate are all compared if the model runs under vmap, which mixes no draws.
    """
    found, rows = list[Tensor](), list(range(len(z)))
    if density.strategy == "plate":
        apart = copy.copy(density)
        apart.strategy = "vmap"
        torch.set_rng_state(state)
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of slow vmap rules
            return rows, apart(z)
    if log_weights is not None:
        order, few = log_weights.argsort().tolist(), _NUM_EXTREME
        rows = sorted({*order[:few], *order[-few:], *rows[: 2 * few]})
    for i in rows:
        torch.set_rng_state(state)
        try:
            found.append(density(z[i : i + 1]))
        except Exception:  # the model does not take this draw
            found.append(z.new_full((1,), torch.nan))
    return rows, torch.cat(found)
