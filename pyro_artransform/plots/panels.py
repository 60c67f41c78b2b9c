# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Single pictures of results, and the picture of a fit that puts them side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter
from torch import Tensor

from ..diagnostics import SBC, Importance, Marginals, fit_tail, simultaneous_bands
from ..diagnostics.convergence import Convergence
from ..diagnostics.importance import GOOD_KHAT, GOOD_MEAN_SHIFT, GOOD_SD_ERROR
from ..diagnostics.marginals import bounds_in_words
from ..inference import Chains, FitResult

BLUE, ORANGE, GRAY = "#2c6fbb", "#d9772b", "#9a9a9a"
_MAX_NAMED = 8  # sites in the legend
_MAX_BARS = 100  # coordinates: more error bars than that hide each other


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


def plot_fit(result: FitResult) -> Any:
    """A fit in one picture, under its verdict.

    The panels are those of :func:`plot_elbo`, with the ELBO and the log evidence at the end; of
    :func:`plot_khat`, where there are weights of all data; and of :func:`plot_marginals`, where the
    fit has checked single latents.

    :param result: what :func:`~pyro_artransform.fit` has returned.
    :return: an array of Axes, one for each panel.
    :raises TypeError: if it is not the result of a fit.
    """
    if not isinstance(result, FitResult):
        raise TypeError(f"result: expected what fit returns, got {type(result).__name__}")
    count = 1 + (result.importance is not None) + (result.marginals is not None)
    words = textwrap.fill(result.verdict, 70 * count)
    size = 4.4 * count, 3.4 + 0.15 * words.count("\n")
    figure, axes = plt.subplots(1, count, squeeze=False, figsize=size, layout="constrained")
    figure.suptitle(words, fontsize=8)
    _draw_elbo(result, axes[0, 0])
    if result.importance is not None:
        plot_khat(result.importance, axes[0, 1])
    if result.marginals is not None:
        plot_marginals(result.marginals, axes[0, -1])
    return axes[0]


def _draw_elbo(result: FitResult, ax: Axes) -> None:
    """The ELBO of each step, if there were any, over the one at the end and the log evidence."""
    low, high = inf, -inf
    if result.history:
        low, high = plot_elbo(result.history, ax).get_ylim()
    else:
        tidied(ax, "step", "ELBO (nats)").set(xticks=[])
    ends = {"ELBO at the end": (result.elbo, ORANGE), "log evidence": (result.log_evidence, GRAY)}
    for name, (value, color) in ends.items():
        if isfinite(value):
            ax.axhline(value, color=color, linewidth=1.2, linestyle="--", label=name)
            low, high = min(low, value), max(high, value)
    if isfinite(high - low):
        margin = 0.05 * (high - low) or 1.0
        ax.set_ylim(low - margin, high + margin)
        ax.legend(frameon=False, loc="lower right", fontsize=8)
    ax.set_title(f"ELBO = {result.elbo:.3f} ± {result.elbo_se:.3f}")


def plot_elbo(history: Sequence[float] | Tensor | FitResult, ax: Axes | None = None) -> Axes:
    """The ELBO by step, and its running median.

    The axis shows the last nine tenths of the steps in full; the first ones, often hundreds of nats
    below, may leave it.

    :param history: the ELBO of each step, or a result with such a ``history``.
    :param ax: where to draw; by default new Axes.
    :raises ValueError: if there are no steps.
    """
    steps = doubles(torch.as_tensor(getattr(history, "history", history), device="cpu"))
    if not len(steps):
        raise ValueError("history: expected the ELBO of at least one step, got none")
    ax, x = new_axes(ax), range(1, len(steps) + 1)
    ax.plot(x, steps.numpy(), color=BLUE, alpha=0.3, linewidth=0.8, label="step")
    half = max(1, len(steps) // 50)
    padded = torch.cat([steps[:1].expand(half), steps, steps[-1:].expand(half)])
    median = padded.unfold(0, 2 * half + 1, 1).nanmedian(-1).values
    ax.plot(x, median.numpy(), color=BLUE, linewidth=1.8, label="running median")
    late = steps[len(steps) // 10 :]
    shown = late[late.isfinite()]
    if len(shown) and shown.max() > shown.min():
        margin = 0.05 * (shown.max() - shown.min())
        ax.set_ylim(float(shown.min() - margin), float(shown.max() + margin))
    ax.legend(frameon=False, loc="lower right")
    return tidied(ax, "step", "ELBO (nats)")


def plot_khat(result: Importance, ax: Axes | None = None) -> Axes:
    """The largest importance weights against their rank, with the Pareto tail fitted to them.

    Both axes are logarithmic: the line of a tail of index k has the slope -1 / k far out, and the
    steeper it falls the better. Dashed is the tail of index 0.7, the largest that can be relied on.

    :param result: what :func:`~pyro_artransform.diagnostics.importance` found.
    :param ax: where to draw; by default new Axes.
    """
    ax, tail = new_axes(ax), fit_tail(result.log_weights)
    ax.set_title(f"k-hat = {result.khat:.2f} ± {result.khat_se:.2f}")
    ax = tidied(ax, "weight / mean weight", "share of draws with a larger weight")
    ordered = doubles(result.log_weights).sort(descending=True).values
    ordered = ordered[ordered.isfinite()] - result.log_evidence
    if not len(ordered):
        return ax
    ranks = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device="cpu") - 0.5
    shares, shown = ranks / result.num_samples, max(3 * tail.size, 10)
    style: dict[str, Any] = {"markersize": 4, "alpha": 0.6, "markeredgewidth": 0}
    ax.loglog(ordered[:shown].exp(), shares[:shown], ".", color=BLUE, label="weights", **style)
    if isfinite(tail.scale):
        levels, shares = ranks[: tail.size] / tail.size, shares[: tail.size]
        lines = {"Pareto tail": (tail.khat, ORANGE, "-")}
        lines[f"of index {GOOD_KHAT}"] = GOOD_KHAT, GRAY, "--"
        for label, (khat, color, linestyle) in lines.items():
            # the weights of a tail of this index that are exceeded at these levels
            quantiles = torch.expm1(-khat * levels.log()) / khat * tail.scale
            x = (tail.log_cutoff - result.log_evidence + quantiles.log1p()).exp()
            ax.loglog(x, shares, color=color, label=label, linestyle=linestyle)
    ax.xaxis.set_minor_formatter(NullFormatter())  # labels between decades overlap
    ax.legend(frameon=False)
    return ax


def plot_marginals(result: Marginals, ax: Axes | None = None) -> Axes:
    """How far each latent's standard deviation is off, over how far its mean is.

    Each dot is a coordinate on the unconstrained space, with standard errors where there are up to 100
    of them. Those of the posterior itself would be in the middle. The gray box holds errors that are
    small enough to be trusted.

    :param result: what :func:`~pyro_artransform.diagnostics.marginals` found.
    :param ax: where to draw; by default new Axes.
    """
    ax = new_axes(ax)
    width, height = GOOD_MEAN_SHIFT, 100 * GOOD_SD_ERROR
    style: dict[str, Any] = {"color": GRAY, "alpha": 0.2, "linewidth": 0}
    ax.add_patch(Rectangle((-width, -height), 2 * width, 2 * height, **style))
    ax.axhline(0, color=GRAY, linewidth=0.8)
    ax.axvline(0, color=GRAY, linewidth=0.8)
    limits = torch.tensor([2 * width, 2 * height], dtype=torch.float64, device="cpu")
    has_bars = sum(shift.numel() for shift in result.mean_shift.values()) <= _MAX_BARS
    for k, (name, shift) in enumerate(result.mean_shift.items()):
        x, y = doubles(shift), 100 * doubles(result.sd_ratio[name] - 1)
        style = {"fmt": ".", "elinewidth": 0.6, "alpha": 0.7, "color": f"C{k % 10}"}
        if has_bars:
            style["xerr"] = doubles(result.mean_shift_se[name])
            style["yerr"] = 100 * doubles(result.sd_ratio_se[name])
        ax.errorbar(x, y, label=name if k < _MAX_NAMED else None, **style)
        limits = limits.maximum(torch.stack([x, y]).abs().nan_to_num(0, 0).amax(1))
    width, height = (1.1 * limits).tolist()
    ax.set(xlim=(-width, width), ylim=(-height, height))
    ax.set_title(bounds_in_words(result.mean_bound, result.sd_bound), fontsize=10)
    ax.legend(frameon=False, fontsize=8)
    return tidied(ax, "mean too large by (sd)", "sd too large by (%)")


def plot_ranks(
    result: SBC | Chains | Mapping[str, Tensor],
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    level: float = 0.95,
) -> Axes:
    """The distribution functions of ranks minus the uniform one, and their simultaneous bands.

    Of :func:`~pyro_artransform.diagnostics.sbc` each line is a coordinate. The line of a correct
    posterior stays in the bands with probability ``level``. A line that rises above and then falls below,
    an S, shows a posterior that is too narrow; its mirror image one that is too wide; a hill or a valley
    one that is biased. See :func:`~pyro_artransform.diagnostics.simultaneous_bands`.

    Of chains each line is one chain's draws of a coordinate, ranked among those of all chains, and the
    bands are for as many independent draws as a chain is worth, of the coordinate that mixes worst. Where
    chains agree, a share of ``level`` of the lines stays inside; a chain that stays in one part of the
    posterior is a line far outside.

    :param result: what :func:`~pyro_artransform.diagnostics.sbc` or
        :func:`~pyro_artransform.inference.mcmc` found, or draws by site,
        ``(num_chains, n) + site shape``.
    :param names: the sites to show; by default all.
    :param ax: where to draw; by default new Axes.
    :param level: the level of the bands, for each line on its own.
    :raises ValueError: if a site is unknown, or chains have fewer than 4 draws.

    **References**

    1. Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of
       MCMC (Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021), https://arxiv.org/abs/1903.08008
    2. Graphical Test for Discrete Uniformity and Its Applications in Goodness of Fit Evaluation and
       Multiple Sample Comparison (Säilynoja, Bürkner, Vehtari, 2022), https://arxiv.org/abs/2103.10522
    """
    found = result.by_chain if isinstance(result, Chains) else result
    given = found.ranks if isinstance(found, SBC) else found
    names = list(given) if names is None else list(names)
    if unknown := [name for name in names if name not in given]:
        raise ValueError(f"names: expected some of {list(given)}, got {unknown}")
    style: dict[str, Any] = {"where": "mid", "linewidth": 1.1}
    if isinstance(found, SBC):
        what, num_ranks, num_draws = "right posteriors", found.num_simulations, found.num_draws
        ranks = {name: found.ranks[name].reshape(num_ranks, -1) for name in names}
    else:
        what, (ranks, num_ranks, num_draws) = "chains that agree", _ranks_of_chains(found, names)
        style.update(linewidth=0.7, alpha=0.4)
    points, lower, upper = simultaneous_bands(num_ranks, num_draws, level)
    ax = new_axes(ax)
    band: dict[str, Any] = {"step": "mid", "color": GRAY, "alpha": 0.25, "linewidth": 0}
    band["label"] = f"{100 * level:g} % of {what}"
    ax.fill_between(points, lower - points, upper - points, **band)
    ax.axhline(0, color=GRAY, linewidth=0.8)
    for k, (name, each) in enumerate(ranks.items()):
        below = (each.to("cpu")[..., None] < points * (num_draws + 1) - 1e-6).double().mean(0)
        lines = ax.step(points, (below - points).T, color=f"C{k}", **style)
        lines[0].set_label(name)
    ax.set(xlim=(0, 1))
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    ax.legend(frameon=False, fontsize=8, ncols=min(4, len(names) + 1), **place)
    return tidied(ax, "rank / number of draws", "ECDF of ranks − uniform")


def _ranks_of_chains(
    by_chain: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[dict[str, Tensor], int, int]:
    """Ranks among the draws of all chains, ``(n, C D)``, with what a chain is worth, and the largest rank."""
    count, size = next(iter(by_chain.values())).shape[:2]
    if size < 4:
        raise ValueError(f"result: expected at least 4 draws of each chain, got {size}")
    ranks, worth = {}, float(size)
    for name in names:
        draws = by_chain[name].reshape(count, size, -1)
        order = draws.flatten(0, 1).argsort(0).argsort(0).reshape(draws.shape)
        ranks[name] = order.movedim(1, 0).flatten(1)
        # of each chain by itself: where they do not agree, bands are to say so
        alone = draws - draws.median(1, keepdim=True).values
        worth = min(worth, float(Convergence.of(alone).bulk.min()) / count)
    return ranks, max(round(worth), 1), count * size - 1
