# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The units of data: a fixed location and scale after a flow, and before the context of a conditional one."""

import torch
from pyro.distributions import ConditionalTransformModule
from torch import Tensor

from ..moments import check_rows, location_and_scale
from .flow_module import ConditionalFlowModule, FlowModule


class Standardize(FlowModule):
    r"""The way from standardized values to data, as the last layer of a flow.

    .. math::

        y = \mathrm{loc} + L x

    It has no parameters to train: ``loc`` and ``scale_tril`` are buffers, which files hold.
    :func:`standardize` takes them from data.

    :param loc: shape ``(D,)``.
    :param scale_tril: L, lower triangular with a positive diagonal, shape ``(D, D)``, or its diagonal
        alone, shape ``(D,)``.
    :param cache_size: as for :class:`FlowModule`.
    :raises ValueError: if one of them has another shape or is not so.

    Example::

        >>> import torch
        >>> Standardize(torch.tensor([10.0]), torch.tensor([2.0]))(torch.tensor([[0.0], [1.0]]))
        tensor([[10.],
                [12.]])
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        _check(loc, scale_tril)
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale_tril", scale_tril.detach().clone())

    def extra_repr(self) -> str:
        return f"dim={len(self.loc)}, full_rank={self.scale_tril.dim() == 2}"

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scale_tril
        moved = x * scale if scale.dim() == 1 else x @ scale.T
        return self.loc + moved, self._log_volume().expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        away, ladj = y - self.loc, -self._log_volume().expand(y.shape[:-1])
        if self.scale_tril.dim() == 1:
            return away / self.scale_tril, ladj
        rows = away.reshape(-1, away.shape[-1]).T
        x = torch.linalg.solve_triangular(self.scale_tril, rows, upper=False)
        return x.T.reshape(y.shape), ladj

    def _log_volume(self) -> Tensor:
        scale = self.scale_tril
        return (scale if scale.dim() == 1 else scale.diagonal()).log().sum()


class StandardizedContext(ConditionalFlowModule):
    """A conditional transform whose context is standardized first, see :func:`standardize_context`.

    :param transform: a conditional transform that is a module.
    :param loc: what is subtracted from a context, shape ``(C,)``.
    :param scale: what it is then divided by, shape ``(C,)``, positive.
    :raises TypeError: if the transform is none.
    :raises ValueError: if a shape is wrong, or a scale not positive.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, transform: ConditionalTransformModule, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        offered: object = transform
        if not isinstance(offered, ConditionalTransformModule):
            got = type(transform).__name__
            raise TypeError(f"transform: expected a conditional transform, got {got}")
        _check(loc, scale)
        self.transform = transform
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def condition(self, context: Tensor) -> FlowModule:
        """The transform for a context in the units of the data, of shape ``(*, C)``."""
        conditioned: FlowModule = self.transform.condition((context - self.loc) / self.scale)
        return conditioned


def standardize(data: Tensor, *, full_rank: bool | None = None) -> Standardize:
    """A last layer that gives a flow the location, the scale and the correlations of data.

    :param data: shape ``(n, D)``.
    :param full_rank: whether it has the correlations too; by default up to 200 coordinates, where there
        are ten rows or more for each.
    :raises ValueError: if the shape is another, there are fewer than two rows, a value is not finite,
        a coordinate is constant, or a linear function of others where there are correlations.

    Example::

        >>> import torch
        >>> from pyro_artransform import maf
        >>> from pyro_artransform.transforms import chain, standardize
        >>> flow = chain([maf(3), standardize(1000 + torch.randn(50, 3))])
        >>> flow(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    return Standardize(*location_and_scale("data", check_rows("data", data), full_rank))


def standardize_context(
    transform: ConditionalTransformModule, contexts: Tensor
) -> StandardizedContext:
    """A conditional transform that takes contexts in their own units: its networks see standardized ones.

    :param transform: a conditional transform, such as :func:`~pyro_artransform.conditional_maf` makes.
    :param contexts: those of the training data, shape ``(n, C)``; a constant coordinate stays as it is
        but for its location.
    :raises TypeError: if the transform is none.
    :raises ValueError: if the shape is another, there are fewer than two rows, or a value is not finite.

    Example::

        >>> import torch
        >>> from pyro_artransform import conditional_maf
        >>> from pyro_artransform.transforms import standardize_context
        >>> contexts = 1000 + torch.randn(50, 2)
        >>> flow = standardize_context(conditional_maf(3, context_dim=2), contexts)
        >>> flow.condition(contexts)(torch.zeros(50, 3)).shape
        torch.Size([50, 3])
    """
    contexts = check_rows("contexts", contexts)
    scale = contexts.std(0)
    return StandardizedContext(
        transform, contexts.mean(0), torch.where(scale > 0, scale, torch.ones_like(scale))
    )


def _check(loc: Tensor, scale: Tensor) -> None:
    """Checks a location and a scale, triangular or diagonal."""
    dim = loc.shape[-1] if loc.dim() else 0
    if loc.dim() != 1 or scale.shape not in (loc.shape, (dim, dim)):
        got = f"{tuple(loc.shape)} and {tuple(scale.shape)}"
        raise ValueError(f"loc and scale: expected shapes (D,) and (D,) or (D, D), got {got}")
    diagonal = scale if scale.dim() == 1 else scale.diagonal()
    is_triangular = scale.dim() == 1 or not scale.triu(1).any()
    if not (is_triangular and loc.isfinite().all() and scale.isfinite().all()):
        raise ValueError("loc and scale: expected finite numbers, a matrix lower triangular")
    if not (diagonal > 0).all():
        raise ValueError(f"scale: expected a positive diagonal, got {diagonal.tolist()}")
