# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Gaussians in closed form, from draws of a density and its gradients there.

With the covariance C of draws and G of gradients, the covariance S of the Gaussian solves

.. math::

    S G S = C

which is an unregularized step of batch and match. It is exact for a Gaussian density, whatever the noise of
the draws. With a graph, row i of the precision is estimated by least squares: component i of a Gaussian's
gradient is linear in coordinate i and its neighbours alone.

**References**

1. Batch and match: black-box variational inference with a score-based divergence (Cai, Modi,
   Pillaud-Vivien, Margossian, Gower, Blei, Saul, 2024), https://arxiv.org/abs/2402.14758
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._base.time_limit import check_time
from ...model.graphs.markov_graph import MarkovGraph, padded_groups
from ...model.graphs.sparse_gaussian import PrecisionPattern, SparseGaussian, lower_factor
from ...model.vectorization import draws_at_a_time
from ...sampling.preconditioning import Preconditioner

#: draws per dimension above which a full covariance is estimated
DRAWS_BY_DIM = 2
_RIDGE = 1e-8  # added to the diagonal of the regressors' correlation matrix


class DenseGaussian(NamedTuple):
    """A Gaussian with mean ``(D,)`` and lower-triangular scale ``(D, D)``."""

    loc: Tensor
    scale_tril: Tensor

    def solve(self, right: Tensor) -> Tensor:
        """The covariance times a vector ``(D,)``."""
        return self.scale_tril @ (self.scale_tril.T @ right)

    def independent_sd(self) -> Tensor:
        """The sds of the uncorrelated Gaussian that minimizes KL(q|p), which are the conditional sds."""
        identity = torch.ones_like(self.loc).diag()
        root = torch.linalg.solve_triangular(self.scale_tril, identity, upper=False)
        return root.norm(dim=0).reciprocal()


def dense_gaussian(draws: Tensor, gradients: Tensor) -> DenseGaussian:
    """The Gaussian that matches draws ``(n, D)`` of a density and its gradients there."""
    loc, (count, dim) = draws.mean(0), draws.shape
    if count < DRAWS_BY_DIM * dim:
        scaled = Preconditioner.of(draws, gradients)(torch.ones_like(loc).diag())
        return DenseGaussian(loc, lower_factor(scaled.T))
    # avoid covariances, which square the condition number
    lower = torch.linalg.qr(draws - loc).R.T
    _, values, axes = torch.linalg.svd((gradients - gradients.mean(0)) @ lower, full_matrices=False)
    return DenseGaussian(loc, lower_factor(lower @ axes.T * values.rsqrt()))


def sparse_gaussian(draws: Tensor, gradients: Tensor, graph: MarkovGraph) -> SparseGaussian:
    """A Gaussian from draws and gradients ``(n, D)``, its precision zero where the graph has no edge.

    Hubs have many neighbours. Their entries with other nodes follow by symmetry; least squares estimates
    only those between hubs.
    """
    loc, dim = draws.mean(0), draws.shape[1]
    scale = draws.std(0).clamp_min(torch.finfo(draws.dtype).tiny ** 0.5)
    z, gradients = (draws - loc) / scale, (gradients - gradients.mean(0)) * scale
    coloring = graph.coloring
    is_hub = coloring.on(draws.device) >= coloring.num_colors - coloring.num_hubs
    hubs = frozenset(is_hub.nonzero()[:, 0].tolist())
    regressors = [() if i in hubs else (i, *own) for i, own in enumerate(graph.neighbours)]
    first = _negative_slopes(z, gradients, regressors)
    # the gradients of hubs less the terms of all other coordinates
    rows, columns, values = first
    index = is_hub.cumsum(0) - 1
    terms = z.new_zeros(dim, len(hubs))
    known = is_hub[columns]
    terms[rows[known], index[columns[known]]] = values[known]
    gradients[:, is_hub] += z @ terms
    among = [(i, *(own & hubs)) if i in hubs else () for i, own in enumerate(graph.neighbours)]
    rows, columns, values = map(torch.cat, zip(first, _negative_slopes(z, gradients, among)))
    pattern = PrecisionPattern(graph.elimination, draws.device)
    index = pattern.index(rows, columns)
    total, count = z.new_zeros(2, pattern.num_entries)
    total.index_add_(0, index, values / (scale[rows] * scale[columns]))
    count.index_add_(0, index, torch.ones_like(values))
    return SparseGaussian.from_precision(pattern, loc, total / count.clamp_min(1))


def _negative_slopes(
    z: Tensor, gradients: Tensor, regressors: list[tuple[int, ...]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Negative slopes of each coordinate's gradient in its regressors, as rows, columns and values."""
    (count, dim), parts_of_rows = z.shape, list[tuple[Tensor, ...]]()
    padded = torch.cat([z, z.new_zeros(count, 1)], 1)
    for group in padded_groups(regressors, [1] * dim):
        every = torch.tensor(group.coordinates, dtype=torch.long, device=z.device)
        width = group.parents.shape[1]
        at_once = draws_at_a_time(count * width)
        pairs = zip(every.split(at_once), group.parents.to(z.device).split(at_once))
        for own, columns in pairs:
            check_time()
            x = padded[:, columns].movedim(0, 1)
            ridge = _RIDGE * count * torch.ones_like(x[0, 0]).diag()
            right = x.mT @ gradients[:, own].T[..., None]
            slopes = torch.linalg.solve(x.mT @ x + ridge, -right)[..., 0]
            parts, is_used = (own[:, None].expand_as(columns), columns, slopes), columns < dim
            parts_of_rows.append(tuple(part[is_used] for part in parts))
    none = torch.zeros(0, dtype=torch.long, device=z.device)
    rows, columns, values = map(torch.cat, zip((none, none, z.new_zeros(0)), *parts_of_rows))
    return rows, columns, values
