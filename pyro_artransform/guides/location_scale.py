# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The learnable location and scale of a guide, the layer after its flow."""

import math

import torch
from torch import Tensor, nn

from ..transforms import FlowModule


class LocationScale(FlowModule):
    r"""A location and a lower-triangular scale.

    .. math::

        y = \mathrm{loc} + \mathrm{diag}(s) (I + A) x, \qquad s = \exp(\mathrm{log\_scale})

    A is strictly lower triangular, or zero. The diagonal is free on the log scale, so that an
    optimiser crosses orders of magnitude at one pace, and the rest is relative to it.

    :param loc: the location, shape ``(D,)``; gives the dtype and the device.
    :param scale: the standard deviation to start with.
    :param full_rank: whether there is an A. It starts at zero.

    Example::

        >>> layer = LocationScale(torch.zeros(3), 0.1, full_rank=True)
        >>> y, ladj = layer.call_and_ladj(torch.zeros(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    lower: Tensor | None

    def __init__(self, loc: Tensor, scale: float, *, full_rank: bool) -> None:
        super().__init__(cache_size=0)
        loc = loc.detach().clone()
        self.loc = nn.Parameter(loc)
        self.log_scale = nn.Parameter(torch.full_like(loc, math.log(scale)))
        # at D = 1 there is nothing off the diagonal, and a parameter that cannot act is none
        full_rank = full_rank and len(loc) > 1
        lower = nn.Parameter(loc.new_zeros(2 * loc.shape)) if full_rank else None
        self.register_parameter("lower", lower)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``y`` of shape ``(*, D)`` and the log-determinant of shape ``(*,)``."""
        mixed = x if self.lower is None else x + x @ self.lower.tril(-1).T
        return self.loc + self.log_scale.exp() * mixed, self._ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` of shape ``(*, D)`` and the log-determinant of the inverse, shape ``(*,)``."""
        x = (y - self.loc) * (-self.log_scale).exp()
        if self.lower is not None:
            rows = x.reshape(-1, x.shape[-1])
            # the routine takes the diagonal as ones, whatever is there
            rows = torch.linalg.solve_triangular(
                self.lower.T, rows, upper=True, left=False, unitriangular=True
            )
            x = rows.reshape(x.shape)
        return x, -self._ladj(y)

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``y``, the log-determinant and the score of y, of shapes ``(*, D)``, ``(*,)``, ``(*, D)``."""
        y, ladj = self.call_and_ladj(x)
        with torch.no_grad():
            if self.lower is not None:
                rows = torch.linalg.solve_triangular(
                    self.lower,
                    score.reshape(-1, score.shape[-1]),
                    upper=False,
                    left=False,
                    unitriangular=True,
                )
                score = rows.reshape(score.shape)
            return y, ladj, score * (-self.log_scale).exp()

    def set_(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Sets the location and the scale in place.

        :param loc: shape ``(D,)``.
        :param scale_tril: lower triangular with a positive diagonal, shape ``(D, D)``; diagonal
            where this layer is.
        :raises ValueError: if one of them is not so.
        """
        diagonal = self._check(loc, scale_tril)
        with torch.no_grad():
            self.loc.copy_(loc)
            self.log_scale.copy_(diagonal.log())
            if self.lower is not None:
                self.lower.copy_((scale_tril / diagonal[:, None]).tril(-1))

    def _check(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The diagonal of a valid scale."""
        size = len(self.loc)
        for name, value, shape in (("loc", loc, (size,)), ("scale_tril", scale_tril, (size, size))):
            if value.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers, got {value.tolist()}")
        diagonal = scale_tril.diagonal()
        if not (diagonal > 0).all() or scale_tril.triu(1).any():
            raise ValueError(
                "scale_tril: expected a lower-triangular matrix with a positive diagonal, "
                f"got {scale_tril.tolist()}"
            )
        if self.lower is None and scale_tril.tril(-1).any():
            raise ValueError(
                "scale_tril: expected a diagonal matrix, since the scale of this guide is diagonal "
                "(full_rank=True makes it triangular), got entries off the diagonal"
            )
        return diagonal

    def _ladj(self, like: Tensor) -> Tensor:
        return self.log_scale.sum().expand(like.shape[:-1])
