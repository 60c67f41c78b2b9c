# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Gaussians of shared latents and of elements of crossed or nested plates.

The precision has full rows for shared latents g, blocks for elements of groups of plates, and blocks for
pairs of elements of two groups that data link, such as users and items. The Gaussian is factorized as

.. math:: q(g) \, q(x_1 \mid g) \, q(x_2 \mid x_1, g) \cdots

with the groups of plates in turn, the smallest first. Elements of a group are independent given all others,
but not given earlier groups only: eliminating items links the users that rated the same. These links are
approximated by their leading eigenvectors. For two crossed plates the largest is nearly constant: a shift of
all users against all items, which the priors alone determine.

**References**

1. Scalable Gibbs and Variational Inference for Crossed Random Effects (Papaspiliopoulos, Roberts, Zanella,
   2020; Goplerud, Papaspiliopoulos, Zanella, 2025), https://arxiv.org/abs/1803.09460
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from ..elements import ElementGroups, Links
from .sparse_matrix import SparseMatrix

#: the number of eigenvectors that approximate the links within a group
RANK = 4
_MOST_ITERATIONS, _TOLERANCE = 200, 1e-9  # of conjugate gradients
_POWER_ITERATIONS, _EXTRA = 10, 8  # of the subspace iteration, and its additional vectors
# of a block with a unit diagonal: eigenvalues below the first are raised to the second
_SINGULAR, _LEAST_EIGENVALUE = 1e-9, 0.01
_MOST_CORRELATED = 0.9999  # the largest eigenvalue of the links of elements


@dataclass
class ElementPrecision:
    """A precision in double precision; off-diagonal blocks of elements that are not linked are zero.

    :param shared: the rows of the G shared latents, shape ``(G, D)``.
    :param blocks: for each group, shape ``(n, m, m)``.
    :param linked: for each of the links, shape ``(E, m_later, m_earlier)``.
    """

    groups: ElementGroups
    links: Sequence[Links]
    shared: Tensor
    blocks: list[Tensor]
    linked: list[Tensor]

    def __post_init__(self) -> None:
        self.blocks = [_raised(block) for block in self.blocks]
        self.dim = self.shared.shape[1]

    @cached_property
    def between(self) -> SparseMatrix:
        """The linked blocks, rows of later and columns of earlier groups."""
        return self.sparse(self.linked)

    def sparse(self, values: Sequence[Tensor]) -> SparseMatrix:
        """The values of all links as a sparse matrix ``(D, D)``."""
        none = torch.zeros(2, 0, dtype=torch.long, device=self.shared.device)
        index = [none, *(link.coordinates(self.groups).flatten(1) for link in self.links)]
        flat = torch.cat([self.shared.new_zeros(0), *map(torch.flatten, values)])
        row, column = torch.cat(index, 1)
        return SparseMatrix.of(row, column, flat, self.dim)

    def per_element(self, matrices: Sequence[Tensor], v: Tensor) -> Tensor:
        """Block matrices of all groups, each ``(n, m, m)``, times vectors ``(D, R)``; zero for shared."""
        found = torch.zeros_like(v)
        for own, matrix in zip(self.groups.members, matrices):
            found[own] = matrix @ v[own]
        return found

    @cached_property
    def inverses(self) -> list[Tensor]:
        return [torch.linalg.inv(block) for block in self.blocks]

    def product(self, v: Tensor) -> Tensor:
        """The precision of elements given shared latents, times vectors ``(D, R)``."""
        linked = self.between(v.T) + self.between(v.T, is_transposed=True)
        return self.per_element(self.blocks, v) + linked.T

    def times(self, v: Tensor) -> Tensor:
        """The precision times vectors ``(D, R)``."""
        shared = self.groups.shared
        found = self.product(v.index_fill(0, shared, 0.0)) + self.shared.T @ v[shared]
        found[shared] = self.shared @ v
        return found

    def damped(self, added: Tensor) -> "ElementPrecision":
        """The same with numbers ``(D,)`` added to the diagonal."""
        members, shared = self.groups.members, self.shared.clone()
        rows = torch.arange(len(shared), device=shared.device)
        shared[rows, self.groups.shared] += added[self.groups.shared]
        blocks = [block + added[own].diag_embed() for own, block in zip(members, self.blocks)]
        return ElementPrecision(self.groups, self.links, shared, blocks, self.linked)

    def to(self, like: Tensor) -> "ElementPrecision":
        """The same in another dtype or on another device."""
        blocks, linked = ([v.to(like) for v in values] for values in (self.blocks, self.linked))
        groups, links = self.groups.to(like.device), [link.to(like.device) for link in self.links]
        return ElementPrecision(groups, links, self.shared.to(like), blocks, linked)

    def solve(self, right: Tensor) -> Tensor:
        """The inverse of :meth:`product`, by preconditioned conjugate gradients."""
        right = right.index_fill(0, self.groups.shared, 0.0)
        x = self.per_element(self.inverses, right)
        residual = right - self.product(x)
        y = self.per_element(self.inverses, residual)
        direction, size = y, (residual * y).sum(0)
        target = _TOLERANCE**2 * (right * self.per_element(self.inverses, right)).sum(0)
        for _ in range(_MOST_ITERATIONS):
            if (size <= target).all():
                break
            moved = self.product(direction)
            curvature = (direction * moved).sum(0)
            step = torch.where((curvature > 0) & (size > 0), size / curvature, 0.0)
            x, residual = x + step * direction, residual - step * moved
            y, before = self.per_element(self.inverses, residual), size
            size = (residual * y).sum(0)
            direction = y + torch.where(before > 0, size / before, 0.0) * direction
        return x


class ElementGaussian:
    """The conditionals of a Gaussian with an :class:`ElementPrecision`, and its mean ``(D,)``."""

    def __init__(self, loc: Tensor, precision: ElementPrecision) -> None:
        self.loc, self.precision = loc, precision
        groups, shared = precision.groups, precision.groups.shared
        #: the slopes of the mean of elements in shared latents, ``(D, G)``; zero for shared ones
        self.slopes = -precision.solve(precision.shared.T)
        root = precision.shared[:, shared] + precision.shared @ self.slopes
        root = _raised(root) if len(shared) else root
        self.root_covariance = torch.linalg.inv(root) if len(shared) else root
        self.root_tril = _cholesky(self.root_covariance) if len(shared) else root
        #: the conditional precisions of elements given earlier groups, ``(n, m, m)``
        self.conditional = [block.clone() for block in precision.blocks]
        #: their inverses
        self.covariances = [*self.conditional]
        #: the slopes of later elements in earlier ones, like ``precision.linked``
        self.coupled = [*precision.linked]
        for k in reversed(range(len(groups.members))):
            for n, (link, values) in enumerate(zip(precision.links, precision.linked)):
                if link.earlier == k:  # the block of the later group is final
                    early, late = link.elements.T
                    self.coupled[n] = slopes = -self.covariances[link.later][late] @ values
                    self.conditional[k].index_add_(0, early, values.mT @ slopes)
            self.conditional[k] = _raised(self.conditional[k])
            self.covariances[k] = torch.cholesky_inverse(_cholesky(self.conditional[k]))
        #: lower-triangular factors B with B' B = conditional, which map elements to noise
        self.lower = [_cholesky(c.flip(1, 2)).flip(1, 2).mT for c in self.conditional]
        #: the same as a matrix ``(D, D)``
        self.coupling = precision.sparse(self.coupled)
        #: for each group whose elements depend on each other given earlier groups, through later ones:
        #: orthonormal vectors ``(n m, r)`` of noise, and the factors on it, ``(r,)``
        self.leading = {k: self._leading(k) for k in sorted({n.earlier for n in precision.links})}

    def solve(self, gradient: Tensor) -> Tensor:
        """The covariance times a vector ``(D,)``."""
        shared = self.precision.groups.shared
        given = self.precision.solve(gradient[:, None])[:, 0]
        root = self.root_covariance @ (gradient[shared] + self.slopes.T @ gradient)
        found = given + self.slopes @ root
        found[shared] = root
        return found

    @property
    def entropy(self) -> float:
        """The entropy in nats."""
        log_scale = self.root_tril.diagonal().log().sum()
        for k, lower in enumerate(self.lower):
            if k in self.leading:
                log_scale = log_scale + self.leading[k][1].log().sum()
            log_scale = log_scale - lower.diagonal(dim1=1, dim2=2).log().sum()
        return float(log_scale) + 0.5 * len(self.loc) * (1 + math.log(2 * math.pi))

    def _leading(self, k: int) -> tuple[Tensor, Tensor]:
        precision, own = self.precision, self.precision.groups.members[k]
        size, like, generator = own.numel(), precision.shared, torch.Generator().manual_seed(0)
        count = min(RANK + _EXTRA, size)
        start = torch.randn(size, count, generator=generator, dtype=like.dtype, device="cpu")
        basis = torch.linalg.qr(start.to(like.device)).Q
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(self._whitened_links(k, basis)).Q
        values, axes = torch.linalg.eigh(basis.T @ self._whitened_links(k, basis))
        values = values.clamp_max(_MOST_CORRELATED)
        best = (-torch.log1p(-values) - values).argsort(descending=True)[:RANK]
        return basis @ axes[:, best], (1 - values[best]).rsqrt()

    def _whitened_links(self, k: int, v: Tensor) -> Tensor:
        """The links of elements of group k through later ones, in units of conditional sds."""
        precision, own = self.precision, self.precision.groups.members[k]
        lower, (n, m) = self.lower[k], own.shape
        x = torch.linalg.solve_triangular(lower, v.reshape(n, m, -1), upper=False)
        full = precision.shared.new_zeros(precision.dim, v.shape[-1])
        full[own] = x
        later = precision.between(full.T).T
        later = precision.per_element(self.covariances, later)
        back = precision.between(later.T, is_transposed=True).T[own]
        back = back + (self.conditional[k] - precision.blocks[k]) @ x
        return torch.linalg.solve_triangular(lower.mT, back, upper=True).reshape(v.shape)

    def sample(self, noise: Tensor) -> Tensor:
        """Draws ``(n, D)`` from standard normal noise ``(n, D)``."""
        precision, noise = self.precision, noise.T
        groups, shared = precision.groups, precision.groups.shared
        z = torch.zeros_like(noise)
        for k, own in enumerate(groups.members):
            flat = noise[own].flatten(0, 1)
            if k in self.leading:
                basis, factor = self.leading[k]
                flat = flat + basis @ ((factor - 1)[:, None] * (basis.T @ flat))
            flat = flat.reshape(*own.shape, -1)
            scaled = torch.linalg.solve_triangular(self.lower[k], flat, upper=False)
            z[own] = scaled + self.coupling(z.T).T[own]
        root = self.root_tril @ noise[shared]
        z = z + self.slopes @ root
        z[shared] = root
        return self.loc + z.T

    @cached_property
    def sd(self) -> Tensor:
        """The marginal sds, ``(D,)``, without the part through elements of other groups."""
        by_shared = (self.slopes @ self.root_tril).square().sum(-1)
        return (self.conditional_sd**2 + by_shared).sqrt()

    @cached_property
    def scale(self) -> Tensor:
        """The sds given earlier groups and earlier coordinates of the element; those of shared latents."""
        found = self.conditional_sd.clone()
        for own, lower in zip(self.precision.groups.members, self.lower):
            found[own] = lower.diagonal(dim1=1, dim2=2).reciprocal()
        return found

    @cached_property
    def direct(self) -> Tensor:
        """The slopes in shared latents given earlier groups and coordinates of the element, ``(D, G)``."""
        found = self.slopes - self.coupling(self.slopes.T).T
        for own, lower in zip(self.precision.groups.members, self.lower):
            unit = lower / lower.diagonal(dim1=1, dim2=2)[..., None]
            found[own] = unit @ found[own]
        return found

    @cached_property
    def within(self) -> list[tuple[int, int, Tensor]]:
        """The slopes of coordinates in earlier ones of the element, with their indices."""
        found = list[tuple[int, int, Tensor]]()
        for own, lower in zip(self.precision.groups.members, self.lower):
            slopes = -lower / lower.diagonal(dim1=1, dim2=2)[..., None]
            for s, t in combinations(range(own.shape[1]), 2):
                found += zip(own[:, t].tolist(), own[:, s].tolist(), slopes[:, t, s])
        return found

    @cached_property
    def conditional_sd(self) -> Tensor:
        """The sds of elements given shared latents and earlier groups, and those of shared latents."""
        found = self.loc.new_zeros(len(self.loc))
        found[self.precision.groups.shared] = self.root_covariance.diagonal().sqrt()
        for own, covariance in zip(self.precision.groups.members, self.covariances):
            found[own] = covariance.diagonal(dim1=1, dim2=2).sqrt()
        return found


_cholesky: Callable[[Tensor], Tensor] = torch.linalg.cholesky


def _raised(block: Tensor) -> Tensor:
    """Symmetric matrices, positive definite: if they are not, with absolute values of eigenvalues."""
    unit = block.diagonal(dim1=-2, dim2=-1).abs().clamp_min(torch.finfo(block.dtype).tiny).sqrt()
    units = unit[..., :, None] * unit[..., None, :]
    values, axes = torch.linalg.eigh(0.5 * (block + block.mT) / units)
    if (values > _SINGULAR).all():
        return block
    raised = values.abs().clamp_min(_LEAST_EIGENVALUE)
    return units * (axes * raised[..., None, :] @ axes.mT)
