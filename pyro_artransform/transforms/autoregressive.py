# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The autoregressive transform, and its conditional form."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import ConditionalTransformModule, is_validation_enabled
from torch import Tensor
from torch.distributions import Transform

from .dependencies import StructureCheck, by_construction, describe
from .evaluate import as_transform, call_and_ladj, sum_ladj, values_are_readable
from .flow_module import FlowModule
from .inversion import at_solution, invert
from .score import score_by_products
from .warn import warn_user


class AutoregressiveTransform(FlowModule):
    r"""Transforms each coordinate by a law that depends on the coordinates before it.

    .. math::

        y_i = f(x_i \mid x_{<i})

    The Jacobian is triangular, so its log-determinant is a sum. This direction costs one evaluation
    of the network; the inverse costs a few, since each coordinate needs those before it.

    As the transform of a base distribution it is an inverse autoregressive flow: cheap to sample,
    dear to evaluate at given points. Its inverse, ``t.inv``, is a masked autoregressive flow: the
    other way round.

    :param meta: a function that returns, given x of shape ``(*, D)``, a bijective torch transform
        for that x, elementwise (event_dim 0) or of vectors (event_dim 1). A module is registered.
    :param passes: the largest number of fixed-point passes of the inverse, which is exact after as
        many as the dependency graph is deep (D for a full graph, 2 for a coupling); ``None`` means exact.
    :param cache_size: 1 to remember the last pair, 0 not to; see
        :class:`~pyro_artransform.transforms.flow_module.FlowModule`.
    :raises TypeError: if ``meta`` cannot be called.
    :raises ValueError: if ``passes`` is not a positive integer.

    With Pyro's validation on, the first call checks by differentiation that a ``meta`` from elsewhere
    is autoregressive, and warns if not. An inverse that did not converge warns with its residual.

    Example::

        >>> import torch
        >>> from pyro_artransform.conditioners import MaskedMLP
        >>> from pyro_artransform.transforms import ConditionedUnivariate
        >>> from pyro_artransform.univariate import Affine
        >>> t = AutoregressiveTransform(ConditionedUnivariate(MaskedMLP(5, 2), Affine()))
        >>> y, ladj = t.call_and_ladj(torch.zeros(32, 5))
        >>> y.shape, ladj.shape
        (torch.Size([32, 5]), torch.Size([32]))

    **References**

    1. Improved Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans, Jozefowicz,
       Chen, Sutskever, Welling, 2016), https://arxiv.org/abs/1606.04934
    2. Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017),
       https://arxiv.org/abs/1705.07057
    """

    def __init__(
        self,
        meta: Callable[[Tensor], Transform],
        passes: int | None = None,
        *,
        cache_size: int = 1,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.meta = _check_meta(meta)
        self.passes = _check_passes(passes)
        self.structure = StructureCheck()

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        transform = as_transform(self.meta(x))
        y, ladj = call_and_ladj(transform, x)
        return y, sum_ladj(ladj, y, transform.event_dim, 1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check(y)
        return invert(self.meta, y, self.passes)

    def inverse_at(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        return at_solution(self.meta, x, y)

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check(x)
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            transform = as_transform(self.meta(point))
            y, ladj = call_and_ladj(transform, point)
        if transform.event_dim > 0 or ladj.shape != y.shape or y.shape != x.shape:
            return super().call_and_score(x, score)
        depth = getattr(self.meta, "depth", None) or x.shape[-1]
        score = score_by_products(point, y, ladj, score.detach(), depth)
        return y, ladj.sum(-1), score

    def _check(self, x: Tensor) -> None:
        if x.dim() == 0 or not x.is_floating_point():
            raise ValueError(
                f"expected floating-point numbers of shape (*, D), got {x.dtype} of {tuple(x.shape)}"
            )
        self._check_batch(x)
        if not self.structure.is_due() or not is_validation_enabled():
            return
        if not values_are_readable(x) or torch.is_inference_mode_enabled():
            return
        if faults := self.structure.faults(self.meta, x):
            warn_user(f"AutoregressiveTransform: {describe(faults)}", UserWarning)

    def _check_batch(self, x: Tensor) -> None:
        batch = getattr(self.meta, "batch_shape", ())
        if not batch or torch.jit.is_tracing():
            return
        if any(a != b and 1 not in (a, b) for a, b in zip(batch[::-1], x.shape[-2::-1])):
            raise ValueError(
                f"expected batch shapes of the context and of x that broadcast, got {tuple(batch)} "
                f"and {tuple(x.shape[:-1])}"
            )

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of y for an x of the given shape: the context's batch shape broadcasts."""
        batch = getattr(self.meta, "batch_shape", ())
        return torch.broadcast_shapes(shape, (*batch, shape[-1]))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of x for a y of the given shape: the context's batch shape broadcasts."""
        return self.forward_shape(shape)

    def extra_repr(self) -> str:
        return f"passes={self.passes}"


class ContextMeta(torch.nn.Module):
    """A meta of x and a context, for one context.

    :param meta: a function of x and a context; a module is registered.
    :param context: shape ``(*, C)``.
    """

    def __init__(self, meta: Callable[[Tensor, Tensor], Transform], context: Tensor) -> None:
        super().__init__()
        self.meta = meta
        self.context = context

    @property
    def autoregressive(self) -> bool:
        """Whether the meta is autoregressive by construction."""
        return by_construction(self.meta)

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of the context."""
        return self.context.shape[:-1]

    def __getattr__(self, name: str) -> Any:
        if name in ("depth", "univariate"):
            return getattr(self.meta, name)
        return super().__getattr__(name)

    def blocks(self, y: Tensor, *, in_place: bool = False) -> Any:
        """The conditioner as it is evaluated block by block, None if it cannot be."""
        offer = getattr(self.meta, "blocks", None)
        return None if offer is None else offer(y, self.context, in_place=in_place)

    def forward(self, x: Tensor) -> Transform:
        """The transform for a given x."""
        return self.meta(x, self.context)


class ConditionalAutoregressiveTransform(ConditionalTransformModule):
    r"""An autoregressive transform whose laws depend on a context too.

    .. math::

        y_i = f(x_i \mid x_{<i}, \mathrm{context})

    :param meta: a function ``meta(x, context)`` that returns a transform. A module is registered.
    :param passes: as for :class:`AutoregressiveTransform`.
    :raises TypeError: if ``meta`` cannot be called.
    :raises ValueError: if ``passes`` is not a positive integer.

    Example::

        >>> import torch
        >>> from pyro_artransform import conditional_affine_autoregressive
        >>> t = conditional_affine_autoregressive(3, context_dim=2)
        >>> t.condition(torch.zeros(5, 2))(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    domain = FlowModule.domain
    codomain = FlowModule.codomain
    bijective = True
    event_dim = 1

    def __init__(
        self, meta: Callable[[Tensor, Tensor], Transform], passes: int | None = None
    ) -> None:
        super().__init__()
        self.meta = _check_meta(meta)
        self.passes = _check_passes(passes)
        self.structure = StructureCheck()

    def forward(self, *_: Any) -> None:
        """Says what to call."""
        raise TypeError("a conditional transform has no value by itself: call .condition(context)")

    def condition(self, context: Tensor) -> AutoregressiveTransform:
        """The transform for one context.

        :param context: shape ``(*, C)``; its batch shape broadcasts with that of x.
        """
        if not isinstance(context, Tensor):
            raise ValueError(f"context: expected a tensor of shape (*, C), got {context!r}")
        conditioned = AutoregressiveTransform(ContextMeta(self.meta, context), self.passes)
        conditioned.structure = self.structure
        return conditioned

    def clear_cache(self) -> None:
        """Does nothing: each conditioned transform has its own memory."""


def check_structure(module: torch.nn.Module, x: Tensor) -> None:
    """Checks every autoregressive transform in a module by differentiation.

    :param module: a transform or whatever contains some.
    :param x: an argument that they are used with, shape ``(*, D)``.
    :raises ValueError: if one of them is not autoregressive; the message names the coordinates.
    """
    for part in module.modules():
        if not isinstance(part, AutoregressiveTransform):
            continue
        if faults := part.structure.faults(part.meta, x):
            raise ValueError(describe(faults))


def _check_meta(meta: Any) -> Any:
    if not callable(meta):
        raise TypeError(f"meta: expected a callable of x, got {type(meta).__name__}")
    return meta


def _check_passes(passes: int | None) -> int | None:
    if passes is not None and (
        not isinstance(passes, int) or isinstance(passes, bool) or passes < 1
    ):
        raise ValueError(f"passes: expected None or an integer of at least 1, got {passes!r}")
    return passes
