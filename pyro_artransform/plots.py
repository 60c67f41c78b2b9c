# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of results: each function draws into matplotlib's Axes and returns them."""

from collections.abc import Mapping, Sequence
from itertools import groupby, product
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .diagnostics import SBC, Importance, ParetoTail, fit_tail, simultaneous_bands

try:
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install pyro_artransform[plots]") from error

__all__ = ["plot_elbo", "plot_graph", "plot_khat", "plot_pairs", "plot_ranks"]

_BLUE, _ORANGE, _GRAY = "#2c6fbb", "#d9772b", "#9a9a9a"
_COLORS = {"guide": _BLUE, "reference": _GRAY}
_MAX_COORDINATES = 8
_MAX_POINTS = 2000
_MAX_CELLS = 200  # of a matrix in each direction: more would be less than a pixel
_MIN_NAMED = 0.04  # the least part of an axis that is named


@runtime_checkable
class HasHistory(Protocol):
    """A result with the ELBO of each step, such as that of a fit."""

    history: Sequence[float]


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


def plot_elbo(history: Sequence[float] | Tensor | HasHistory, ax: Axes | None = None) -> Axes:
    """The ELBO by step, and its running median.

    The axis shows the last nine tenths of the steps in full; the first ones, often hundreds of nats
    below, may leave it.

    :param history: the ELBO of each step, or a result with such a ``history``.
    :param ax: where to draw; by default new Axes.
    :raises ValueError: if there are no steps.
    """
    values = history.history if isinstance(history, HasHistory) else history
    steps = torch.as_tensor(values, device="cpu").double().flatten()
    if not len(steps):
        raise ValueError("history: expected the ELBO of at least one step, got none")
    ax = _axes(ax)
    x = range(1, len(steps) + 1)
    ax.plot(x, steps.numpy(), color=_BLUE, alpha=0.3, linewidth=0.8, label="step")
    half = max(1, len(steps) // 50)
    padded = torch.cat([steps[:1].expand(half), steps, steps[-1:].expand(half)])
    median = padded.unfold(0, 2 * half + 1, 1).nanmedian(-1).values
    ax.plot(x, median.numpy(), color=_BLUE, linewidth=1.8, label="running median")
    late = steps[len(steps) // 10 :]
    shown = late[late.isfinite()].tolist()
    if shown and max(shown) > min(shown):
        margin = 0.05 * (max(shown) - min(shown))
        ax.set_ylim(min(shown) - margin, max(shown) + margin)
    ax.set(xlabel="step", ylabel="ELBO (nats)")
    ax.legend(frameon=False, loc="lower right")
    return _tidied(ax)


def plot_pairs(
    draws: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None = None,
    names: Sequence[str] | None = None,
) -> Any:
    """Each coordinate against each other one, with their histograms on the diagonal.

    Below the diagonal the draws are over those of the reference, and above it under them, so that
    what one of the two misses is seen. The axes leave out the outermost half per cent.

    :param draws: draws of a guide, for each site a tensor of shape ``(n,) + site shape``.
    :param reference: draws to compare with, such as those of MCMC.
    :param names: the coordinates to show, such as ``["tau", "theta[0]", "theta[3]"]``, or sites,
        which stand for all of theirs; by default the first eight.
    :return: an array of Axes, one for each pair.
    :raises ValueError: if a name is none of a coordinate or site.
    """
    series = {"guide": _columns(draws)}
    chosen = _chosen(series["guide"], names)
    if reference is not None:
        series = {"reference": _columns(reference), **series}
    missing = [name for name in chosen if any(name not in drawn for drawn in series.values())]
    if missing:
        raise ValueError(f"reference: expected the coordinates {chosen}, got none of {missing}")
    size = len(chosen)
    ranges = {name: _range([drawn[name] for drawn in series.values()]) for name in chosen}
    layout: dict[str, Any] = {"squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(size, size, figsize=(1.8 * size + 1,) * 2, **layout)
    for (i, row), (j, column) in product(enumerate(chosen), enumerate(chosen)):
        ax = axes[i, j]
        for label in series if i >= j else reversed(series):
            x, y = series[label][column], series[label][row]
            if i == j:
                _draw_histogram(ax, x, ranges[column], label)
            else:
                step = max(1, -(-len(x) // _MAX_POINTS))
                dots = {"color": _COLORS[label], "s": 3, "alpha": 0.35, "linewidths": 0}
                ax.scatter(x[::step].numpy(), y[::step].numpy(), **dots)
        _tidied(ax).set(xlabel=column, ylabel=row, xlim=ranges[column])
        ax.tick_params(labelsize=7)
        ax.locator_params(nbins=4)
        ax.label_outer()
        if i == j:
            ax.set_yticks([])
        else:
            ax.set_ylim(ranges[row])
    if reference is not None:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside upper right", ncols=2)
    figure.align_labels()
    return axes


def _draw_histogram(ax: Axes, x: Tensor, limits: tuple[float, float], label: str) -> None:
    style: dict[str, Any] = {"histtype": "step", "linewidth": 1.4}
    if label == "reference":
        style = {"histtype": "stepfilled", "alpha": 0.45}
    style.update(density=True, color=_COLORS[label], label=label)
    ax.hist(x.numpy(), bins=max(10, min(40, int(len(x) ** 0.5))), range=limits, **style)


def _columns(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draws of each coordinate by name, of shape ``(n,)``."""
    columns = {}
    for name, value in draws.items():
        indices = list(product(*map(range, value.shape[1:])))
        flat = value.detach().to("cpu").reshape(len(value), len(indices))
        for index, column in zip(indices, flat.unbind(1)):
            position = f"[{', '.join(map(str, index))}]" if index else ""
            columns[name + position] = column
    return columns


def _chosen(columns: Mapping[str, Tensor], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(columns)[:_MAX_COORDINATES]
    found: list[str] = []
    for name in names:
        those = [column for column in columns if name in (column, column.partition("[")[0])]
        if not those:
            raise ValueError(f"names: expected some of {list(columns)}, got '{name}'")
        found += those
    return found


def _range(columns: Sequence[Tensor]) -> tuple[float, float]:
    """The range of draws but for the outermost half per cent, and a margin."""
    ordered = [column.double().sort().values for column in columns]
    low = min(column[int(0.005 * len(column))].item() for column in ordered)
    high = max(column[-1 - int(0.005 * len(column))].item() for column in ordered)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


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
    ax = _axes(ax)
    band = points.numpy(), (lower - points).numpy(), (upper - points).numpy()
    label = f"{100 * level:g} % of right posteriors"
    ax.fill_between(*band, step="mid", color=_GRAY, alpha=0.25, linewidth=0, label=label)
    ax.axhline(0, color=_GRAY, linewidth=0.8)
    for color, name in enumerate(names):
        ranks = result.ranks[name].reshape(result.num_simulations, -1).to("cpu")
        below = (ranks[..., None] < points * (result.num_draws + 1) - 1e-6).double().mean(0)
        style: dict[str, Any] = {"where": "mid", "color": f"C{color}", "linewidth": 1.1}
        for i, line in enumerate(below - points):
            ax.step(points, line, label=None if i else name, **style)
    ax.set(xlim=(0, 1), xlabel="rank / number of draws", ylabel="ECDF of ranks − uniform")
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    ax.legend(frameon=False, fontsize=8, ncols=min(4, len(names) + 1), **place)
    return _tidied(ax)


def plot_khat(result: Importance, ax: Axes | None = None) -> Axes:
    """The largest importance weights against their rank, with the Pareto tail fitted to them.

    Both axes are logarithmic: the line of a tail of index k has the slope -1 / k far out, and the
    steeper it falls the better.

    :param result: what :func:`~pyro_artransform.diagnostics.importance` found.
    :param ax: where to draw; by default new Axes.
    """
    ordered = result.log_weights.detach().to("cpu", torch.float64)
    ordered = ordered[ordered.isfinite()].sort(descending=True).values
    tail = fit_tail(result.log_weights)
    ax = _axes(ax)
    ax.set_title(f"k-hat = {result.khat:.2f} ± {result.khat_se:.2f}")
    ax.set(xlabel="weight / mean weight", ylabel="share of draws with a larger weight")
    if len(ordered):
        _draw_tail(ax, ordered - result.log_evidence, tail, result)
    return _tidied(ax)


def _draw_tail(ax: Axes, ordered: Tensor, tail: ParetoTail, result: Importance) -> None:
    shares = (ordered.new_ones(len(ordered)).cumsum(0) - 0.5) / result.num_samples
    shown = slice(0, max(3 * tail.size, 10))
    x, y = ordered[shown].exp().numpy(), shares[shown].numpy()
    style: dict[str, Any] = {"markersize": 4, "alpha": 0.6, "markeredgewidth": 0}
    ax.loglog(x, y, ".", color=_BLUE, label="weights", **style)
    if isfinite(tail.scale):
        levels = shares[: tail.size] * result.num_samples / tail.size
        quantiles = torch.special.expm1(-tail.khat * levels.log()) / tail.khat * tail.scale
        weights = (tail.log_cutoff - result.log_evidence + quantiles.log1p()).exp()
        ax.loglog(weights, shares[: tail.size], color=_ORANGE, linewidth=1.8, label="Pareto tail")
    ax.xaxis.set_minor_formatter(NullFormatter())  # labels between decades overlap
    ax.legend(frameon=False)


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
    ax = _axes(ax, (8.4, 4.2))
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
    frame: dict[str, Any] = {"fill": False, "edgecolor": _GRAY, "linewidth": 0.8}
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


def _axes(ax: Axes | None, size: tuple[float, float] = (6, 3.6)) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _tidied(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax
