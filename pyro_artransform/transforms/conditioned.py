# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The meta that is made of a conditioner and a univariate family."""

import torch
from torch import Tensor
from torch.distributions import Transform

from ..conditioners import Blocks, Conditioner
from ..univariate import Univariate
from .dependencies import by_construction


class ConditionedUnivariate(torch.nn.Module):
    r"""Conditioner, then univariate family: the ``meta`` of an autoregressive transform.

    .. math::

        x \mapsto f(\cdot; \theta(x)), \qquad \theta_i = c_i(x_{<i}, \mathrm{context})

    :param conditioner: a module that returns parameters of shape ``(*, D, P)``.
    :param univariate: the family that turns them into a transform.
    :raises TypeError: if one of the two is something else.
    :raises ValueError: if the two disagree on the number P of parameters.

    Example::

        >>> import torch
        >>> from pyro_artransform.conditioners import MaskedMLP
        >>> from pyro_artransform.univariate import Affine
        >>> meta = ConditionedUnivariate(MaskedMLP(3, Affine().num_params), Affine())
        >>> meta(torch.zeros(5, 3))(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    #: What the parameters broadcast to besides x: nothing, without a context.
    batch_shape = torch.Size()

    def __init__(self, conditioner: Conditioner, univariate: Univariate) -> None:
        super().__init__()
        for value, kind in ((conditioner, Conditioner), (univariate, Univariate)):
            if not isinstance(value, kind):
                raise TypeError(f"expected a {kind.__name__}, got {type(value).__name__}")
        num_params = conditioner.num_params
        if num_params not in (None, univariate.num_params):
            raise ValueError(
                f"expected a conditioner with {univariate.num_params} parameters for each coordinate, "
                f"as {type(univariate).__name__} takes, got {num_params}"
            )
        self.conditioner = conditioner
        self.univariate = univariate

    @property
    def autoregressive(self) -> bool:
        """Whether the conditioner is autoregressive by construction."""
        return by_construction(self.conditioner)

    @property
    def depth(self) -> int | None:
        """The depth of the conditioner's graph, None if it does not say."""
        return self.conditioner.depth

    def blocks(
        self, y: Tensor, context: Tensor | None = None, *, in_place: bool = False
    ) -> Blocks | None:
        """The conditioner as it is evaluated block by block, None if it cannot be.

        :param y: shape ``(*, D)``, its batch shape that of the result.
        :param context: shape ``(*, C)``.
        :param in_place: see :meth:`~pyro_artransform.conditioners.Conditioner.blocks`.
        """
        # a subclass or a hook may do more than the two parts say
        changed = type(self).forward is not ConditionedUnivariate.forward
        if changed or any(
            m._forward_hooks or m._forward_pre_hooks for m in (self, self.univariate)
        ):
            return None
        rows = y.reshape(-1, y.shape[-1])
        if context is not None and context.dim() > 1:
            context = context.expand(y.shape[:-1] + context.shape[-1:]).flatten(0, -2)
        return self.conditioner.blocks(rows, context, in_place=in_place)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Transform:
        """The transform for a given x.

        :param x: shape ``(*, D)``.
        :param context: shape ``(*, C)``.
        :return: an elementwise transform on ``(*, D)``.
        """
        params = self.conditioner(x) if context is None else self.conditioner(x, context)
        return self.univariate(params)
