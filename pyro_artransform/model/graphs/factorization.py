# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Matrix factorizations that return NaN if they fail.

An error would end a fit because of one matrix among many. A Gaussian with such a factor has no finite ELBO,
so it is never chosen as a start.
"""

import torch
from torch import Tensor


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
