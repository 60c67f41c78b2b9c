# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How far means and standard deviations of single latents are off."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from ..diagnostics import Marginals
from ..diagnostics.marginal_judgement import GOOD_MEAN_SHIFT, GOOD_SD_ERROR, bounds_in_words
from .axes import GRAY, new_axes, tidied

_MAX_NAMED = 8  # sites in the legend
_MAX_BARS = 100  # coordinates: more error bars than that hide each other


def plot_marginals(result: Marginals, ax: Axes | None = None) -> Axes:
    """How far each latent's standard deviation is off, over how far its mean is.

    Each dot is a coordinate on the unconstrained space, with standard errors where there are up to 100
    of them. Those of the posterior itself would be in the middle. The gray box holds errors that are
    small enough to be trusted.

    :param result: what :func:`~pyro_artransform.diagnostics.marginals` found.
    :param ax: where to draw; by default new Axes.
    """
    ax = new_axes(ax)
    _draw_box(ax)
    is_few = sum(shift.numel() for shift in result.mean_shift.values()) <= _MAX_BARS
    width, height = 2 * GOOD_MEAN_SHIFT, 2 * GOOD_SD_ERROR
    for k, (name, shift) in enumerate(result.mean_shift.items()):
        x, y = _flat(shift), _flat(result.sd_ratio[name] - 1)
        style: dict[str, Any] = {"fmt": ".", "elinewidth": 0.6, "alpha": 0.7, "color": f"C{k % 10}"}
        if is_few:
            x_se, y_se = _flat(result.mean_shift_se[name]), _flat(result.sd_ratio_se[name])
            style.update(xerr=x_se, yerr=100 * y_se)
        ax.errorbar(x, 100 * y, label=name if k < _MAX_NAMED else None, **style)
        width, height = _largest(width, x), _largest(height, y)
    ax.set(xlim=(-1.1 * width, 1.1 * width), ylim=(-110 * height, 110 * height))
    within = bounds_in_words(result.mean_bound, result.sd_bound)
    ax.set_title(within, fontsize=10)
    ax.set(xlabel="mean too large by (sd)", ylabel="sd too large by (%)")
    ax.legend(frameon=False, fontsize=8)
    return tidied(ax)


def _draw_box(ax: Axes) -> None:
    """The middle, and the errors that are small enough."""
    corner = (-GOOD_MEAN_SHIFT, -100 * GOOD_SD_ERROR)
    sides = (2 * GOOD_MEAN_SHIFT, 200 * GOOD_SD_ERROR)
    ax.add_patch(Rectangle(corner, *sides, color=GRAY, alpha=0.2, linewidth=0))
    ax.axhline(0, color=GRAY, linewidth=0.8)
    ax.axvline(0, color=GRAY, linewidth=0.8)


def _flat(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64).flatten()


def _largest(known: float, values: Tensor) -> float:
    """The largest finite absolute value, or the number that is known if that is larger."""
    return max([known, *values[values.isfinite()].abs().tolist()])
