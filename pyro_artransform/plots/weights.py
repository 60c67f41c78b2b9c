# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The tail of importance weights, which k-hat is the index of."""

from math import isfinite
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from torch import Tensor

from ..diagnostics import Importance, ParetoTail, fit_tail
from ..diagnostics.importance import GOOD_KHAT
from .axes import BLUE, GRAY, ORANGE, new_axes, tidied


def plot_khat(result: Importance, ax: Axes | None = None) -> Axes:
    """The largest importance weights against their rank, with the Pareto tail fitted to them.

    Both axes are logarithmic: the line of a tail of index k has the slope -1 / k far out, and the
    steeper it falls the better. Dashed is the tail of index 0.7, the largest that can be relied on.

    :param result: what :func:`~pyro_artransform.diagnostics.importance` found.
    :param ax: where to draw; by default new Axes.
    """
    ordered = result.log_weights.detach().to("cpu", torch.float64)
    ordered = ordered[ordered.isfinite()].sort(descending=True).values
    tail = fit_tail(result.log_weights)
    ax = new_axes(ax)
    ax.set_title(f"k-hat = {result.khat:.2f} ± {result.khat_se:.2f}")
    ax.set(xlabel="weight / mean weight", ylabel="share of draws with a larger weight")
    if len(ordered):
        _draw_tail(ax, ordered - result.log_evidence, tail, result)
    return tidied(ax)


def _draw_tail(ax: Axes, ordered: Tensor, tail: ParetoTail, result: Importance) -> None:
    shares = (ordered.new_ones(len(ordered)).cumsum(0) - 0.5) / result.num_samples
    shown = slice(0, max(3 * tail.size, 10))
    x, y = ordered[shown].exp().numpy(), shares[shown].numpy()
    style: dict[str, Any] = {"markersize": 4, "alpha": 0.6, "markeredgewidth": 0}
    ax.loglog(x, y, ".", color=BLUE, label="weights", **style)
    if isfinite(tail.scale):
        levels = shares[: tail.size] * result.num_samples / tail.size
        begin, shares = tail.log_cutoff - result.log_evidence, shares[: tail.size]
        line: dict[str, Any] = {"linewidth": 1.8, "label": "Pareto tail"}
        ax.loglog(_tail(tail.khat, tail.scale, begin, levels), shares, color=ORANGE, **line)
        line = {"linewidth": 1.2, "label": f"of index {GOOD_KHAT}", "linestyle": "--"}
        ax.loglog(_tail(GOOD_KHAT, tail.scale, begin, levels), shares, color=GRAY, **line)
    ax.xaxis.set_minor_formatter(NullFormatter())  # labels between decades overlap
    ax.legend(frameon=False)


def _tail(khat: float, scale: float, begin: float, levels: Tensor) -> Tensor:
    """The weights of a Pareto tail that are exceeded at some levels, from the log of its cutoff on."""
    quantiles = torch.special.expm1(-khat * levels.log()) / khat * scale
    return (begin + quantiles.log1p()).exp()
