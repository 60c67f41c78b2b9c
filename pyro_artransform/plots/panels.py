# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Plots of a fit: its ELBO, its importance weights, and errors of its marginals."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter
from torch import Tensor

from ..diagnostics import Importance, Marginals, fit_tail
from ..diagnostics.importance_sampling import GOOD_ERROR, GOOD_KHAT
from ..diagnostics.marginals import bounds_in_words
from ..inference import FitResult

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
