# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Coordinates in which a field is standard normal given a few globals, nearly.

A path of states, the effects of many groups or a random field x has a sparse precision given its scales and
other globals g, and is about Gaussian. With its mean m(g) and the Cholesky factor L(g) of the precision,

.. math::

    x = m(g) + L(g)^{-T} e

makes (g, e) nearly standard normal: centred and non-centred coordinates are the two ends of these. Chains are
right in any coordinates. So m, and the conditionals that L stands for, are polynomials of g, fitted to those at
some draws, and cost little beside the density.

**References**

1. Importance Sampling-based Transport Map Hamiltonian Monte Carlo for Bayesian Hierarchical Models (Osmundsen,
   Kleppe, Liesenfeld, 2021), https://arxiv.org/abs/1812.07929
2. Approximate Bayesian Inference for Latent Gaussian Models by Using Integrated Nested Laplace Approximations
   (Rue, Martino, Chopin, 2009), https://doi.org/10.1111/j.1467-9868.2008.00700.x
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..graphs.dependencies import find_dependencies, value_and_gradient
from ..graphs.markov_graph import MarkovGraph, color_columns
from ..graphs.sparse_gaussian import PrecisionPattern, SparseGaussian
from ..joint import LogJoint

# dimensions from which on a field is looked for, and the most globals, levels, and parents on average
_LEAST_DIM, _MOST_GLOBALS, _MOST_LEVELS, _MOST_PARENTS = 100, 16, 16, 8
# draws at which conditionals are found, for each term of the polynomials, and the most terms
_DRAWS_BY_TERM, _MOST_TERMS = 4, 40
# steps of Newton's method to the mean given the globals, and those of differences, in sds
_NUM_NEWTON, _DIFFERENCE = 3, 1e-3


class Field(NamedTuple):
    """The globals ``(G,)`` and the field ``(N,)`` among the latents, and the graph of the field given them."""

    of_globals: Tensor
    of_field: Tensor
    pattern: PrecisionPattern
    color: Tensor  #: columns of one colour have no row in common, shape ``(N,)``
    is_edge: Tensor  #: which entries of the pattern are no fill-in, shape ``(num_entries,)``

    @classmethod
    def of(cls, log_joint: LogJoint) -> "Field | None":
        """The field of a density, where its graph is sparse but for a few hubs, and shallow."""
        start, latents = log_joint.start, log_joint.latents
        if len(start) < _LEAST_DIM or log_joint.strategy == "loop":
            return None
        try:
            neighbours = find_dependencies(log_joint, latents.eps).neighbours
        except ValueError:  # no gradient near the start
            return None
        coloring = color_columns(neighbours)
        is_hub = coloring.on(start.device) >= coloring.num_colors - coloring.num_hubs
        if coloring.num_hubs > _MOST_GLOBALS or bool(is_hub.all()):
            return None
        of_field = (~is_hub).nonzero()[:, 0]
        place = {i: k for k, i in enumerate(of_field.tolist())}
        graph = MarkovGraph.from_neighbours(
            [[place[j] for j in neighbours[i] if j in place] for i in place]
        )
        elimination = graph.elimination
        is_deep = len(elimination.levels) > _MOST_LEVELS
        if is_deep or elimination.num_edges > _MOST_PARENTS * len(of_field):
            return None
        pattern = PrecisionPattern(elimination, start.device)
        pairs = pattern.pairs().T.tolist()
        is_edge = [i == j or j in graph.neighbours[i] for i, j in pairs]
        return cls(
            is_hub.nonzero()[:, 0],
            of_field,
            pattern,
            graph.coloring.on(start.device),
            torch.tensor(is_edge, dtype=torch.bool, device=start.device),
        )

    def gaussians(self, log_joint: LogJoint, points: Tensor, unit: Tensor) -> list[SparseGaussian]:
        """Gaussians of mean zero with the curvature of a density in the field, at points ``(n, D)``.

        :param unit: the sds of the latents, nearly, shape ``(D,)``.
        """
        step = points.new_zeros(int(self.color.max()) + 1, points.shape[1])
        size = _DIFFERENCE * unit[self.of_field]
        step[self.color, self.of_field] = size
        ends = torch.stack([points[:, None] + step, points[:, None] - step])
        _, gradients = value_and_gradient(log_joint, ends.flatten(0, 2))
        ahead, behind = gradients.reshape(ends.shape)[..., self.of_field]
        rows, columns = self.pattern.pairs()
        entries = (behind - ahead)[:, self.color[columns], rows] / (2 * size[columns])
        entries = torch.where(self.is_edge, entries, 0.0)
        zero = torch.zeros_like(size)
        return [SparseGaussian.from_precision(self.pattern, zero, row) for row in entries]


class ConditionalGaussian:
    """The transform from (g, e) to (g, x), by polynomials of the globals that are fitted to some draws.

    :param latents: draws ``(n, D)``, from among which the globals are taken.
    :param unit: the sds of the latents, nearly, shape ``(D,)``.
    """

    def __init__(self, field: Field, log_joint: LogJoint, latents: Tensor, unit: Tensor) -> None:
        self._field = field
        globals_ = latents[:, field.of_globals]
        self._middle = globals_.mean(0)
        self._spread = globals_.std(0).clamp_min(torch.finfo(latents.dtype).tiny ** 0.5)
        self._low, self._high = globals_.amin(0) - self._spread, globals_.amax(0) + self._spread
        count = globals_.shape[1]
        self._has_squares = (count + 1) * (count + 2) // 2 <= _MOST_TERMS
        number = _DRAWS_BY_TERM * self._terms(globals_[:1]).shape[1]
        points = latents.median(0).values.repeat(min(number, len(latents)), 1)
        points[:, field.of_globals] = globals_[
            torch.linspace(0, len(latents) - 1, len(points), device=latents.device).long()
        ]
        gaussians = field.gaussians(log_joint, points, unit)
        for _ in range(_NUM_NEWTON):
            _, gradients = value_and_gradient(log_joint, points)
            moves = [g.solve(row) for g, row in zip(gaussians, gradients[:, field.of_field])]
            points[:, field.of_field] += torch.stack(moves).nan_to_num(0.0, 0.0, 0.0)
        gaussians = field.gaussians(log_joint, points, unit)
        root = gaussians[0].root_tril
        self._below = torch.tril_indices(*root.shape, -1, device=root.device)
        found = torch.cat(
            [points[:, field.of_field], torch.stack([*map(self._numbers, gaussians)])], 1
        )
        is_finite = found.isfinite().all(1)
        terms = self._terms(points[:, field.of_globals])
        self._weights = torch.linalg.pinv(terms[is_finite]) @ found[is_finite]

    def _terms(self, globals_: Tensor) -> Tensor:
        """Those of the polynomials, shape ``(n, num_terms)``; beyond the draws they stay as they are."""
        t = (globals_.clamp(self._low, self._high) - self._middle) / self._spread
        terms = [torch.ones_like(globals_.sum(1, keepdim=True)), t]
        if self._has_squares:
            i, j = torch.triu_indices(t.shape[1], t.shape[1], device=t.device)
            terms.append(t[:, i] * t[:, j])
        return torch.cat(terms, 1)

    def _numbers(self, gaussian: SparseGaussian) -> Tensor:
        """Those of a Gaussian that polynomials give: log scales, the root's factor, coefficients."""
        root = gaussian.root_tril
        log_scale = gaussian.scale.log().index_fill(0, self._field.pattern.root, 0.0)
        parts = [log_scale, root.diagonal().log(), root[self._below[0], self._below[1]]]
        return torch.cat([*parts, *(part.flatten() for part in gaussian.coefficients)])

    def _conditionals(
        self, globals_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        """Means and scales ``(N, C)``, the root's factors ``(C, R, R)``, coefficients ``(m, k, C)``, log-det."""
        pattern = self._field.pattern
        size, root, num_below = len(self._field.of_field), len(pattern.root), self._below.shape[1]
        sizes = [size, size, root, num_below, *(g.parents.numel() for g in pattern.groups)]
        numbers = (self._terms(globals_) @ self._weights).T
        loc, log_scale, log_root, below, *rest = (
            numbers[a:b] for a, b in pairwise(accumulate(sizes, initial=0))
        )
        factors = torch.diag_embed(log_root.exp().T)
        rows = torch.arange(len(factors), device=factors.device)[:, None]
        factors = factors.index_put((rows, self._below[0], self._below[1]), below.T)
        coefficients = [part.unflatten(0, g.parents.shape) for part, g in zip(rest, pattern.groups)]
        return loc, log_scale.exp(), factors, coefficients, log_scale.sum(0) + log_root.sum(0)

    def _levels(self, coefficients: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each level the coordinates, their parents, and the coefficients of these."""
        for parts in self._field.pattern.levels:
            for g, part, own, above in parts:
                yield own, above, coefficients[g][part]

    def __call__(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """Latents at (g, e), both ``(C, D)``, and the log-determinants, shape ``(C,)``."""
        field, root = self._field, self._field.pattern.root
        loc, scale, factors, coefficients, ladj = self._conditionals(base[:, field.of_globals])
        noise = base[:, field.of_field].T
        of_root = (factors @ noise[root].T[..., None])[..., 0].T
        # padding reads the last row
        z = torch.cat([(scale * noise).index_copy(0, root, of_root), torch.zeros_like(noise[:1])])
        for own, above, weight in self._levels(coefficients):
            z = z.index_add(0, own, (weight * z[above]).sum(1))
        return base.index_copy(1, field.of_field, (loc + z[:-1]).T), ladj

    def inverse(self, latents: Tensor) -> Tensor:
        """(g, e) at latents, both of shape ``(C, D)``."""
        field, root = self._field, self._field.pattern.root
        loc, scale, factors, coefficients, _ = self._conditionals(latents[:, field.of_globals])
        z = latents[:, field.of_field].T - loc
        padded, noise = torch.cat([z, torch.zeros_like(z[:1])]), z
        for own, above, weight in self._levels(coefficients):
            noise = noise.index_add(0, own, -(weight * padded[above]).sum(1))
        of_root = torch.linalg.solve_triangular(factors, z[root].T[..., None], upper=False)
        noise = (noise / scale).index_copy(0, root, of_root[..., 0].T)
        return latents.index_copy(1, field.of_field, noise.T)
