# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A fit: the ELBO by step, and everything that its verdict rests on."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from math import inf, isfinite
from typing import Any, Protocol, runtime_checkable

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from ..inference import FitResult
from .axes import BLUE, GRAY, ORANGE, new_axes, tidied
from .marginals import plot_marginals
from .weights import plot_khat

_PANEL = (4.4, 3.4)  # width and height in inches
_LETTERS = 16  # of the verdict in an inch


@runtime_checkable
class HasHistory(Protocol):
    """A result with the ELBO of each step, such as that of a fit."""

    history: Sequence[float]


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
    ax = new_axes(ax)
    x = range(1, len(steps) + 1)
    ax.plot(x, steps.numpy(), color=BLUE, alpha=0.3, linewidth=0.8, label="step")
    half = max(1, len(steps) // 50)
    padded = torch.cat([steps[:1].expand(half), steps, steps[-1:].expand(half)])
    median = padded.unfold(0, 2 * half + 1, 1).nanmedian(-1).values
    ax.plot(x, median.numpy(), color=BLUE, linewidth=1.8, label="running median")
    late = steps[len(steps) // 10 :]
    shown = late[late.isfinite()].tolist()
    if shown and max(shown) > min(shown):
        margin = 0.05 * (max(shown) - min(shown))
        ax.set_ylim(min(shown) - margin, max(shown) + margin)
    ax.set(xlabel="step", ylabel="ELBO (nats)")
    ax.legend(frameon=False, loc="lower right")
    return tidied(ax)


def plot_fit(result: FitResult) -> Any:
    """A fit in one picture, under its verdict: the ELBO by step, and what is known of the posterior.

    The panels are those of :func:`plot_elbo`, with the ELBO and the log evidence at the end;
    of :func:`plot_khat`, where there are weights of all data; and of :func:`plot_marginals`, where the
    fit has looked at single latents.

    :param result: what :func:`~pyro_artransform.fit` has returned.
    :return: an array of Axes, one for each panel.
    :raises TypeError: if it is no result of a fit.
    """
    if not isinstance(result, FitResult):
        raise TypeError(f"result: expected what fit returns, got {type(result).__name__}")
    panels: list[Callable[[Axes], Axes]] = [partial(_draw_elbo, result)]
    if result.importance is not None:
        panels.append(partial(plot_khat, result.importance))
    if result.marginals is not None:
        panels.append(partial(plot_marginals, result.marginals))
    width, height = len(panels) * _PANEL[0], _PANEL[1]
    words = textwrap.wrap(result.verdict, int(_LETTERS * width))
    size = width, height + 0.15 * len(words)
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=size, layout="constrained")
    figure.suptitle("\n".join(words), fontsize=8)
    for ax, draw in zip(axes[0], panels):
        draw(ax)
    return axes[0]


def _draw_elbo(result: FitResult, ax: Axes) -> Axes:
    """The ELBO of each step, if there were any, over the one at the end and the log evidence."""
    if result.history:
        plot_elbo(result.history, ax)
    else:
        tidied(ax).set(xlabel="step", ylabel="ELBO (nats)", xticks=[])
    ends = {"ELBO at the end": (result.elbo, ORANGE), "log evidence": (result.log_evidence, GRAY)}
    low, high = ax.get_ylim() if result.history else (inf, -inf)
    for name, (value, color) in ends.items():
        if isfinite(value):
            ax.axhline(value, color=color, linewidth=1.2, linestyle="--", label=name)
            low, high = min(low, value), max(high, value)
    if isfinite(high - low):
        margin = 0.05 * (high - low) or 1.0
        ax.set_ylim(low - margin, high + margin)
        ax.legend(frameon=False, loc="lower right", fontsize=8)
    ax.set_title(f"ELBO = {result.elbo:.3f} ± {result.elbo_se:.3f}")
    return ax
