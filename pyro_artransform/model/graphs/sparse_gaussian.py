# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Gaussians whose precision matrix has the sparsity of a graph, without dense ``(D, D)`` matrices.

The Cholesky factorization along an elimination gives the conditionals

.. math::

    z_i \mid z_{\mathrm{pa}(i)} \sim N\Bigl(m_i + \sum_j A_{ij} (z_j - m_j), c_i^2\Bigr)

level by level, and a dense Gaussian for the root block. All coordinates of a level are eliminated together.

**References**

1. Gaussian Markov Random Fields: Theory and Applications (Rue, Held, 2005)
2. Formation of a Sparse Bus Impedance Matrix and Its Application to Short Circuit Study (Takahashi, Fagan,
   Chen, 1973)
3. Newton-Type Methods for Unconstrained and Linearly Constrained Optimization (Gill, Murray, 1974), whose
   bound on the factors of an indefinite matrix is used for pivots, https://doi.org/10.1007/BF01585529
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..._base.time_limit import check_time
from .markov_graph import Elimination, padded_groups

# For a precision with unit diagonal: pivots below the first are round-off, or the matrix is not positive
# definite; they are replaced by the second, an sd three times the conditional one. Tuned by hand.
_FLAT, _RAISED = {torch.float64: 1e-9, torch.float32: 1e-5}, 0.1

_Part = tuple[int, slice, Tensor, Tensor]


class PrecisionPattern:
    """Positions of the entries of a symmetric matrix with the sparsity of an eliminated graph.

    Entries form a vector ``(num_entries,)``: one for each unordered pair of neighbours in the graph with
    fill-in, including the diagonal.
    """

    def __init__(self, elimination: Elimination, device: torch.device | None = None) -> None:
        self.elimination, self.device = elimination, device or torch.device("cpu")
        dim, root = len(elimination.parents), elimination.root
        self._base = dim + 1
        as_index: Any = {"dtype": torch.long, "device": self.device}
        rows = [i for i, own in enumerate(elimination.parents) for _ in own]
        columns = [j for own in elimination.parents for j in own]
        index, every = torch.tensor([rows, columns], **as_index), torch.arange(dim, **as_index)
        self.root = torch.tensor(root, **as_index)
        pairs = [index, every.expand(2, -1), torch.combinations(self.root).T]
        self._keys = self._key(torch.cat(pairs, 1)).unique()
        self.num_entries = len(self._keys)
        alone = [i for i, k in enumerate(elimination.level) if k and not elimination.parents[i]]
        #: coordinates without parents that are not in the root block
        self.alone = torch.tensor(alone, **as_index)
        self.groups = padded_groups(elimination.parents, elimination.level)
        #: for each level after the root block: groups, with their rows in the level, these coordinates,
        #: ``(m,)``, and their parents, ``(m, k)``
        self.levels: list[list[_Part]] = [[] for _ in elimination.levels[1:]]
        for g, group in enumerate(self.groups):
            coordinates = torch.tensor(group.coordinates, **as_index)
            parents = group.parents.to(self.device)
            for level, part in group.slices.items():
                self.levels[level - 1].append((g, part, coordinates[part], parents[part]))
        #: the positions of the diagonal, shape ``(D,)``
        self.diagonal = self.index(every, every)
        # cached, since each takes millions of searches
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def among(self, parents: Tensor) -> Tensor:
        """The :meth:`index` of all pairs in each row of parents ``(m, k)``, shape ``(m, k, k)``; cached."""
        if id(parents) not in self._blocks:  # the tensor is kept, so that its id is not reused
            index = self.index(parents[:, :, None], parents[:, None])
            self._blocks[id(parents)] = parents, index
        return self._blocks[id(parents)][1]

    def _key(self, pairs: Tensor) -> Tensor:
        return pairs.amin(0) * self._base + pairs.amax(0)

    def index(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The positions of the entries of pairs; ``num_entries`` for padding."""
        key = self._key(torch.stack(torch.broadcast_tensors(rows, columns)))
        found = torch.searchsorted(self._keys, key).clamp_max(self.num_entries - 1)
        is_padding = (rows >= self._base - 1) | (columns >= self._base - 1)
        if bool(((self._keys[found] != key) & ~is_padding).any()):
            raise ValueError(
                "expected entries only for pairs in the pattern (latents that depend on each other), got one "
                "for another pair"
            )
        return torch.where(is_padding, self.num_entries, found)

    def pairs(self) -> Tensor:
        """The row and column of each entry, shape ``(2, num_entries)``."""
        return torch.stack([self._keys // self._base, self._keys % self._base])


@dataclass(frozen=True)
class SparseGaussian:
    """A Gaussian as a product of conditionals along an elimination.

    :param coefficients: for each group of the pattern, the coefficients A, shape ``(m, k)``.
    :param scale: the conditional sds c, shape ``(D,)``; not used in the root block.
    :param root_tril: the lower-triangular scale of the root block, shape ``(R, R)``.
    """

    pattern: PrecisionPattern
    loc: Tensor
    coefficients: list[Tensor]
    scale: Tensor
    root_tril: Tensor

    @classmethod
    def from_precision(
        cls, pattern: PrecisionPattern, loc: Tensor, precision: Tensor
    ) -> "SparseGaussian":
        """The Gaussian with these precision entries; pivots that are not positive are raised."""
        diagonal = precision[pattern.diagonal]
        # a coordinate without curvature has unit scale
        floor = diagonal.abs().amax() * torch.finfo(diagonal.dtype).eps
        unit = torch.where(diagonal.abs() > floor, diagonal.abs(), 1.0).rsqrt()
        rows, columns = pattern.pairs()
        entries = torch.cat([precision * unit[rows] * unit[columns], precision.new_zeros(1)])
        scale, units = torch.ones_like(loc), torch.cat([unit, unit.new_ones(1)])
        coefficients = [loc.new_zeros(group.parents.shape) for group in pattern.groups]
        for parts in reversed(pattern.levels):
            for g, part, own, above in parts:
                check_time()
                row = entries[pattern.index(own[:, None], above)]
                # bounds the coefficients, which otherwise could grow from level to level
                pivot = _raised(entries[pattern.diagonal[own]]).maximum(row.square().amax(1))
                coefficients[g][part] = -row / pivot[:, None] * unit[own, None] / units[above]
                scale[own] = unit[own] * pivot.rsqrt()
                # the Schur complement
                one, other = torch.triu_indices(above.shape[1], above.shape[1], device=above.device)
                index = pattern.among(above)[:, one, other]
                update = row[:, one] * row[:, other] / pivot[:, None]
                entries.index_add_(0, index.reshape(-1), -update.reshape(-1))
                entries[-1] = 0.0
        alone = pattern.alone
        scale[alone] = unit[alone] * _raised(entries[pattern.diagonal[alone]]).rsqrt()
        # the root block, whose precision is made positive definite
        root = pattern.root
        values, vectors = eigh(entries[pattern.index(root[:, None], root)])
        root_tril = unit[root, None] * lower_factor(vectors * _raised(values).rsqrt())
        return cls(pattern, loc, coefficients, scale, root_tril)

    def transform(self, noise: Tensor) -> Tensor:
        """Draws from standard normal noise, both of shape ``(n, D)``."""
        return self.loc + self._downwards(noise)

    def solve(self, right: Tensor) -> Tensor:
        """The solution x of ``precision @ x = right``, both of shape ``(D,)``."""
        w = torch.cat([right, right.new_zeros(1)])
        for parts in reversed(self.pattern.levels):
            for g, part, own, above in parts:
                moved = self.coefficients[g][part] * w[own, None]
                w.index_add_(0, above.reshape(-1), moved.reshape(-1))
                w[-1] = 0.0
        root = self.pattern.root
        noise = w[:-1] * self.scale
        noise[root] = w[root] @ self.root_tril
        return self._downwards(noise[None])[0]

    def _downwards(self, noise: Tensor) -> Tensor:
        """Computes deviations from the mean, level by level, shape ``(n, D)``."""
        root = self.pattern.root
        # padding reads the last row
        z = noise.new_zeros(noise.shape[1] + 1, len(noise))
        z[:-1] = (noise * self.scale).T
        z[root] = self.root_tril @ noise.T[root]
        for parts in self.pattern.levels:
            for g, part, own, above in parts:
                z[own] += (self.coefficients[g][part][:, None] @ z[above])[:, 0]
        return z[:-1].T

    @cached_property
    def sd(self) -> Tensor:
        """The marginal sds, shape ``(D,)``."""
        return self.covariance[self.pattern.diagonal].sqrt()

    @cached_property
    def covariance(self) -> Tensor:
        """The covariance entries in the pattern, and a zero that padding reads.

        They are computed level by level, by the recursion of Takahashi, Fagan and Chen (1973).
        """
        pattern = self.pattern
        covariance = self.loc.new_zeros(pattern.num_entries + 1)
        root, dense = pattern.root, self.root_tril @ self.root_tril.T
        covariance[pattern.index(root[:, None], root)] = dense
        covariance[pattern.diagonal[pattern.alone]] = self.scale[pattern.alone] ** 2
        for parts in pattern.levels:
            for g, part, own, above in parts:
                a = self.coefficients[g][part]
                among = covariance[pattern.among(above)]
                across = (a[:, None] @ among)[:, 0]
                covariance[pattern.index(own[:, None], above)] = across
                covariance[-1] = 0.0
                covariance[pattern.diagonal[own]] = (across * a).sum(-1) + self.scale[own] ** 2
        return covariance

    def given(self, parents: Sequence[Sequence[int]]) -> tuple[list[Tensor], Tensor]:
        """Regressions of coordinates on some of their parents: coefficients and conditional sds."""
        found = [self.loc.new_zeros(0)] * len(parents)
        scale, pattern = self.scale.clone(), self.pattern
        for g, group in enumerate(pattern.groups):
            for row, i in enumerate(group.coordinates):
                full = pattern.elimination.parents[i]
                found[i] = self.coefficients[g][row, : len(full)]
                if len(parents[i]) < len(full):
                    found[i], scale[i] = self._regression(i, parents[i])
        return found, scale

    def _regression(self, i: int, on: Sequence[int]) -> tuple[Tensor, Tensor]:
        pattern, covariance = self.pattern, self.covariance
        own = pattern.diagonal.new_tensor([i])
        others = pattern.diagonal.new_tensor(on)
        among = covariance[pattern.index(others[:, None], others)]
        across = covariance[pattern.index(own, others)]
        coefficients, failed = torch.linalg.solve_ex(among, across)
        coefficients = torch.where(failed == 0, coefficients, 0.0)  # zero for collinear parents
        variance = covariance[pattern.index(own, own)][0] - coefficients @ across
        return coefficients, variance.clamp_min(0).sqrt()


def _raised(pivots: Tensor) -> Tensor:
    return torch.where(pivots <= _FLAT.get(pivots.dtype, 1e-5), _RAISED, pivots)


# Factorizations that are NaN if they fail: an error would end a fit because of one matrix among many, and a
# Gaussian with such a factor has no finite ELBO, so that it is never chosen as a start


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices ``(*, n, n)``."""
    is_finite = matrix.isfinite().all(-1, keepdim=True).all(-2)
    try:
        values, vectors = torch.linalg.eigh(torch.where(is_finite[..., None], matrix, 0.0))
    except torch.linalg.LinAlgError:  # did not converge
        return torch.full_like(matrix[..., 0], torch.nan), torch.full_like(matrix, torch.nan)
    return torch.where(is_finite, values, torch.nan), vectors


def lower_factor(root: Tensor) -> Tensor:
    """The Cholesky factor of root @ root.mT, without squaring its condition number."""
    lower = torch.linalg.qr(root.mT).R.mT
    signs = lower.diagonal(dim1=-2, dim2=-1).sign()
    return lower * torch.where(signs == 0, 1.0, signs)[..., None, :]
