# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A linear layer with a mask."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class MaskedLinear(torch.nn.Linear):
    r"""A linear layer whose weight is masked whenever it is evaluated.

    .. math::

        y = (M \odot W) x + b

    Overwriting the weight, by whatever means, leaves masked connections cut.

    :param in_features: the number of inputs.
    :param out_features: the number of outputs.
    :param mask: zeros and ones, shape ``(out_features, in_features)``, a tensor or lists; kept as a
        buffer of the weight's dtype, since the product of two float tensors is many times faster than
        that of a float and a boolean one.
    :param bias: whether to add a bias.
    :raises ValueError: if the mask has another shape.

    Example::

        >>> import torch
        >>> layer = MaskedLinear(3, 2, torch.tensor([[1, 0, 0], [1, 1, 0]]))
        >>> layer(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Tensor | Sequence[Sequence[int]],
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        mask = torch.as_tensor(mask, device=self.weight.device)
        if mask.shape != self.weight.shape:
            raise ValueError(
                f"mask: expected shape {tuple(self.weight.shape)} (out_features, in_features), "
                f"got {tuple(mask.shape)}"
            )
        self.register_buffer("mask", mask.to(self.weight))

    def masked_weight(self) -> Tensor:
        """The weight as it acts, shape ``(out_features, in_features)``."""
        return self.weight * self.mask

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer.

        :param input: shape ``(*, in_features)``.
        :return: shape ``(*, out_features)``.
        """
        return F.linear(input, self.masked_weight(), self.bias)
