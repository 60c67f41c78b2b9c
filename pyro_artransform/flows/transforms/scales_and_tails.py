# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Last layers of a flow: learnable locations and scales, and compressed tails."""

import math

import torch
from torch import Tensor, nn
from torch.linalg import solve_triangular

from ..._base.arguments import check_positive, shown
from .flow_module import FlowModule


class LocationScale(FlowModule):
    r"""A learnable location and lower-triangular scale.

    .. math:: y = \mathrm{loc} + \mathrm{diag}(s) (I + A) x, \qquad s = \exp(\mathrm{log\_scale})

    A is strictly lower triangular and starts at zero.

    :param loc: the initial location, shape ``(D,)``, which determines dtype and device.
    :param scale: the initial standard deviation, a positive number.
    :param full_rank: whether to include A.
    """

    lower: Tensor | None

    def __init__(self, loc: Tensor, scale: float, *, full_rank: bool) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone())
        log_scale = math.log(check_positive("scale", scale))
        self.log_scale = nn.Parameter(torch.full_like(loc, log_scale))
        # for D = 1 there are no off-diagonal entries, so A would have no effect
        lower = nn.Parameter(loc.new_zeros(2 * loc.shape)) if full_rank and len(loc) > 1 else None
        self.register_parameter("lower", lower)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed = x if self.lower is None else x + x @ self.lower.tril(-1).T
        ladj = self.log_scale.sum().expand(x.shape[:-1])
        return self.loc + self.log_scale.exp() * mixed, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = (y - self.loc) * (-self.log_scale).exp()
        if self.lower is not None:
            x = _solve_unitriangular(self.lower.T, x, upper=True)
        return x, -self.log_scale.sum().expand(y.shape[:-1])

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self.call_and_ladj(x)
        with torch.no_grad():
            if self.lower is not None:
                score = _solve_unitriangular(self.lower, score, upper=False)
            return y, ladj, score * (-self.log_scale).exp()

    def set_(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Sets the location, shape ``(D,)``, and the scale in place.

        :param scale_tril: lower triangular with a positive diagonal, shape ``(D, D)``, or only its diagonal,
            shape ``(D,)``; it must be diagonal if this layer is.
        """
        check_location_and_scale(loc, scale_tril, len(self.loc))
        is_matrix = scale_tril.dim() == 2
        diagonal = scale_tril.diagonal() if is_matrix else scale_tril
        if self.lower is None and is_matrix and scale_tril.tril(-1).any():
            raise ValueError(
                "scale_tril: expected a diagonal matrix (full_rank=True makes it triangular), got entries "
                "off the diagonal"
            )
        with torch.no_grad():
            self.loc.copy_(loc)
            self.log_scale.copy_(diagonal.log())
            if self.lower is not None and is_matrix:
                self.lower.copy_((scale_tril / diagonal[:, None]).tril(-1))
            elif self.lower is not None:
                self.lower.zero_()


def _solve_unitriangular(matrix: Tensor, x: Tensor, *, upper: bool) -> Tensor:
    # unitriangular: the diagonal is taken as ones
    options = {"upper": upper, "left": False, "unitriangular": True}
    return solve_triangular(matrix, x.reshape(-1, x.shape[-1]), **options).reshape(x.shape)


def check_location_and_scale(loc: Tensor, scale_tril: Tensor, dim: int) -> None:
    """Requires a location ``(D,)`` and a triangular scale ``(D, D)`` or its diagonal ``(D,)``."""
    is_vector = scale_tril.dim() == 1
    wanted = (dim,) if is_vector else (dim, dim)
    for name, value, shape in (("loc", loc, (dim,)), ("scale_tril", scale_tril, wanted)):
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got {shown(value.tolist())}")
    diagonal = scale_tril if is_vector else scale_tril.diagonal()
    if not (diagonal > 0).all() or (not is_vector and scale_tril.triu(1).any()):
        raise ValueError(
            "scale_tril: expected a lower-triangular matrix with a positive diagonal, "
            f"got {shown(scale_tril.tolist())}"
        )


class CompressedTails(FlowModule):
    r"""The identity up to a knot, with logarithmic growth beyond it.

    .. math:: y = \pm \left(c + w \operatorname{arsinh} \frac{|x| - c}{w}\right) \qquad |x| > c

    It is elementwise, has two continuous derivatives and no parameters. The knot c is 40, and over the width
    w = 2 the slope falls from 1 to :math:`1/\sqrt2`: 100 is mapped to 48, and 1,000 to 54.
    """

    knot, width = 40.0, 2.0

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner, excess = self._split(x)
        large = torch.finfo(x.dtype).max ** 0.4  # its square does not overflow
        bounded = excess.clamp(-large, large)
        ladj = -(0.5 * torch.log1p(bounded * bounded)).sum(-1)
        return torch.add(inner, excess.asinh(), alpha=self.width), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inner, excess = self._split(y)
        # so that the square of the result does not overflow
        large = 0.4 * math.log(torch.finfo(y.dtype).max)
        excess = excess.clamp(-large, large).sinh()
        ladj = (0.5 * torch.log1p(excess * excess)).sum(-1)
        return torch.add(inner, excess, alpha=self.width), ladj

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        large = torch.finfo(x.dtype).max ** 0.4
        excess = self._split(x.detach())[1].clamp(-large, large)
        square = 1 + excess * excess
        score = (score.detach() + excess / (self.width * square)) * square.sqrt()
        return *self.call_and_ladj(x), score

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The part up to the knot, and the excess beyond it in units of the width."""
        inner = x.clamp(-self.knot, self.knot)
        return inner, (x - inner) / self.width
