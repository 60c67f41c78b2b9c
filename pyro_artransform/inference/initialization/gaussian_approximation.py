# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Gaussians fitted to a log density by its gradients at their draws.

From far away by batch and match: a Gaussian whose score is that of the density at a batch of its draws,
not far from the one before. It is exact for a Gaussian from as many draws as it has dimensions, and knows
no step size. Near the end by natural gradients, which raise the ELBO; those know one, and lose their way
from afar. Linear algebra is in double precision: units of latents differ by many orders.

Of many latents the precision has the pattern of their graph. The Gaussian with the largest ELBO is a fixed
point of

.. math::

    \Lambda \leftarrow -E_q[\nabla^2 \log p(z)], \qquad m \leftarrow m + \Lambda^{-1} E_q[\nabla \log p(z)]

whose precision has zeros where the graph of p has no edge. Once the ELBO has settled, what a step finds is
averaged with what was before. The second derivatives are differences of gradients, a few for each draw:
coordinates that share no neighbour move at once.

**References**

1. Batch and match: black-box variational inference with a score-based divergence (Cai, Modi,
   Pillaud-Vivien, Margossian, Gower, Blei, Saul, 2024), https://arxiv.org/abs/2402.14758
2. The Variational Gaussian Approximation Revisited (Opper, Archambeau, 2009),
   https://doi.org/10.1162/neco.2008.08-07-592
3. Gaussian Variational Approximation with Sparse Precision Matrices (Tan, Nott, 2018),
   https://arxiv.org/abs/1604.01272
4. On the Estimation of Sparse Jacobian Matrices (Curtis, Powell, Reid, 1974)
"""

import math
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...graphs.dependencies import value_and_gradient
from ...graphs.factorization import eigh, lower_factor
from ...graphs.markov_graph import Elimination, MarkovGraph
from ...graphs.sparse_gaussian import PrecisionPattern, SparseGaussian
from ...joint import LogJoint
from ...time_limit import limited
from .gaussians import Density, Gaussians, antithetic_noise, evaluate_density

# the sd that one begins with, to stay within what a model can take
_NARROW = 0.1
# the rate of batch and match rises by this factor where the ELBO does, by a nat for each coordinate
_MORE = 10.0
# the share of a natural-gradient step falls after so many of them: less noise
_STEPS_OF_WHOLE = 5
# nats that are left to gain below which steps end
_LEAST_GAIN = 1e-3
# a step changes a precision by this factor at most, in any direction
_MOST_CHANGE = 4.0

# with a graph: gradients that the curvature takes at most in a step, the bounds of the number of its draws
_MOST_GRADIENTS, _MOST_DRAWS, _FEWEST_DRAWS = 512, 32, 4
# draws that steps are compared on
_NUM_FOR_STEPS = 64
# the difference of gradients in sds, in double precision, and the factor of it in single precision
_DIFFERENCE, _COARSER = 1e-3, 10.0
# nats below which a gain says that the ELBO has settled, and steps after that until their share is a half
_SETTLED_BY, _HALVED = 0.5, 2
# how much shorter a step is after one that lost a nat for each coordinate, and the shortest
_SHORTER, _SHORTEST = 4.0, 1e-3


class Sampled(NamedTuple):
    """Draws of S Gaussians, ``(S, B, D)``, with their noise, gradients and ELBOs, ``(S,)``.

    An ELBO is ``-inf`` where a draw has no density or gradient.
    """

    noise: Tensor
    draws: Tensor
    gradients: Tensor
    is_finite: Tensor
    elbo: Tensor


@torch.no_grad()
def match_scores(
    log_density: Density,
    points: Tensor,
    num_draws: int,
    num_steps: int,
    is_independent: bool = False,
) -> Gaussians:
    """Gaussians from narrow ones at points ``(S, D)``, by steps of batch and match; all side by side.

    Steps move them by the root of their rate in sds. It falls as in the first reference, but is larger
    while the ELBO rises by much, and smaller after a step that lost it, which is not taken.

    After a quarter of the steps, and after half of them, those with the larger ELBOs go on, half of them. See
    Non-stochastic Best Arm Identification and Hyperparameter Optimization (Jamieson, Talwalkar, 2016),
    https://arxiv.org/abs/1502.07943.
    """
    dim = points.shape[-1]
    now = Gaussians(points.double(), torch.full_like(points, _NARROW).double())
    now = now if is_independent else now.dense()
    batch = _draw(log_density, now, num_draws, points.dtype)
    factor, first = torch.ones_like(batch.elbo), num_draws * (1 if is_independent else dim)
    for step in limited(range(num_steps)):
        if step in (num_steps // 4, num_steps // 2):
            best = batch.elbo.topk(math.ceil(len(factor) / 2)).indices
            now, batch = now.take(best), Sampled(*(part[best] for part in batch))
            factor = factor[best]
        moved = _matched(now, batch, factor * first / (step + 1))
        drawn = _draw(log_density, moved, num_draws, points.dtype)
        gain = drawn.elbo - batch.elbo
        is_worse, is_far = gain < -dim, gain > dim  # neither, where both have no density
        now = Gaussians(*map(partial(_where, is_worse), now, moved))
        batch = Sampled(*map(partial(_where, is_worse), batch, drawn))
        more = torch.where(is_far, _MORE * factor, (_MORE * factor).clamp_max(1.0))
        factor = torch.where(is_worse, factor / _MORE**2, more)
    return now.to(points.dtype)


def _where(chosen: Tensor, this: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *(1,) * (this.dim() - 1)), this, other)


def _matched(gaussians: Gaussians, batch: Sampled, rate: Tensor) -> Gaussians:
    """Gaussians after a step of batch and match at rates ``(S,)``; the same where that is not finite."""
    (loc, scale), rate = gaussians, rate[:, None]
    weights = batch.is_finite.to(loc)[..., None]
    count = weights.sum(1).clamp_min(1)
    draw = torch.where(weights > 0, batch.draws, 0.0)
    gradient = torch.where(weights > 0, batch.gradients, 0.0)
    mean, slope = draw.sum(1) / count, gradient.sum(1) / count
    share, root = rate / (1 + rate), weights * (rate / count).sqrt()[:, None]
    # the factors of V, the covariance before with that of the draws, and of U, that of the gradients
    away, steeper = (draw - mean[:, None]) * root, (gradient - slope[:, None]) * root
    of_draws = torch.cat([away, (share.sqrt() * (loc - mean))[:, None]], 1)
    of_gradients = torch.cat([steeper, (share.sqrt() * slope)[:, None]], 1)
    # the S with S U S + S = V
    if gaussians.is_independent:
        wide, steep = scale.square() + of_draws.square().sum(1), of_gradients.square().sum(1)
        variance = 2 * wide / (1 + (1 + 4 * steep * wide).sqrt())
        found, step = variance.sqrt(), variance * slope
    else:
        # a difference of matrices whose sds differ by many orders would have no digits
        lower = torch.linalg.qr(torch.cat([scale.mT, of_draws], 1)).R.mT
        inner = of_gradients @ lower
        values, axes = eigh(inner.mT @ inner)  # from afar they overflow
        factors = (0.5 + (values.clamp_min(0) + 0.25).sqrt()).rsqrt()
        axes = lower @ axes * factors[:, None]
        found, step = lower_factor(axes), (axes @ (axes.mT @ slope[..., None]))[..., 0]
    moved = loc / (1 + rate) + share * (mean + step)
    is_good = batch.is_finite.any(-1) & moved.isfinite().all(-1)
    return Gaussians(_where(is_good, moved, loc), _where(is_good, found, scale))


@torch.no_grad()
def ascend(log_density: Density, start: Gaussians, num_draws: int, num_steps: int) -> Gaussians:
    """A Gaussian after natural-gradient steps of the ELBO from S = 1; the best one on the way."""
    dtype, now = start.loc.dtype, start.to(torch.float64)
    best, best_elbo = now, -math.inf
    for step in limited(range(num_steps + 1), at_least=1):
        batch = _draw(log_density, now, num_draws, dtype)
        if not bool(batch.is_finite.all()):
            break
        if batch.elbo > best_elbo:
            best, best_elbo = now, batch.elbo.item()
        share, scale = _STEPS_OF_WHOLE / (_STEPS_OF_WHOLE + step), now.scale_tril
        # what is left of the gradient in units of the Gaussian: nothing, if it is the posterior
        slopes = batch.gradients * scale[:, None] if now.is_independent else batch.gradients @ scale
        left = slopes + batch.noise
        mean = left.mean(1)
        if now.is_independent:
            change = (batch.noise * (left - mean[:, None])).mean(1)
        else:
            change = batch.noise.mT @ (left - mean[:, None]) / num_draws
            change = 0.5 * (change + change.mT)
        # to second order, what is left to gain
        if float(0.5 * mean.square().sum() + 0.25 * change.square().sum()) < _LEAST_GAIN:
            break
        if now.is_independent:
            values = (1 - share * change).clamp(1 / _MOST_CHANGE, _MOST_CHANGE)
            now = Gaussians(now.loc + scale * share * mean / values, scale * values.rsqrt())
        else:
            identity = torch.diag_embed(torch.ones_like(now.loc))
            values, axes = eigh(-share * change + identity)
            values = values.clamp(1 / _MOST_CHANGE, _MOST_CHANGE)[..., None]
            shift = axes @ (axes.mT @ (share * mean[..., None]) / values)
            root = scale @ axes * values.mT.rsqrt()
            now = Gaussians(now.loc + (scale @ shift)[..., 0], lower_factor(root))
    return best.to(dtype)


def _draw(
    log_density: Density, gaussians: Gaussians, num_draws: int, dtype: torch.dtype
) -> Sampled:
    loc = gaussians.loc
    noise = torch.randn((len(loc), num_draws, loc.shape[-1]), dtype=dtype, device=loc.device)
    noise = noise.to(loc)
    draws = loc[:, None] + gaussians.deviations(noise)
    value, gradients = value_and_gradient(log_density, draws.flatten(0, 1).to(dtype))
    value, gradients = value.to(loc).reshape(noise.shape[:2]), gradients.to(loc).view_as(noise)
    is_finite = value.isfinite() & gradients.isfinite().all(-1)
    entropy = gaussians.log_volume() + 0.5 * noise.square().sum(-1).mean(-1)
    elbo = torch.where(is_finite.all(-1), value.mean(-1) + entropy, -torch.inf)
    return Sampled(noise, draws, gradients, is_finite, elbo)


@torch.no_grad()
def ascend_with_graph(
    log_density: LogJoint, graph: MarkovGraph, start: Gaussians, num_steps: int, num_settled: int
) -> SparseGaussian:
    """The best Gaussian on the way of natural-gradient steps from S = 1 others.

    :param num_steps: the most steps; ``num_settled`` is how many are left once the ELBO has settled.
    """
    loc, sd = start.loc[0], start.scale_tril[0]
    sd = sd if start.is_independent else sd.norm(dim=-1)
    pattern = pattern_of(graph.elimination, loc.device)
    precision = loc.new_zeros(pattern.num_entries)
    precision[pattern.diagonal] = sd**-2
    now = SparseGaussian.from_precision(pattern, loc, precision)
    noise = antithetic_noise(start.loc, _NUM_FOR_STEPS)
    best, best_elbo = now, elbo_of(log_density, now, noise)
    num_draws = _MOST_GRADIENTS // (2 * (graph.coloring.num_colors + 1)) * 2
    num_draws = min(max(num_draws, _FEWEST_DRAWS), _MOST_DRAWS)
    settled, size = 0, 1.0
    draws = loc + start.deviations(antithetic_noise(start.loc, num_draws))[0]
    curvature, gradient = expectations(log_density, graph, draws, sd)
    for _ in limited(range(num_steps)):
        share = size * _HALVED / (_HALVED + settled)
        mixed = torch.lerp(precision, curvature, share)
        moved = SparseGaussian.from_precision(pattern, now.loc, mixed)
        moved = moved.at(now.loc + share * moved.solve(gradient))
        value = elbo_of(log_density, moved, noise)
        # not taken, and the next one is shorter
        if value < best_elbo - len(loc) or value == -math.inf:
            size /= _SHORTER
            if size < _SHORTEST:
                break
            continue
        now, precision, size = moved, mixed, min(_SHORTER * size, 1.0)
        settled += value < best_elbo + _SETTLED_BY
        if value > best_elbo:
            best, best_elbo = now, value
        if settled == num_settled:
            break
        draws = now.transform(antithetic_noise(start.loc, num_draws))
        curvature, gradient = expectations(log_density, graph, draws, now.sd)
    return best


@lru_cache(maxsize=2)
def pattern_of(elimination: Elimination, device: torch.device) -> PrecisionPattern:
    """The pattern of a graph, which starts in several coordinates have in common."""
    return PrecisionPattern(elimination, device)


@lru_cache(maxsize=2)
def _pairs_of(graph: MarkovGraph, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The rows and columns of all pairs of a graph and of its diagonal, and the colors of coordinates."""
    pairs = [*graph.edges, *((i, i) for i in range(len(graph.neighbours)))]
    rows, columns = torch.tensor(pairs, dtype=torch.long, device=device).T
    return rows, columns, graph.coloring.on(device)


def expectations(
    log_density: LogJoint, graph: MarkovGraph, draws: Tensor, sd: Tensor
) -> tuple[Tensor, Tensor]:
    """The means over draws ``(n, D)`` of the negative curvature, by its entries, and of the gradient."""
    pattern = pattern_of(graph.elimination, draws.device)
    coloring, device, dim = graph.coloring, draws.device, draws.shape[1]
    rows, columns, color = _pairs_of(graph, device)
    is_hub = color >= coloring.num_colors - coloring.num_hubs
    step = (_DIFFERENCE if draws.dtype == torch.float64 else _COARSER * _DIFFERENCE) * sd
    shifts = torch.zeros(coloring.num_colors, dim, dtype=draws.dtype, device=device)
    shifts[color, torch.arange(dim, device=device)] = step
    _, base = value_and_gradient(log_density, draws)
    moved = draws[:, None] + shifts
    _, gradients = value_and_gradient(log_density, moved.flatten(0, 1))
    changes = gradients.reshape(moved.shape) - base[:, None]
    # of the draws where all are finite
    used = changes.isfinite().flatten(1).all(1)
    change = changes[used].sum(0) / used.sum().clamp_min(1)
    one = change[color[columns], rows] / step[columns]
    other = change[color[rows], columns] / step[rows]
    # what others have in the rows of hubs is mixed, and the columns of hubs are not
    first = torch.where(is_hub[rows] & ~is_hub[columns], other, one)
    second = torch.where(is_hub[columns] & ~is_hub[rows], one, other)
    curvature = pattern.from_pairs(rows, columns, -0.5 * (first + second))
    return curvature, base[base.isfinite().all(-1)].mean(0).nan_to_num(0.0)


def elbo_of(log_density: LogJoint, gaussian: SparseGaussian, noise: Tensor) -> float:
    """The ELBO of a Gaussian on noise of shape ``(K, D)``; ``-inf`` where it is not finite."""
    values = evaluate_density(log_density, gaussian.transform(noise))
    # of the same draws as the density, so that the constant of a Gaussian cancels
    entropy = gaussian.entropy() + 0.5 * (noise.square().sum(-1).mean() - noise.shape[-1])
    return float((values.mean() + entropy).nan_to_num(-math.inf, -math.inf, -math.inf))
