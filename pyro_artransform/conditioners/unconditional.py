# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The conditioner that reads nothing."""

import torch
from torch import Tensor, nn

from .arguments import check_size
from .base import Conditioner


class Unconditional(Conditioner):
    """Parameters of each coordinate that are the same for every x: a law for each marginal.

    :param input_dim: the number D of coordinates.
    :param num_params: the number P of parameters of each coordinate.
    :raises ValueError: for a size that is not positive.

    Example::

        >>> Unconditional(3, 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 3, 2])
    """

    autoregressive = True
    num_params: int
    #: One pass inverts exactly.
    depth = 1

    def __init__(self, input_dim: int, num_params: int) -> None:
        super().__init__()
        self.input_dim = check_size("input_dim", input_dim, 1)
        self.num_params = check_size("num_params", num_params, 1)
        # a layer of PyTorch knows where new parameters go, and of what dtype they are
        self.params = nn.Parameter(nn.Linear(num_params, input_dim, bias=False).weight.detach())
        nn.init.zeros_(self.params)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the parameters.

        :param x: shape ``(*, D)``.
        :param context: not read.
        :return: shape ``(*, D, P)``.
        :raises ValueError: if ``x`` has another size.
        """
        if not torch.jit.is_tracing() and (x.dim() == 0 or x.shape[-1] != self.input_dim):
            raise ValueError(f"x: expected shape (*, {self.input_dim}), got {tuple(x.shape)}")
        return self.params.expand(x.shape + (self.num_params,))

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, num_params={self.num_params}"
