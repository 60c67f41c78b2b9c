# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The log density of many draws at once, compared with single runs at those on which much rests."""

import copy
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .vectorization import MIXED, STRATEGIES, describe, tolerance

# In float32 that is 0.01 nats of a log density of 1e4, the round-off of its sum.
_TIGHT = 0.01
# draws with the largest and the smallest weights, and of those that differ, which are evaluated many times
_NUM_EXTREME = 2


class Checked(NamedTuple):
    """The log density of draws, and the strategy by which it agrees with single runs."""

    values: Tensor
    strategy: str
    obstacle: str  #: why the next faster strategy does not suit the model


@torch.no_grad()
def checked(log_joint: Any, z: Tensor, log_q: Tensor | None = None) -> Checked:
    """The log density of draws, without gradients, by a strategy that agrees with single runs there.

    A branch such as ``if (z > 2).any()`` mixes draws only where one of them takes it. So strategies are
    compared where much rests on the density.

    :param z: draws, shape ``(n, latent_dim)``.
    :param log_q: the log density of their distribution, shape ``(n,)``: where single runs are needed, draws
        of extreme weights are compared, and a few others; by default all.
    """
    state, density, obstacle = torch.get_rng_state(), copy.copy(log_joint), log_joint.obstacle
    for density.strategy in STRATEGIES[STRATEGIES.index(log_joint.strategy) :]:
        torch.set_rng_state(state)
        try:
            values = density(z)
        except Exception as error:  # a branch that does not take many draws
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
    """Whether the values of draws at once are those of one at a time from a random state."""
    rows, single = _one_by_one(density, z, None if log_q is None else values - log_q, state)
    tol, differs = _TIGHT * tolerance(single), (values[rows] - single).abs().nan_to_num(torch.inf)
    # NaN where the other has a number is the worst of all
    differs[torch.isclose(values[rows], single, tol, tol, equal_nan=True)] = -1.0
    for k in differs.argsort(descending=True)[:_NUM_EXTREME].tolist():
        if differs[k] >= 0:
            # the same draw many times over tells mixed draws from an ill-conditioned density
            torch.set_rng_state(state)
            found = values[rows[k]], density(z[rows[k]].expand_as(z))[rows[k]]
            if not torch.allclose(*found, tol, tol, equal_nan=True):
                return False
    return True


def _one_by_one(
    density: Any, z: Tensor, log_weights: Tensor | None, state: Tensor
) -> tuple[list[int], Tensor]:
    """The draws that are compared, and their log density, NaN where there is none.

    These are all in place of draws in a plate, if the model runs under vmap, which mixes none.
    """
    found, rows = list[Tensor](), list(range(len(z)))
    if density.strategy == "plate":
        apart = copy.copy(density)
        apart.strategy = "vmap"
        torch.set_rng_state(state)
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that its rules for vmap are slow
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
