# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Mass matrices of Hamiltonian chains, estimated from draws and gradients.

For a Gaussian with covariance S, gradients at draws have covariance S^{-1}. The geometric mean of the
covariance of draws and the inverse covariance of gradients is then exactly S from as few draws as dimensions,
since both have the same noise. With fewer draws this is done by coordinate, and then in the subspace in which
draws and gradients vary most.

**References**

1. Nutpie's low-rank mass matrix (Seyboldt, Carlson, Carpenter), https://github.com/pymc-devs/nuts-rs
2. Batch and match: black-box variational inference with a score-based divergence (Cai, Modi,
   Pillaud-Vivien, Margossian, Gower, Blei, Saul, 2024), https://arxiv.org/abs/2402.14758
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: maximum dimension for a full matrix; maximum rank of draws and of gradients above it
_MOST_DIRECTIONS = 512
_NUM_DIRECTIONS = 64
_RIDGE = 1e-3
#: variances within this factor of one are left at one
_NEAR = 1.2
# points with gradients this many times the lower quartile are left out, and so are coordinates for which the
# sd of draws times that of gradients, one for a Gaussian, is out of bounds by this factor
_TOO_STEEP, _TOO_UNEQUAL = 1e6, 1e4


class Preconditioner(NamedTuple):
    """A = diag(scale) (I + U diag(factors - 1) U^T), where A A^T approximates the covariance of a density.

    ``scale`` has shape ``(D,)``; ``directions``, U, ``(D, k)`` with orthonormal columns; ``factors``
    ``(k,)``.
    """

    scale: Tensor
    directions: Tensor
    factors: Tensor

    @classmethod
    def identity(cls, like: Tensor) -> "Preconditioner":
        """The identity for vectors ``(..., D)``."""
        dim = like.shape[-1]
        return cls(like.new_ones(dim), like.new_zeros((dim, 0)), like.new_ones(0))

    def __call__(self, vectors: Tensor) -> Tensor:
        """Multiplies vectors ``(C, D)`` by A."""
        return self.scale * self._stretched(vectors)

    def transposed(self, vectors: Tensor) -> Tensor:
        """Multiplies vectors ``(C, D)`` by the transpose of A."""
        return self._stretched(self.scale * vectors)

    def _stretched(self, vectors: Tensor) -> Tensor:
        return vectors + (vectors @ self.directions * (self.factors - 1)) @ self.directions.T

    @classmethod
    def of(cls, draws: Tensor, gradients: Tensor) -> "Preconditioner":
        """Estimates A from draws ``(n, D)`` and the gradients of the log density there, both finite.

        A is diagonal in coordinates where draws and gradients do not match, as where gradients are zero.
        """
        size = gradients.abs().amax(1)
        is_steep = size > _TOO_STEEP * size.quantile(0.25)
        draws, gradients = draws[~is_steep], gradients[~is_steep]
        if len(draws) < 2:
            return cls.identity(draws)
        tiny = torch.finfo(draws.dtype).tiny ** 0.25
        gradients = gradients.clamp(-1 / tiny, 1 / tiny)  # squares are finite
        draws, gradients = draws - draws.mean(0), gradients - gradients.mean(0)
        sd, of_gradients = (each.std(0).clamp(tiny, 1 / tiny) for each in (draws, gradients))
        ratio = (sd * of_gradients).sqrt()
        scale = torch.where(ratio < 1 / _TOO_UNEQUAL, sd, (sd / of_gradients).sqrt())
        is_usable = (ratio > 1 / _TOO_UNEQUAL) & (ratio < _TOO_UNEQUAL)
        draws, gradients = draws / scale * is_usable, gradients * scale * is_usable
        dim = draws.shape[-1]
        if dim <= min(_MOST_DIRECTIONS, len(draws)):
            basis = None
        else:
            count = min(_NUM_DIRECTIONS, len(draws) // 4)
            if count < 1:
                return cls.identity(draws)._replace(scale=scale)
            leading = [torch.svd_lowrank(each, count, niter=2)[2] for each in (draws, gradients)]
            basis = torch.linalg.qr(torch.cat(leading, 1)).Q
            draws, gradients = draws @ basis, gradients @ basis
        variances, axes = _geometric_mean(_covariance(draws), _covariance(gradients))
        is_far = variances.log().abs() > torch.log(variances.new_tensor(_NEAR))
        directions = axes[:, is_far] if basis is None else basis @ axes[:, is_far]
        return cls(scale, directions, variances[is_far].sqrt())


def fisher_divergence(draws: Tensor, gradients: Tensor) -> Tensor:
    """The Fisher divergence of a density from a Gaussian, by draws and gradients ``(n, D)``.

    The Gaussian is the preconditioned one; the divergence, zero for a Gaussian, is per dimension, at the
    median draw and at the 95 % quantile, shape ``(2,)``. See Estimation of Non-Normalized Statistical Models
    by Score Matching (Hyvärinen, 2005), https://www.jmlr.org/papers/v6/hyvarinen05a.html
    """
    found = Preconditioner.of(draws, gradients)
    z, score = (
        (draws - draws.mean(0)) / found.scale,
        found.transposed(gradients - gradients.mean(0)),
    )
    z = z + (z @ found.directions * (1 / found.factors - 1)) @ found.directions.T
    return (z + score).square().mean(1).quantile(z.new_tensor([0.5, 0.95]))


def _covariance(values: Tensor) -> Tensor:
    found = values.T @ values / len(values)
    return found + _RIDGE * torch.eye(len(found), dtype=found.dtype, device=found.device)


def _geometric_mean(covariance: Tensor, of_gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of the S with S G S = C, the geometric mean of C and the inverse of G."""
    root, inverse_root = _roots(of_gradients)
    inner, _ = _roots(root @ covariance @ root)
    mean = inverse_root @ inner @ inverse_root
    variances, axes = torch.linalg.eigh((mean + mean.T) / 2)
    return variances.clamp(1e-6, 1e6), axes


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive matrix, and its inverse."""
    values, axes = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp_min(torch.finfo(values.dtype).eps * values[-1])
    return (axes * values.sqrt()) @ axes.T, (axes * values.rsqrt()) @ axes.T
