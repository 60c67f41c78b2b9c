# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The interfaces of univariate families and of the transforms that they return."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..._base.arguments import is_tracing

T = TypeVar("T")


class Derivatives(NamedTuple):
    """The value and log-slope at B points, and, without a graph, their derivatives for a score."""

    y: Tensor  # (B, D)
    ladj: Tensor  # (B, D)
    inverse_by_params: Tensor  # derivatives of x in the parameters at fixed y, (B, D, P)
    ladj_by_x: Tensor | None  # (B, D), None if zero
    ladj_by_params: Tensor | None  # (B, D, P), None if zero


def split_params(params: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Splits the parameters of a family, shape ``(*, D, P)``, into views of shapes ``(*, D, size)``.

    :raises ValueError: if the last dimension is not the sum of the sizes.
    """
    if is_tracing():  # TorchScript cannot differentiate a split
        ends = accumulate(sizes)
        return [params[..., end - size : end] for size, end in zip(sizes, ends)]
    if params.shape[-1:] != (sum(sizes),):
        raise ValueError(f"params: expected shape (*, D, {sum(sizes)}), got {tuple(params.shape)}")
    if params.dim() < 2:
        return params.split(list(sizes), -1)
    # The gradient of a split is one concatenation, that of n slices n tensors of zeros as large as
    # params. Splitting the next-to-last dimension matches the memory layout of conditioners.
    return [part.mT for part in params.mT.split(list(sizes), -2)]


class Bijection(Transform):
    """A bijection whose values come with log-determinants, without a cache that could be stale."""

    bijective = True
    sign = +1

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value, ``(*, D)``, and ``log |det dy/dx|``, ``(*,)``, or ``(*, D)`` if it is elementwise."""
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse and its log-determinant ``log |det dx/dy|``, in the shapes of :meth:`call_and_ladj`."""
        raise NotImplementedError

    def with_cache(self: T, cache_size: int = 1) -> T:
        """Returns itself, since nothing is cached."""
        return self

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |det dy/dx|`` at x; y is not used."""
        return self.call_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    # torch's methods use its cache, which compares only the identities of tensors
    __call__ = _call
    _inv_call = _inverse


class Inverse(Bijection):
    """A bijection with its two directions exchanged."""

    transform: Bijection

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        # x and y are known, so nothing is inverted
        return -self.transform.log_abs_det_jacobian(y, x)


class ElementwiseTransform(Bijection):
    """An increasing bijection of the real line, applied to each element.

    A subclass implements :meth:`call_and_ladj` and :meth:`inverse_and_ladj`. Nothing is cached between
    calls, so nothing can be stale.
    """

    domain = constraints.real
    codomain = constraints.real

    @property
    def inv(self) -> "ElementwiseTransform":
        """The inverse, which also has ``call_and_ladj``."""
        return InverseElementwiseTransform(self)


class InverseElementwiseTransform(Inverse, ElementwiseTransform):
    """The inverse of an elementwise transform."""

    transform: ElementwiseTransform

    def __init__(self, transform: ElementwiseTransform) -> None:
        super().__init__()
        self.transform = transform

    @property
    def inv(self) -> ElementwiseTransform:
        return self.transform


class Univariate(nn.Module):
    """A family of increasing bijections of the real line.

    A subclass sets :attr:`num_params` and implements :meth:`forward`. Contract: zero parameters give the
    identity; for any parameters, the map of the real line onto itself is strictly increasing, with a
    log-slope bounded by about 3.
    """

    #: The number P of parameters per coordinate.
    num_params: int
    #: Whether parameters of shape ``(D, P)`` give a transform of x of any shape ``(*, D)``.
    broadcasts: bool = False

    def forward(self, params: Tensor) -> Transform:
        """The transform with these parameters, of tensors of shape ``(*, D)``.

        :param params: unconstrained, shape ``(*, D, P)``.
        :raises ValueError: if the last dimension is not P.
        """
        raise NotImplementedError

    def derivatives(self, params: Tensor, x: Tensor) -> Derivatives | None:
        """Closed-form derivatives of the transform with these parameters at x, ``(B, D)``, if any."""
        return None
