# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""The best Gaussian of many latents whose precision has the pattern of their graph, by natural gradients.

The Gaussian with the largest ELBO is a fixed point of

.. math::

    \Lambda \leftarrow -E_q[\nabla^2 \log p(z)], \qquad m \leftarrow m + \Lambda^{-1} E_q[\nabla \log p(z)]

whose precision has zeros where the graph of p has no edge. Once the ELBO has settled, what a step finds is
averaged with what was before. The second derivatives are differences of gradients, a few for each draw:
coordinates that share no neighbour move at once.

**References**

1. The Variational Gaussian Approximation Revisited (Opper, Archambeau, 2009),
   https://doi.org/10.1162/neco.2008.08-07-592
2. Gaussian Variational Approximation with Sparse Precision Matrices (Tan, Nott, 2018),
   https://arxiv.org/abs/1604.01272
3. On the Estimation of Sparse Jacobian Matrices (Curtis, Powell, Reid, 1974)
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ...graphs.dependencies import value_and_gradient
from ...graphs.markov_graph import Elimination, MarkovGraph
from ...graphs.sparse_gaussian import PrecisionPattern, SparseGaussian
from ...joint import LogDensity
from ...time_limit import limited
from .gaussians import Gaussians, antithetic_noise, evaluate_density

#: gradients that the curvature takes at most in a step, and the bounds of the number of its draws
MOST_GRADIENTS, _MOST_DRAWS, _FEWEST_DRAWS = 512, 32, 4
# draws that steps are compared on
_NUM_COMPARED = 64
# the difference of gradients in sds, in double precision, and the factor of it in single precision
_DIFFERENCE, _COARSER = 1e-3, 10.0
# nats below which a gain says that the ELBO has settled, and steps after that until their share is a half
_SETTLED, _HALVED = 0.5, 2
# how much shorter a step is after one that lost a nat for each coordinate, and the shortest
_SHORTER, _SHORTEST = 4.0, 1e-3


@torch.no_grad()
def ascend_with_graph(
    log_density: LogDensity,
    graph: MarkovGraph,
    start: Gaussians,
    num_steps: int,
    num_settled: int,
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
    noise = antithetic_noise(start.loc, _NUM_COMPARED)
    best, best_elbo = now, elbo_of(log_density, now, noise)
    num_draws = MOST_GRADIENTS // (2 * (graph.coloring.num_colors + 1)) * 2
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
        settled += value < best_elbo + _SETTLED
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
    log_density: LogDensity, graph: MarkovGraph, draws: Tensor, sd: Tensor
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


def elbo_of(log_density: LogDensity, gaussian: SparseGaussian, noise: Tensor) -> float:
    """The ELBO of a Gaussian on noise of shape ``(K, D)``; ``-inf`` where it is not finite."""
    values = evaluate_density(log_density, gaussian.transform(noise))
    # of the same draws as the density, so that the constant of a Gaussian cancels
    entropy = gaussian.entropy() + 0.5 * (noise.square().sum(-1).mean() - noise.shape[-1])
    return float((values.mean() + entropy).nan_to_num(-math.inf, -math.inf, -math.inf))
