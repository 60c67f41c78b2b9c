# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Plots the graph of the latents of a structured guide."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import nan
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..guides import AutoStructuredFlow
from ..guides.structured.latent_graph import LatentGraph, Name

_MAX_CELLS = 200  # of a matrix in each direction; more would be smaller than a pixel


def plot_graph(graph: AutoStructuredFlow | LatentGraph, ax: Axes | None = None) -> Axes:
    """Plots which latents depend on each other, as the sparsity pattern of the log density's Hessian.

    The left matrix has the order of the model, the right one that of the guide. The colour is the level at
    which the guide draws the later of the two latents; gray is fill-in. Above 200, latents share cells.

    :param graph: a guide after its first call, or its ``graph``.
    :param ax: the Axes to draw into; new ones by default.
    """
    found = graph if isinstance(graph, LatentGraph) else graph.graph
    names, num_levels = found.names, len(found.levels)
    level = {name: k for k, members in enumerate(found.levels) for name in members}
    by_level = sorted(names, key=level.__getitem__)  # stable: the model's order within a level
    pairs = {(one, two) for one in names for two in (one, *found.neighbours(*one))}
    filled = {(one, two) for one in names for two in found.parents(*one)} - pairs
    levels = {pair: float(max(map(level.__getitem__, pair))) for pair in pairs}
    gray = {pair: -1.0 for one, two in filled for pair in ((one, two), (two, one))}
    ax = ax or plt.subplots(figsize=(8.4, 4.2), layout="constrained")[1]
    ax.set_axis_off()
    style: Any = {"cmap": plt.get_cmap("viridis", num_levels).with_extremes(under="silver")}
    style.update(interpolation="nearest", vmin=-0.5, vmax=num_levels - 0.5)
    of_guide = "order of the guide" + " (gray: fill-in)" * bool(filled)
    squares = ("order of the model", names, levels), (of_guide, by_level, gray | levels)
    labels = [str(name[0]) for name in names], [f"level {level[name]}" for name in by_level]
    for left, (title, order, values), ticks in zip((0.0, 0.53), squares, map(_named_runs, labels)):
        square = ax.inset_axes((left, 0.0, 0.47, 1.0), title=title)
        image = square.imshow(_cells(order, values), extent=(0, len(names), len(names), 0), **style)
        square.set_xticks(list(ticks), ticks.values(), rotation=30, ha="right")
        square.set_yticks(list(ticks), ticks.values())
    square.set_yticks([])  # rows have the order of the columns
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label="level", ticks=MaxNLocator(integer=True))
    return ax


def _cells(order: Sequence[Name], values: Mapping[tuple[Name, Name], float]) -> Any:
    """A square matrix of cells, each with the largest value of its pairs, or NaN."""
    size = min(len(order), _MAX_CELLS)
    cell = {name: place * size // len(order) for place, name in enumerate(order)}
    cells = [[nan] * size for _ in range(size)]
    for (one, two), value in values.items():
        row, column = cells[cell[one]], cell[two]
        row[column] = max(value, row[column])  # the value if the cell is NaN
    return cells


def _named_runs(labels: Sequence[str]) -> dict[float, str]:
    """The midpoint and label of each run of equal labels that is long enough."""
    named, end = {}, 0
    for label, run in groupby(labels):
        start, end = end, end + len(list(run))
        if end - start >= 0.04 * len(labels):  # room for a name
            named[(start + end) / 2] = label
    return named
