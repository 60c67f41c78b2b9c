# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Axes and colours that all pictures share."""

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GRAY = "#2c6fbb", "#d9772b", "#9a9a9a"


def new_axes(ax: Axes | None, size: tuple[float, float] = (6, 3.6)) -> Axes:
    """The given Axes, or new ones of a size in inches."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def tidied(ax: Axes) -> Axes:
    """The Axes without the two sides that bound nothing."""
    ax.spines[["top", "right"]].set_visible(False)
    return ax
