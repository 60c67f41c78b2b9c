# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The graph of the latents of a structured guide."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .axes import GRAY, new_axes

_MAX_CELLS = 200  # of a matrix in each direction: more would be less than a pixel
_MIN_NAMED = 0.04  # the least part of an axis that is named


class LatentGraph(Protocol):
    """Which latents depend on each other and how they are drawn, by names such as ``("h", 3)``."""

    @property
    def names(self) -> Sequence[tuple[Any, ...]]: ...

    @property
    def levels(self) -> Sequence[Sequence[tuple[Any, ...]]]: ...

    def neighbours(self, *name: Any) -> Sequence[tuple[Any, ...]]: ...

    def parents(self, *name: Any) -> Sequence[tuple[Any, ...]]: ...


@runtime_checkable
class HasGraph(Protocol):
    """A guide with the graph of its latents."""

    @property
    def graph(self) -> LatentGraph: ...


def plot_graph(graph: HasGraph | LatentGraph, ax: Axes | None = None) -> Axes:
    """Which latents depend on each other: the pattern of the Hessian of the log density, twice.

    On the left in the order of the model, on the right in that of the guide, level by level. The colour
    is the level at which the guide draws the later of the two latents; those of a level are drawn at once,
    given what is to their left. Gray are parents that latents have in common children only, the fill-in
    of a sparse Cholesky factor. Of more than 200 latents several share a cell.

    :param graph: a guide such as ``AutoStructuredFlow``, after its first call, or its ``graph``.
    :param ax: where to draw; by default new Axes.
    """
    found = graph.graph if isinstance(graph, HasGraph) else graph
    names, dim = found.names, len(found.names)
    level = {name: k for k, members in enumerate(found.levels) for name in members}
    by_level = sorted(names, key=level.__getitem__)  # stable, so as in the model within a level
    pairs = [(one, two) for one in names for two in (one, *found.neighbours(*one))]
    known = set(pairs)
    filled = [(one, two) for one in names for two in found.parents(*one) if (one, two) not in known]
    ax = new_axes(ax, (8.4, 4.2))
    colors = plt.get_cmap("viridis", len(found.levels))
    style: dict[str, Any] = {"cmap": colors, "vmin": -0.5, "vmax": len(found.levels) - 0.5}
    right, margin = 1.14 * dim, 0.02 * dim
    gray: dict[str, Any] = {"cmap": "gray", "vmin": -3, "vmax": 1}
    _draw_pattern(ax, by_level, filled + [pair[::-1] for pair in filled], {}, right, gray)
    for left, order in ((0.0, names), (right, by_level)):
        image = _draw_pattern(ax, order, pairs, level, left, style)
    ax.set(xlim=(-margin, right + dim + margin), ylim=(dim + margin, -margin), aspect="equal")
    sites = _named_runs([str(name[0]) for name in names])
    levels = _named_runs([f"level {level[name]}" for name in by_level])
    ticks = {**sites, **{place + right: label for place, label in levels.items()}}
    ax.set_xticks(list(ticks), ticks.values(), rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(list(sites), sites.values())
    of_guide = "order of the guide" + (" (gray: fill-in)" if filled else "")
    for left, title in ((0.0, "order of the model"), (right, of_guide)):
        ax.text(left + dim / 2, -2 * margin, title, ha="center", va="bottom")
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, label="level")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def _draw_pattern(
    ax: Axes,
    order: Sequence[tuple[Any, ...]],
    pairs: Sequence[tuple[Any, Any]],
    level: Mapping[Any, int],
    left: float,
    style: Mapping[str, Any],
) -> Any:
    """A square of cells; each has the last level of its pairs, and no colour if there are none."""
    dim = len(order)
    size = min(dim, _MAX_CELLS)
    cell = {name: place * size // dim for place, name in enumerate(order)}
    cells = torch.full((size * size,), -1.0, dtype=torch.float64, device="cpu")
    where = torch.tensor(
        [cell[one] * size + cell[two] for one, two in pairs], dtype=torch.long, device="cpu"
    )
    last = [float(max(level.get(one, 0), level.get(two, 0))) for one, two in pairs]
    values = torch.tensor(last, dtype=torch.float64, device="cpu")
    cells = cells.scatter_reduce(0, where, values, "amax")
    shown = cells.masked_fill(cells < 0, torch.nan).reshape(size, size)
    extent = (left, left + dim, dim, 0)
    frame: dict[str, Any] = {"fill": False, "edgecolor": GRAY, "linewidth": 0.8}
    margin = 0.01 * dim  # so that the frame hides no row
    ax.add_patch(Rectangle((left - margin, -margin), dim + 2 * margin, dim + 2 * margin, **frame))
    return ax.imshow(shown.numpy(), extent=extent, interpolation="nearest", **style)


def _named_runs(labels: Sequence[str]) -> dict[float, str]:
    """The middle of each run of equal labels that is a large enough part of all, with its label."""
    named, start = {}, 0
    for label, run in groupby(labels):
        end = start + len(list(run))
        if end - start >= _MIN_NAMED * len(labels):
            named[(start + end) / 2] = label
        start = end
    return named
