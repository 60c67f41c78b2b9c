# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The graph of the latents of a structured guide."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import nan
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..guides import AutoStructuredFlow
from ..guides.structured.latent_graph import LatentGraph, Name
from .panels import GRAY, new_axes


def plot_graph(graph: AutoStructuredFlow | LatentGraph, ax: Axes | None = None) -> Axes:
    """Which latents depend on each other: the pattern of the Hessian of the log density, twice.

    On the left in the order of the model, on the right in that of the guide, level by level. The colour
    is the level at which the guide draws the later of the two latents; those of a level are drawn at once,
    given what is to their left. Gray are parents that latents have in common children only, the fill-in
    of a sparse Cholesky factor. Of more than 200 latents several share a cell.

    :param graph: a guide after its first call, or its ``graph``.
    :param ax: where to draw; by default new Axes.
    """
    found = graph if isinstance(graph, LatentGraph) else graph.graph
    names, dim = found.names, len(found.names)
    level = {name: k for k, members in enumerate(found.levels) for name in members}
    by_level = sorted(names, key=level.__getitem__)  # stable, so as in the model within a level
    pairs = [(one, two) for one in names for two in (one, *found.neighbours(*one))]
    known = set(pairs)
    filled = [(one, two) for one in names for two in found.parents(*one) if (one, two) not in known]
    filled += [(two, one) for one, two in filled]
    ax, right, margin = new_axes(ax, (8.4, 4.2)), 1.14 * dim, 0.02 * dim
    of_guide = "order of the guide (gray: fill-in)" if filled else "order of the guide"
    _draw_pattern(ax, by_level, dict.fromkeys(filled, 0.0), right, cmap="gray", vmin=-3, vmax=1)
    top, colors = len(found.levels) - 0.5, plt.get_cmap("viridis", len(found.levels))
    levels = {pair: float(max(map(level.__getitem__, pair))) for pair in pairs}
    for left, order, title in ((0.0, names, "order of the model"), (right, by_level, of_guide)):
        image = _draw_pattern(ax, order, levels, left, cmap=colors, vmin=-0.5, vmax=top)
        ax.text(left + dim / 2, -2 * margin, title, ha="center", va="bottom")
    ax.set(xlim=(-margin, right + dim + margin), ylim=(dim + margin, -margin), aspect="equal")
    sites = _named_runs([str(name[0]) for name in names])
    runs = _named_runs([f"level {level[name]}" for name in by_level])
    ticks = sites | {right + place: label for place, label in runs.items()}
    ax.set_xticks(list(ticks), ticks.values(), rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(list(sites), sites.values())
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, label="level")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def _draw_pattern(
    ax: Axes,
    order: Sequence[Name],
    values: Mapping[tuple[Name, Name], float],
    left: float,
    **style: Any,
) -> Any:
    """A square of up to 200 by 200 cells, each of the largest value of its pairs, or empty."""
    dim, size = len(order), min(len(order), 200)
    cell = {name: place * size // dim for place, name in enumerate(order)}
    cells = [[nan] * size for _ in range(size)]
    for (one, two), value in values.items():
        row, column = cells[cell[one]], cell[two]
        row[column] = max(value, row[column])  # the value, where that of the cell is NaN
    margin = 0.01 * dim  # so that the frame hides no row
    side = dim + 2 * margin
    ax.add_patch(Rectangle((left - margin, -margin), side, side, fill=False, color=GRAY, lw=0.8))
    return ax.imshow(cells, extent=(left, left + dim, dim, 0), interpolation="nearest", **style)


def _named_runs(labels: Sequence[str]) -> dict[float, str]:
    """The middle of each run of equal labels that is 4 % of all at least, with its label."""
    named, start = {}, 0
    for label, run in groupby(labels):
        end = start + len(list(run))
        if end - start >= 0.04 * len(labels):
            named[(start + end) / 2] = label
        start = end
    return named
