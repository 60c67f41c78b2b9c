# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The ends of a flow: locations and scales, learnable or taken from data, and compressed tails."""

import math
from typing import Any

import torch
from pyro.distributions import ConditionalTransformModule
from torch import Tensor, nn
from torch.linalg import solve_triangular

from ..arguments import to_tensor
from .flow_module import ConditionalFlowModule, FlowModule


class LocationScale(FlowModule):
    r"""A learnable location and lower-triangular scale.

    .. math:: y = \mathrm{loc} + \mathrm{diag}(s) (I + A) x, \qquad s = \exp(\mathrm{log\_scale})

    A is strictly lower triangular and starts at zero.

    :param loc: the location, shape ``(D,)``; gives the dtype and the device.
    :param scale: the standard deviation to start with.
    :param full_rank: whether there is an A.
    """

    lower: Tensor | None

    def __init__(self, loc: Tensor, scale: float, *, full_rank: bool) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(torch.full_like(loc, math.log(scale)))
        # at D = 1 nothing is off the diagonal, and a parameter without effect is left out
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

        :param scale_tril: lower triangular with a positive diagonal, shape ``(D, D)``, or its diagonal
            alone, shape ``(D,)``; diagonal where this layer is.
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
    # the routine takes the diagonal as ones, whatever is there
    options = {"upper": upper, "left": False, "unitriangular": True}
    return solve_triangular(matrix, x.reshape(-1, x.shape[-1]), **options).reshape(x.shape)


class Standardize(FlowModule):
    r"""The way from standardized values to data, as the last layer of a flow.

    .. math:: y = \mathrm{loc} + L x

    It has no parameters to train: ``loc`` and ``scale_tril`` are buffers, saved with the state.
    :func:`standardize` takes them from data.

    :param loc: as for :meth:`LocationScale.set_`, like ``scale_tril``, which is L, and the errors.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__()
        check_location_and_scale(loc, scale_tril)
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale_tril", scale_tril.detach().clone())

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scale_tril
        moved = x * scale if scale.dim() == 1 else x @ scale.T
        return self.loc + moved, self._log_volume().expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        away, ladj = y - self.loc, -self._log_volume().expand(y.shape[:-1])
        if self.scale_tril.dim() == 1:
            return away / self.scale_tril, ladj
        rows = away.reshape(-1, away.shape[-1]).T
        return solve_triangular(self.scale_tril, rows, upper=False).T.reshape(y.shape), ladj

    def _log_volume(self) -> Tensor:
        scale = self.scale_tril
        return (scale if scale.dim() == 1 else scale.diagonal()).log().sum()


class StandardizedContext(ConditionalFlowModule):
    """A conditional transform of a context that is shifted and divided first, by shapes ``(C,)``."""

    loc: Tensor
    scale: Tensor

    def __init__(self, transform: ConditionalTransformModule, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.transform = transform
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    def condition(self, context: Tensor) -> FlowModule:
        """The transform for a context in the units of the data, of shape ``(*, C)``."""
        return self.transform.condition((context - self.loc) / self.scale)


def standardize(data: Tensor, *, full_rank: bool | None = None) -> Standardize:
    """A last layer that gives a flow the location, the scale and the correlations of data.

    :param data: shape ``(n, D)``.
    :param full_rank: whether it has the correlations too; by default up to 200 coordinates, where there
        are ten rows or more for each.
    :raises ValueError: if the shape is another, there are fewer than two rows, a value is not finite,
        a coordinate is constant, or a linear function of others where there are correlations.

    Example::

        >>> from pyro_artransform import maf
        >>> from pyro_artransform.transforms import chain
        >>> flow = chain([maf(3), standardize(1000 + torch.randn(50, 3))])
        >>> flow(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    return Standardize(*location_and_scale("data", check_rows("data", data), full_rank))


def standardize_context(
    transform: ConditionalTransformModule, contexts: Tensor
) -> ConditionalTransformModule:
    """A conditional transform that takes contexts in their own units: its networks see standardized ones.

    :param contexts: those of the training data, shape ``(n, C)``; a constant coordinate is shifted and
        not scaled. There have to be two rows or more, and all values finite.
    """
    contexts = check_rows("contexts", contexts)
    scale = contexts.std(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return StandardizedContext(transform, contexts.mean(0), scale)


def check_location_and_scale(loc: Tensor, scale_tril: Tensor, dim: int | None = None) -> None:
    """Refuses what is not a location ``(D,)`` and a triangular scale ``(D, D)`` or its diagonal ``(D,)``."""
    dim = loc.numel() if dim is None else dim
    is_vector = scale_tril.dim() == 1
    wanted = (dim,) if is_vector else (dim, dim)
    for name, value, shape in (("loc", loc, (dim,)), ("scale_tril", scale_tril, wanted)):
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got {value.tolist()}")
    diagonal = scale_tril if is_vector else scale_tril.diagonal()
    if not (diagonal > 0).all() or (not is_vector and scale_tril.triu(1).any()):
        raise ValueError(
            "scale_tril: expected a lower-triangular matrix with a positive diagonal, "
            f"got {scale_tril.tolist()}"
        )


def check_rows(name: str, rows: Any) -> Tensor:
    """Two or more rows of finite numbers, shape ``(n, D)``, from a tensor, array or list; without a graph."""
    rows = to_tensor(name, rows, torch.empty(0, device="cpu", dtype=torch.get_default_dtype()))
    if rows.dim() != 2 or len(rows) < 2 or not rows.shape[-1]:
        got = tuple(rows.shape)
        raise ValueError(f"{name}: expected shape (n, D) with two rows or more, got {got}")
    if count := int((~rows.isfinite()).any(-1).sum()):
        raise ValueError(
            f"{name}: expected finite numbers, got others in {count} of {len(rows)} rows"
        )
    return rows.detach()


def location_and_scale(
    name: str, rows: Tensor, full_rank: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The means of rows and the Cholesky factor of their covariance, or their standard deviations.

    Other parameters and the errors are those of :func:`standardize`.

    :return: shapes ``(D,)`` and ``(D, D)``, or ``(D,)`` and ``(D,)``.
    """
    loc, scale = rows.mean(0), rows.std(0)
    if constant := (~(scale > 0)).nonzero().flatten().tolist():
        raise ValueError(f"{name}: expected coordinates that vary, got constant ones: {constant}")
    if full_rank is None:
        full_rank = rows.shape[1] <= 200 and len(rows) >= 10 * rows.shape[1]
    if not full_rank:
        return loc, scale
    # in units of each coordinate: the covariance of raw numbers may have lost all digits
    correlations = ((rows - loc) / scale).double().T.cov().reshape(2 * scale.shape)
    factor, failed = torch.linalg.cholesky_ex(correlations)
    if failed:
        raise ValueError(
            f"{name}: expected coordinates none of which is a linear function of others, got such "
            "ones, which have no density: leave one out"
        )
    return loc, scale[:, None] * factor.to(scale.dtype)


class CompressedTails(FlowModule):
    r"""The identity up to a knot, and beyond it a distance that grows like a logarithm.

    .. math:: y = \pm \left(c + w \operatorname{arsinh} \frac{|x| - c}{w}\right) \qquad |x| > c

    It acts on each coordinate, has two continuous derivatives, and no parameters. The knot c is 40, and
    over the distance w = 2 the slope falls from 1 to :math:`1/\sqrt2`: 100 goes to 48 and 1,000 to 54.
    """

    knot, width = 40.0, 2.0

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner, excess = self._split(x)
        large = torch.finfo(x.dtype).max ** 0.4  # whose square does not overflow
        bounded = excess.clamp(-large, large)
        ladj = -(0.5 * torch.log1p(bounded * bounded)).sum(-1)
        return torch.add(inner, excess.asinh(), alpha=self.width), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inner, excess = self._split(y)
        # so that the square of what comes out does not overflow
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
