# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a posterior, each coordinate against each other one."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from matplotlib import pyplot as plt
from torch import Tensor

from .panels import BLUE, GRAY, tidied

_STYLES: dict[str, dict[str, Any]] = {
    "guide": {"color": BLUE, "histtype": "step", "linewidth": 1.4},
    "reference": {"color": GRAY, "histtype": "stepfilled", "alpha": 0.45},
}
_MAX_COORDINATES, _MAX_POINTS = 8, 2000


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
    :raises ValueError: if a name is not that of a coordinate or site, or shown draws are not finite.
    """
    series = {"guide": _columns(draws)}
    chosen = _chosen(series["guide"], names)
    if reference is not None:
        series = {"reference": _columns(reference), **series}
    missing = [name for name in chosen if any(name not in drawn for drawn in series.values())]
    if missing:
        raise ValueError(f"reference: expected the coordinates {chosen}, got none of {missing}")
    size = len(chosen)
    ranges = {name: _range(name, [drawn[name] for drawn in series.values()]) for name in chosen}
    layout: dict[str, Any] = {"squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(size, size, figsize=(1.8 * size + 1,) * 2, **layout)
    for (i, row), (j, column) in product(enumerate(chosen), enumerate(chosen)):
        ax = tidied(axes[i, j], column, row)
        for label in series if i >= j else reversed(series):
            x, y, style = series[label][column], series[label][row], _STYLES[label]
            if i == j:
                bins = max(10, min(40, int(len(x) ** 0.5)))
                ax.hist(x, bins, range=ranges[column], density=True, label=label, **style)
            else:
                step = max(1, -(-len(x) // _MAX_POINTS))
                ax.scatter(x[::step], y[::step], s=3, c=style["color"], alpha=0.35, linewidths=0)
        ax.set_xlim(ranges[column])
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


def _columns(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draws of each coordinate by name, of shape ``(n,)``."""
    columns = {}
    for name, value in draws.items():
        indices = list(product(*map(range, value.shape[1:])))
        flat = value.detach().to("cpu").reshape(len(value), len(indices))
        for index, column in zip(indices, flat.unbind(1)):
            columns[f"{name}{list(index) or ''}"] = column
    return columns


def _chosen(columns: Mapping[str, Tensor], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(columns)[:_MAX_COORDINATES]
    chosen: list[str] = []
    for name in names:
        found = [column for column in columns if name in (column, column.partition("[")[0])]
        if not found:
            raise ValueError(f"names: expected some of {list(columns)}, got '{name}'")
        chosen += found
    return chosen


def _range(name: str, columns: Sequence[Tensor]) -> tuple[float, float]:
    """The range of draws of a coordinate but for the outermost half per cent, and a margin."""
    count = sum(int((~column.isfinite()).sum()) for column in columns)
    if count:
        raise ValueError(f"draws: expected finite numbers, got {count} of '{name}' that are not")
    low = min(column.double().quantile(0.005).item() for column in columns)
    high = max(column.double().quantile(0.995).item() for column in columns)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin
