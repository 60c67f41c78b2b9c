# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Coordinates in which a latent field is nearly standard normal given a few global latents.

A sequence of states, many group effects or a random field x is roughly Gaussian given its scales and other
globals g, with a sparse precision matrix. With its mean m(g) and the Cholesky factor L(g) of the precision,

.. math::

    x = m(g) + L(g)^{-T} e

makes (g, e) nearly standard normal; centred and non-centred coordinates are its two extremes. Level by level
of the graph, a latent is normal given its parents,

.. math::

    x_i = c_i + \sum_j A_{ij} (x_j - c_j) + s_i (d_i + e_i)

with c constant or linear in an intercept. Chains are exact in any coordinates, so the A, log s and d may be
approximate: they are interpolated in g between some draws, and cost little compared with the density. Where
a scale vanishes, s vanishes with it, and A and d converge, so that e keeps its meaning. Where an intercept
moves all of a long field, c moves with it: otherwise the errors of all d would add up.

**References**

1. Importance Sampling-based Transport Map Hamiltonian Monte Carlo for Bayesian Hierarchical Models
   (Osmundsen, Kleppe, Liesenfeld, 2021), https://arxiv.org/abs/1812.07929
2. Approximate Bayesian Inference for Latent Gaussian Models by Using Integrated Nested Laplace
   Approximations (Rue, Martino, Chopin, 2009), https://doi.org/10.1111/j.1467-9868.2008.00700.x
3. Splines Minimizing Rotation-Invariant Semi-Norms in Sobolev Spaces (Duchon, 1977),
   https://doi.org/10.1007/BFb0086566
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import LogJoint
from ..model.graphs.dependencies import find_dependencies, value_and_gradient
from ..model.graphs.markov_graph import MarkovGraph, color_columns
from ..model.graphs.sparse_gaussian import PrecisionPattern, SparseGaussian

# fewest dimensions for a field; most globals, levels, and parents on average
_LEAST_DIM, MOST_GLOBALS, _MOST_LEVELS, _MOST_PARENTS = 50, 16, 16, 8
# draws between which conditionals are interpolated, the factor by which these are spread out, and how far
# beyond them, in units of their range, the interpolation goes on
_NUM_KNOTS, _WIDER, _REACH = 40, 2.0, 0.5
# cells of the grid for the density beyond an outer quantile of the draws
_PARTS = 8
# most Newton steps to a mode given the globals, of which so many use one curvature
_MOST_NEWTON, _SAME_CURVATURE = 12, 3


class LatentGaussianField(NamedTuple):
    """The globals ``(G,)`` among the latents, the field ``(N,)``, level by level, and its graph given them.

    :param order: permutation from the coordinates of the pattern to the order of the field.
    :param sizes: sizes of the levels below the root block.
    :param parents: for each level, positions ``(m, k)`` of parents in the field; nodes without parents come
        last.
    :param color: colour of each coordinate of the pattern; columns of one colour share no row.
    :param is_edge: which entries of the pattern are not fill-in, shape ``(num_entries,)``.
    :param real: indices of globals on the whole real line, such as an intercept.
    """

    of_globals: Tensor
    of_field: Tensor
    order: Tensor
    sizes: list[int]
    parents: list[list[Tensor]]
    pattern: PrecisionPattern
    color: Tensor
    is_edge: Tensor
    real: list[int]

    @classmethod
    def of(cls, log_joint: LogJoint) -> "LatentGaussianField | None":
        """The field of a density; None unless its graph is shallow, and sparse except for a few hubs."""
        start, latents = log_joint.start, log_joint.latents
        if len(start) < _LEAST_DIM or log_joint.strategy == "loop":
            return None
        try:
            neighbours = find_dependencies(log_joint)
        except ValueError:  # no gradient near the start
            return None
        coloring = color_columns(neighbours)
        is_hub = coloring.on(start.device) >= coloring.num_colors - coloring.num_hubs
        if not 0 < coloring.num_hubs <= MOST_GLOBALS or bool(is_hub.all()):
            return None
        of_field = (~is_hub).nonzero()[:, 0]
        index = {i: k for k, i in enumerate(of_field.tolist())}
        graph = MarkovGraph.from_neighbours(
            [[index[j] for j in neighbours[i] if j in index] for i in index]
        )
        elimination = graph.elimination
        is_deep = len(elimination.levels) > _MOST_LEVELS
        if is_deep or elimination.num_edges > _MOST_PARENTS * len(of_field):
            return None
        pattern = PrecisionPattern(elimination, start.device)
        level = torch.tensor(elimination.level, dtype=torch.long, device=start.device)
        order, alone = [pattern.root], torch.zeros_like(level, dtype=torch.bool)
        alone[pattern.alone] = True
        for k, parts in enumerate(pattern.levels, 1):
            order += [own for _, _, own, _ in parts]
            order.append((alone & (level == k)).nonzero()[:, 0])
        ordered = torch.cat(order)
        # padding points to the first coordinate, with a coefficient of zero
        place = torch.cat([ordered.argsort(), ordered.new_zeros(1)])
        pairs = pattern.pairs().T.tolist()
        is_edge = [i == j or j in graph.neighbours[i] for i, j in pairs]
        of_globals = is_hub.nonzero()[:, 0]
        of_sites = ((site.is_unconstrained, site.size) for site in latents.sites.values())
        is_real = [is_one for is_one, size in of_sites for _ in range(size)]
        return cls(
            of_globals=of_globals,
            of_field=of_field[ordered],
            order=ordered,
            sizes=level.bincount()[1:].tolist(),
            parents=[[place[above] for *_, above in parts] for parts in pattern.levels],
            pattern=pattern,
            color=graph.coloring.on(start.device),
            is_edge=torch.tensor(is_edge, dtype=torch.bool, device=start.device),
            real=[k for k, i in enumerate(of_globals.tolist()) if is_real[i]],
        )

    @property
    def of_pattern(self) -> Tensor:
        """The field in the order of the pattern, shape ``(N,)``."""
        return self.of_field[self.order.argsort()]

    def gaussians(self, log_joint: LogJoint, points: Tensor, unit: Tensor) -> list[SparseGaussian]:
        """Zero-mean Gaussians with the curvature of a density in the field, at points ``(n, D)``.

        :param unit: approximate sds of the latents, shape ``(D,)``.
        """
        of_pattern = self.of_pattern
        step = points.new_zeros(int(self.color.max()) + 1, points.shape[1])
        size = 1e-3 * unit[of_pattern]
        step[self.color, of_pattern] = size
        ends = torch.stack([points[:, None] + step, points[:, None] - step])
        _, gradients = value_and_gradient(log_joint, ends.flatten(0, 2))
        ahead, behind = gradients.reshape(ends.shape)[..., of_pattern]
        rows, columns = self.pattern.pairs()
        entries = (behind - ahead)[:, self.color[columns], rows] / (2 * size[columns])
        entries = torch.where(self.is_edge, entries, 0.0)
        zero = torch.zeros_like(size)
        return [SparseGaussian.from_precision(self.pattern, zero, row) for row in entries]

    def conditionals(
        self, log_joint: LogJoint, points: Tensor, unit: Tensor
    ) -> tuple[list[SparseGaussian], Tensor]:
        """Zero-mean Gaussians at the conditional modes given the globals; moves points there, in place.

        :return: the Gaussians, and which of the modes were found.
        """
        of_pattern, is_found = self.of_pattern, torch.zeros_like(points[:, 0], dtype=torch.bool)
        for step in range(_MOST_NEWTON):
            if step % _SAME_CURVATURE == 0:
                gaussians = self.gaussians(log_joint, points, unit)
            _, gradients = value_and_gradient(log_joint, points)
            moves = [g.solve(row) for g, row in zip(gaussians, gradients[:, of_pattern])]
            move = torch.stack(moves)
            # the Newton decrement, the rms length of the move in conditional sds
            squares = (move * gradients[:, of_pattern]).mean(1)
            is_found = squares.abs() < 0.01**2
            points[:, of_pattern] += move.nan_to_num(0.0, 0.0, 0.0)
            if bool(is_found.all()):
                break
        return self.gaussians(log_joint, points, unit), is_found


class ConditionalGaussian:
    """The transform from (g, e) to (g, x), with conditionals interpolated between some draws.

    The interpolation uses cubic radial basis functions with a linear part (reference 3).

    :param latents: draws ``(n, D)``; knots have the globals of some of these.
    :param unit: approximate sds of the latents, shape ``(D,)``.
    :raises ValueError: if the field has no mode with a usable curvature given the globals of any draw.
    """

    def __init__(
        self, field: LatentGaussianField, log_joint: LogJoint, latents: Tensor, unit: Tensor
    ) -> None:
        self._field, self._log_joint, self._unit = field, log_joint, unit
        self.of_globals, self.of_field = field.of_globals, field.of_field
        knots = self._spread_out(latents[:, field.of_globals])
        points = latents.median(0).values.repeat(len(knots), 1)
        points[:, field.of_globals] = knots
        gaussians, is_found = field.conditionals(log_joint, points, unit)
        root = gaussians[0].root_tril
        self._below = torch.tril_indices(len(root), len(root), -1, device=root.device)
        numbers, modes = torch.stack([*map(self._numbers, gaussians)]), points[:, field.of_field]
        # below, curvatures by differences have no digits left
        least = unit[field.of_field].log() + math.log(torch.finfo(unit.dtype).eps) / 3
        is_usable = is_found & (numbers[:, : len(least)] > least).all(1)
        is_usable &= numbers.isfinite().all(1) & modes.isfinite().all(1)
        if not bool(is_usable.any()):
            raise ValueError(
                "expected a mode of the field given the globals of some draw, got none with a curvature"
            )
        numbers, modes, self._knots = numbers[is_usable], modes[is_usable], knots[is_usable]
        low, high = self._knots.amin(0), self._knots.amax(0)
        self._low, self._high = low - _REACH * (high - low), high + _REACH * (high - low)
        shifts = self._choose_center(modes, self._parts(numbers.T))
        self._weights = self._interpolation(torch.cat([shifts, numbers], 1))

    def _choose_center(self, modes: Tensor, parts: tuple[Tensor, Tensor, list[Tensor]]) -> Tensor:
        """Chooses the centre, the mode at a knot that may move with intercepts; returns shifts ``(K, N)``.

        Where a scale vanishes, shifts are bounded only around modes that are as smooth.
        """
        ones = torch.ones_like(self._knots[:, :1])
        by_center = [self._noise((modes - mode).T, *parts).T for mode in modes]
        best = min(range(len(modes)), key=lambda i: float(by_center[i].abs().max()))
        self._center, self._at, shifts = modes[best], self._knots[best], by_center[best]
        slopes = (torch.linalg.pinv(torch.cat([ones, self._knots], 1)) @ modes)[1:].T
        self._slopes = torch.zeros_like(slopes)
        for k in self._field.real:
            before = self._slopes
            self._slopes = before.clone()
            self._slopes[:, k] = slopes[:, k]
            moved = self._noise(modes.T - self._centers(self._knots), *parts).T
            if moved.abs().max() < shifts.abs().max():
                shifts = moved
            else:
                self._slopes = before
        return shifts

    def _centers(self, globals_: Tensor) -> Tensor:
        """The centre given globals ``(C, G)``, shape ``(N, C)``."""
        return self._center[:, None] + self._slopes @ (globals_ - self._at).T

    def _spread_out(self, globals_: Tensor) -> Tensor:
        """Globals of some draws ``(n, G)``, farther from the median than those: shape ``(K, G)``."""
        ordered, count = globals_.sort(0).values, len(globals_)
        low, middle, high = (ordered[count * k // 10] for k in (1, 5, 9))
        tiny = torch.finfo(globals_.dtype).tiny ** 0.5
        self._spread = ((high - low) / 2.563).clamp_min(tiny)  # in sds, if they are normal
        number = min(_NUM_KNOTS, count)
        # for each global, draws at evenly spaced ranks, its minimum and maximum included
        rank, each = globals_.argsort(0), max(math.ceil(number / len(middle)), 2)
        places = torch.arange(each, dtype=torch.long, device=globals_.device)
        chosen = rank[places * (count - 1) // (each - 1)].flatten()[:number]
        deviations = (globals_[chosen] - middle).clamp(-3 * self._spread, 3 * self._spread)
        return middle + _WIDER * deviations

    def _interpolation(self, values: Tensor) -> Tensor:
        """Weights ``(N, K + 1 + G)`` of the basis functions that take values ``(K, N)`` at the knots."""
        terms, size = self._terms(self._knots), len(self._knots)
        # the cubic part is orthogonal to the linear one
        conditions = terms.new_zeros(terms.shape[1], terms.shape[1])
        conditions[:size], conditions[size:, :size] = terms, terms[:, size:].T
        rest = values.new_zeros(len(conditions) - size, values.shape[1])
        return (torch.linalg.pinv(conditions) @ torch.cat([values, rest])).T.contiguous()

    def share_beyond(self, latents: Tensor) -> Tensor:
        """Mass of each global beyond its 1 % or 99 % quantile of draws ``(n, D)``, the larger one, ``(G,)``.

        Uses Laplace's approximation of the marginal density of the globals (reference 2), along the line of
        their conditional means given one of them. About 1 % if the draws cover both tails.
        """
        globals_ = latents[:, self.of_globals]
        middle, covariance = globals_.median(0).values, torch.atleast_2d(globals_.T.cov())
        reach = 6 * covariance.diagonal().sqrt()
        low, high = globals_.quantile(latents.new_tensor([0.01, 0.99]), 0)
        part = torch.linspace(0, 1, _PARTS + 1, dtype=low.dtype, device=low.device)[:, None]
        grid = [low + reach * (part[:-1] - 1), low + (high - low) * part, high + reach * part[1:]]
        found = []
        for k, line in enumerate(torch.cat(grid).T):
            slope = covariance[k] / covariance[k, k].clamp_min(torch.finfo(low.dtype).tiny)
            log_density = self._log_marginal(middle + (line - middle[k])[:, None] * slope)
            density = (log_density - log_density.nan_to_num(-torch.inf).max()).exp().nan_to_num(0.0)
            mass = (density[1:] + density[:-1]) * line.diff()
            beyond = torch.stack([mass[:_PARTS].sum(), mass[-_PARTS:].sum()])
            found.append(beyond.max() / mass.sum())
        return torch.stack(found)

    def _log_marginal(self, globals_: Tensor) -> Tensor:
        """Laplace's approximation of the marginal log density of globals ``(n, G)``, up to a constant."""
        field = self._field
        points = globals_.new_zeros(len(globals_), len(self._unit))
        points[:, self.of_globals] = globals_
        points, _ = self(points)
        gaussians, _ = field.conditionals(self._log_joint, points, self._unit)
        log_density, _ = value_and_gradient(self._log_joint, points)
        inner = field.order[len(field.pattern.root) :]
        widths = [
            g.scale[inner].log().sum() + g.root_tril.diagonal().log().sum() for g in gaussians
        ]
        return log_density.to(globals_.dtype) + torch.stack(widths)

    def _terms(self, globals_: Tensor) -> Tensor:
        """Basis functions ``(n, K + 1 + G)`` of K knots, constant beyond the range of these."""
        t = globals_.clamp(self._low, self._high) / self._spread
        squares = (t[:, None] - self._knots / self._spread).square().sum(-1)
        # smooth at zero
        return torch.cat([(squares + 1e-6) ** 1.5, torch.ones_like(t[:, :1]), t], 1)

    def _numbers(self, gaussian: SparseGaussian) -> Tensor:
        """The parameters that are interpolated: log scales, the root's factor, coefficients."""
        field, root = self._field, gaussian.root_tril
        log_scale = gaussian.scale.log()[field.order[len(root) :]]
        parts = [root.diagonal().log(), log_scale, root[self._below[0], self._below[1]]]
        for level in field.pattern.levels:
            parts += [gaussian.coefficients[g][part].flatten() for g, part, _, _ in level]
        return torch.cat(parts)

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Log scales ``(N, C)``, root factors ``(C, R, R)`` and coefficients ``(m k, C)``."""
        size, num_root = len(self._field.order), len(self._field.pattern.root)
        above = [parents.numel() for level in self._field.parents for parents in level]
        log_scale, below, *rest = numbers.split([size, self._below.shape[1], *above])
        factors = torch.diag_embed(log_scale[:num_root].exp().T)
        rows = torch.arange(len(factors), device=factors.device)[:, None]
        factors = factors.index_put((rows, self._below[0], self._below[1]), below.T)
        return log_scale, factors, rest

    def _conditionals(self, globals_: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Shifts d of the noise ``(N, C)``, and the parts."""
        numbers = self._weights @ self._terms(globals_).T
        size = len(self._field.order)
        return numbers[:size], *self._parts(numbers[size:])

    def __call__(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (g, e) to latents, both ``(C, D)``; returns these and log-determinants ``(C,)``."""
        field, num_root = self._field, len(self._field.pattern.root)
        shift, log_scale, factors, rest = self._conditionals(base[:, field.of_globals])
        noise, coefficients = base[:, field.of_field].T + shift, iter(rest)
        z = (factors @ noise[:num_root].T[..., None])[..., 0].T
        levels = (log_scale[num_root:].exp() * noise[num_root:]).split(field.sizes)
        for own, parents in zip(levels, field.parents):
            z = torch.cat([z, own + _sums(z, parents, coefficients, len(own))])
        centers = self._centers(base[:, field.of_globals])
        latents = base.index_copy(1, field.of_field, (centers + z).T)
        return latents, log_scale.sum(0)

    def inverse(self, latents: Tensor) -> Tensor:
        """Maps latents to (g, e), both ``(C, D)``."""
        globals_ = latents[:, self.of_globals]
        shift, log_scale, factors, rest = self._conditionals(globals_)
        z = latents[:, self.of_field].T - self._centers(globals_)
        noise = self._noise(z, log_scale, factors, rest)
        return latents.index_copy(1, self.of_field, (noise - shift).T)

    def _noise(
        self, z: Tensor, log_scale: Tensor, factors: Tensor, coefficients: list[Tensor]
    ) -> Tensor:
        """The standardized residuals given parents, both ``(N, C)``."""
        field, num_root, rest = self._field, len(self._field.pattern.root), iter(coefficients)
        of_root = z[:num_root].T[..., None]
        noise = [torch.linalg.solve_triangular(factors, of_root, upper=False)[..., 0].T]
        start = num_root
        for size, parents in zip(field.sizes, field.parents):
            own = slice(start, start + size)
            residual = z[own] - _sums(z[:start], parents, rest, size)
            noise.append(residual / log_scale[own].exp())
            start += size
        return torch.cat(noise)


def _sums(z: Tensor, parents: list[Tensor], coefficients: Iterator[Tensor], size: int) -> Tensor:
    """Contributions ``(size, C)`` of parents to a level; zero for the last nodes, which have none."""
    found = []
    for above in parents:
        weight = next(coefficients).unflatten(0, above.shape)
        found.append((weight * z[above]).sum(1))
    num_alone = size - sum(map(len, found))
    return torch.cat([*found, z.new_zeros(num_alone, z.shape[1])])
