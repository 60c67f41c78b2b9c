# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""The initial guide of many latents: the best Gaussian whose precision has the pattern of their graph.

The Gaussian with the largest ELBO is a fixed point of

.. math::

    \Lambda \leftarrow -E_q[\nabla^2 \log p(z)], \qquad m \leftarrow m + \Lambda^{-1} E_q[\nabla \log p(z)]

whose precision has zeros where the graph of p has no edge. Steps begin at a mean-field fit, and each is
shortened until the ELBO on common noise rises. The second derivatives are differences of gradients, a few
for each draw: coordinates that share no neighbour move at once.

**References**

1. The Variational Gaussian Approximation Revisited (Opper, Archambeau, 2009)
2. Gaussian Variational Approximation with Sparse Precision Matrices (Tan, Nott, 2018),
   https://arxiv.org/abs/1604.01272
3. On the Estimation of Sparse Jacobian Matrices (Curtis, Powell, Reid, 1974)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ...graphs.dependencies import gradients
from ...graphs.markov_graph import Elimination, MarkovGraph
from ...graphs.sparse_gaussian import PrecisionPattern, SparseGaussian
from ...joint import LogDensity
from ...joint.protocols import StructuredGuide
from ..config import InitializationConfig
from .batch_and_match import fit_independent
from .gaussians import antithetic_noise, elbos, evaluate_density
from .initial_guide import UNCHANGED, GaussianSearch, InitialGuide, find_initial_guide, judge_guide

# independent Gaussians that a start begins with
_NUM_FITTED = 4


def find_sparse_start(
    log_density: LogDensity,
    model: Callable[[], object],
    guide: StructuredGuide,
    config: InitializationConfig,
) -> InitialGuide:
    """Makes a guide the best of: itself, a Gaussian with its graph, and for few latents all others."""
    if log_density.strategy == "loop":
        config = config.for_loop()
    own_elbo, needed, center = judge_guide(log_density, guide, config)
    initial = InitialGuide(UNCHANGED, own_elbo, None)
    few = log_density.latents.latent_dim <= config.max_dense_dim
    points = GaussianSearch(log_density, model, config).points(center)
    if few or not len(points):
        initial = find_initial_guide(log_density, model, guide, config)
        needed = max(needed, initial.elbo + config.min_gain)
    if len(points):
        search = SparseGaussianSearch(log_density, guide.markov_graph(), config)
        gaussian = search.best(points)
        elbo = search.elbo(gaussian, antithetic_noise(gaussian.loc[None], config.num_fine))
        if elbo > needed:
            guide.start_at_gaussian(gaussian)
            name = "a Gaussian with the graph of the latents"
            return InitialGuide(name, elbo, initial.modes)
    if initial.elbo == -torch.inf:  # an error, unless another candidate is finite
        return find_initial_guide(log_density, model, guide, config)
    return initial


@lru_cache(maxsize=2)
def _pattern_of(elimination: Elimination, device: torch.device) -> PrecisionPattern:
    """The pattern of a graph, which starts in several coordinates have in common."""
    return PrecisionPattern(elimination, device)


@dataclass(frozen=True)
class SparseGaussianSearch:
    """A search for the Gaussian with a graph that has the largest ELBO."""

    log_density: LogDensity
    graph: MarkovGraph
    config: InitializationConfig

    @cached_property
    def pattern(self) -> PrecisionPattern:
        """Where the entries of precisions are."""
        return _pattern_of(self.graph.elimination, self.log_density.start.device)

    def best(self, points: Tensor) -> SparseGaussian:
        """The best Gaussian from points of shape ``(S, D)``, by natural gradients from mean-field fits."""
        config, noise = self.config, antithetic_noise(points, self.config.num_rough)
        settings = config.narrow_scale, config.min_draws, config.num_matches
        order = evaluate_density(self.log_density, points).argsort(descending=True)
        fitted = fit_independent(self.log_density, points[order[:_NUM_FITTED]], *settings)
        k = elbos(self.log_density, fitted, noise).argmax()
        loc, sd = fitted.loc[k], fitted.scale_tril[k]
        precision = loc.new_zeros(self.pattern.num_entries)
        precision[self.pattern.diagonal] = sd**-2
        gaussian = SparseGaussian.from_precision(self.pattern, loc, precision)
        noise = antithetic_noise(loc[None], config.num_rough)
        elbo = self.elbo(gaussian, noise)
        for _ in range(config.max_natural_steps):
            before, (curvature, gradient) = elbo, self._expectations(gaussian)
            for share in config.natural_shares:  # the longest part of a step that raises the ELBO
                mixed = torch.lerp(precision, curvature, share)
                moved = SparseGaussian.from_precision(self.pattern, gaussian.loc, mixed)
                moved = moved.at(gaussian.loc + share * moved.solve(gradient))
                value = self.elbo(moved, noise)
                if value > elbo:
                    gaussian, precision, elbo = moved, mixed, value
                    break
            if not elbo - before > config.min_natural_gain:
                break
        return gaussian

    def _expectations(self, gaussian: SparseGaussian) -> tuple[Tensor, Tensor]:
        """The expectations of the curvature, by its entries, and of the gradient, shape ``(D,)``."""
        config, count, dim = self.config, self.graph.coloring.num_colors, len(gaussian.loc)
        rows, columns, color, is_hub = self._pairs
        num_draws = config.max_natural_gradients // (2 * (count + 1)) * 2
        num_draws = min(max(num_draws, config.min_natural), config.num_natural)
        draws = gaussian.transform(antithetic_noise(gaussian.loc[None], num_draws))
        step = config.natural_difference * gaussian.sd
        if draws.dtype != torch.float64:  # the differences of rounded numbers
            step = 10 * step
        shifts = torch.zeros(count, dim, dtype=draws.dtype, device=draws.device)
        shifts[color, torch.arange(dim, device=draws.device)] = step
        base = gradients(self.log_density, draws)
        total, used = torch.zeros_like(shifts), 0
        for draw, at_draw in zip(draws, base):
            change = gradients(self.log_density, draw + shifts) - at_draw
            if bool(change.isfinite().all()):
                total, used = total + change, used + 1
        mean = base[base.isfinite().all(-1)].mean(0)
        change = total / max(used, 1)
        one = change[color[columns], rows] / step[columns]
        other = change[color[rows], columns] / step[rows]
        # what others have in the rows of hubs is mixed, and the columns of hubs are not
        first = torch.where(is_hub[rows] & ~is_hub[columns], other, one)
        second = torch.where(is_hub[columns] & ~is_hub[rows], one, other)
        curvature = self.pattern.from_pairs(rows, columns, -0.5 * (first + second))
        return curvature, mean.nan_to_num(0.0)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows and columns of all pairs of the graph; colors of coordinates, and which are hubs."""
        coloring, device = self.graph.coloring, self.log_density.start.device
        pairs = [*self.graph.edges, *((i, i) for i in range(len(self.graph.neighbours)))]
        rows, columns = torch.tensor(pairs, dtype=torch.long, device=device).T
        color = torch.tensor(coloring.color, dtype=torch.long, device=device)
        return rows, columns, color, color >= coloring.num_colors - coloring.num_hubs

    def elbo(self, gaussian: SparseGaussian, noise: Tensor) -> float:
        """The ELBO of a Gaussian on noise of shape ``(K, D)``; ``-inf`` where it is not finite."""
        values = evaluate_density(self.log_density, gaussian.transform(noise))
        # of the same draws as the density, so that the constant of a Gaussian cancels
        dim = noise.shape[-1]
        entropy = gaussian.entropy() - 0.5 * dim + 0.5 * noise.square().sum(-1).mean()
        return float((values.mean() + entropy).nan_to_num(-math.inf, -math.inf, -math.inf))
