# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Ranks of simulation-based calibration."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from ..diagnostics import SBC, simultaneous_bands
from .axes import GRAY, new_axes, tidied


def plot_ranks(
    result: SBC, names: Sequence[str] | None = None, ax: Axes | None = None, level: float = 0.95
) -> Axes:
    """The distribution functions of ranks minus the uniform one, with simultaneous bands.

    Each line is a coordinate. The line of a correct posterior stays in the bands with probability
    ``level``. A line that rises above and then falls below, an S, shows a posterior that is too narrow;
    its mirror image one that is too wide; a hill or a valley a posterior that is biased.

    :param result: what :func:`~pyro_artransform.diagnostics.sbc` found.
    :param names: the sites to show; by default all.
    :param ax: where to draw; by default new Axes.
    :param level: the level of the bands, for each coordinate on its own.
    :raises ValueError: if a site is unknown.

    **References**

    1. Graphical Test for Discrete Uniformity and Its Applications in Goodness of Fit Evaluation and
       Multiple Sample Comparison (Säilynoja, Bürkner, Vehtari, 2022),
       https://arxiv.org/abs/2103.10522
    """
    names = list(result.ranks) if names is None else list(names)
    unknown = [name for name in names if name not in result.ranks]
    if unknown:
        raise ValueError(f"names: expected some of {list(result.ranks)}, got {unknown}")
    points, lower, upper = simultaneous_bands(result.num_simulations, result.num_draws, level)
    ax = new_axes(ax)
    band = points.numpy(), (lower - points).numpy(), (upper - points).numpy()
    label = f"{100 * level:g} % of right posteriors"
    ax.fill_between(*band, step="mid", color=GRAY, alpha=0.25, linewidth=0, label=label)
    ax.axhline(0, color=GRAY, linewidth=0.8)
    for color, name in enumerate(names):
        ranks = result.ranks[name].reshape(result.num_simulations, -1).to("cpu")
        below = (ranks[..., None] < points * (result.num_draws + 1) - 1e-6).double().mean(0)
        style: dict[str, Any] = {"where": "mid", "color": f"C{color}", "linewidth": 1.1}
        for i, line in enumerate(below - points):
            ax.step(points, line, label=None if i else name, **style)
    ax.set(xlim=(0, 1), xlabel="rank / number of draws", ylabel="ECDF of ranks − uniform")
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    ax.legend(frameon=False, fontsize=8, ncols=min(4, len(names) + 1), **place)
    return tidied(ax)
