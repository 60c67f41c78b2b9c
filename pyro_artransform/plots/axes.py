# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Axes and colours that all pictures share."""

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

BLUE, ORANGE, GRAY = "#2c6fbb", "#d9772b", "#9a9a9a"


def new_axes(ax: Axes | None, size: tuple[float, float] = (6, 3.6)) -> Axes:
    """The given Axes, or new ones of a size in inches."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def tidied(ax: Axes, x: str, y: str) -> Axes:
    """The Axes with their labels, without the two sides that bound nothing."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlabel=x, ylabel=y)
    return ax


def doubles(value: Tensor) -> Tensor:
    """All numbers of a tensor, as matplotlib takes them."""
    return value.detach().to("cpu", torch.float64).flatten()
