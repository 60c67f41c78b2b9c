# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Plots of a fit: its ELBO, weights and errors of marginals; and of the graph of a structured guide."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import isfinite, nan
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor

from ..diagnostics import Importance, Marginals, fit_tail
from ..diagnostics.importance_sampling import GOOD_ERROR, GOOD_KHAT
from ..diagnostics.marginals import bounds_in_words
from ..guides import AutoStructuredFlow
from ..guides.structured.latent_graph import LatentGraph, Name
from ..inference import FitResult

_MAX_CELLS = 200  # of a matrix in each direction; more would be smaller than a pixel
BLUE, ORANGE, GRAY = "#2c6fbb", "#d9772b", "#9a9a9a"


def new_axes(ax: Axes | None, **labels: str) -> Axes:
    """Labels Axes, by default new ones, and hides their top and right spines."""
    ax = plt.subplots(figsize=(6, 3.6), layout="constrained")[1] if ax is None else ax
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(**labels)
    return ax


def doubles(value: Tensor) -> Tensor:
    """A tensor flattened to float64 on the CPU, for matplotlib."""
    return value.detach().to("cpu", torch.float64).flatten()


def _part(result: Any, name: str) -> Any:
    """The named part of the result of a fit, or the argument if it is that part."""
    part = getattr(result, name, result)
    if part is None:
        raise ValueError(
            f"result: expected one with {name}, got none from this fit: {result.verdict}"
        )
    return part


def plot_elbo(history: Sequence[float] | Tensor | FitResult, ax: Axes | None = None) -> Axes:
    """Plots the ELBO by step, and its running median.

    The vertical axis fits the last 90 % of the steps; the first ones may be hundreds of nats below it.

    :param history: the ELBO of each step, or a result with such a ``history``.
    :param ax: the Axes to draw into; new ones by default.
    :raises ValueError: if there are no steps.
    """
    steps = doubles(torch.as_tensor(getattr(history, "history", history), device="cpu"))
    if not len(steps):
        raise ValueError("history: expected the ELBO of at least one step, got none")
    ax, half = new_axes(ax, xlabel="step", ylabel="ELBO (nats)"), max(1, len(steps) // 50)
    padded = torch.cat([steps[:1].expand(half), steps, steps[-1:].expand(half)])
    median = padded.unfold(0, 2 * half + 1, 1).nanmedian(-1).values
    x = range(1, len(steps) + 1)
    ax.plot(x, steps, color=BLUE, alpha=0.3, linewidth=0.8, label="step")
    ax.plot(x, median, color=BLUE, label="running median")
    shown = list(filter(isfinite, steps[len(steps) // 10 :].tolist())) or [0.0]
    if margin := 0.05 * (max(shown) - min(shown)):
        ax.set_ylim(min(shown) - margin, max(shown) + margin)
    ax.legend(frameon=False, loc="lower right")
    return ax


def plot_khat(result: Importance | FitResult, ax: Axes | None = None) -> Axes:
    """Plots the largest importance weights against their rank, with the fitted Pareto tail.

    Far out, a tail of index k has slope -1 / k; the dashed line has 0.7, the largest reliable index.

    :param result: the result of :func:`~pyro_artransform.diagnostics.importance`, or of a fit.
    :param ax: the Axes to draw into; new ones by default.
    """
    weights: Importance = _part(result, "importance")
    title = f"k-hat = {weights.khat:.2f} ± {weights.khat_se:.2f}"
    tail = fit_tail(weights.log_weights)
    ax = new_axes(ax, xlabel="weight / mean weight", ylabel="share of larger weights", title=title)
    ordered = doubles(weights.log_weights).sort(descending=True).values
    ordered = ordered[ordered.isfinite()] - weights.log_evidence
    ranks = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device="cpu") - 0.5
    shares, top = ranks / weights.num_samples, max(3 * tail.size, 10)
    ax.loglog(ordered[:top].exp(), shares[:top], ".", color=BLUE, alpha=0.6, label="weights")
    if isfinite(tail.scale) and len(ordered):
        levels, limit = ranks[: tail.size] / tail.size, f"of index {GOOD_KHAT}"
        for label, khat, style in (("Pareto tail", tail.khat, "-"), (limit, GOOD_KHAT, "--")):
            # the weights that a tail of this index exceeds with these probabilities
            quantiles = torch.expm1(-khat * levels.log()) / khat * tail.scale
            x = (tail.log_cutoff - weights.log_evidence + quantiles.log1p()).exp()
            ax.loglog(x, shares[: tail.size], style, color=ORANGE, label=label)
    ax.xaxis.set_minor_formatter(NullFormatter())  # labels between decades overlap
    ax.legend(frameon=False)
    return ax


def plot_marginals(result: Marginals | FitResult, ax: Axes | None = None) -> Axes:
    """Plots the error of each latent's standard deviation against that of its mean.

    Each dot is a coordinate on the unconstrained space; errors in the gray box are small enough to trust.

    :param result: the result of :func:`~pyro_artransform.fit`, or its ``marginals``.
    :param ax: the Axes to draw into; new ones by default.
    :raises ValueError: if the fit has no ``marginals``, for example because chains have not mixed.
    """
    marginals: Marginals = _part(result, "marginals")
    ax = new_axes(ax, xlabel="error of the mean (posterior sd)", ylabel="error of the sd (%)")
    x, y = GOOD_ERROR, 100 * GOOD_ERROR
    ax.add_patch(Rectangle((-x, -y), 2 * x, 2 * y, color=GRAY, alpha=0.2))
    limits = torch.tensor([2 * x, 2 * y], dtype=torch.float64, device="cpu")
    has_bars = sum(map(torch.numel, marginals.mean_shift.values())) <= 100  # more would overlap
    for k, (name, shift) in enumerate(marginals.mean_shift.items()):
        dots = torch.stack([doubles(shift), 100 * doubles(marginals.sd_ratio[name] - 1)])
        style: dict[str, Any] = {"fmt": ".", "color": f"C{k % 10}", "elinewidth": 0.6}
        if has_bars:
            style["xerr"] = doubles(marginals.mean_shift_se[name])
            style["yerr"] = 100 * doubles(marginals.sd_ratio_se[name])
        ax.errorbar(dots[0], dots[1], label=name if k < 8 else None, **style)
        limits = limits.maximum(dots.abs().nan_to_num(0, 0).amax(1))
    x, y = (1.1 * limits).tolist()
    title = bounds_in_words(marginals.mean_bound, marginals.sd_bound)
    ax.set(xlim=(-x, x), ylim=(-y, y), title=title)
    ax.legend(frameon=False, fontsize=8)
    return ax


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
