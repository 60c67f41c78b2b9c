# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The base class of transforms of vectors, inverses, and a function that evaluates any torch transform."""

import copy
import weakref
from functools import partial
from typing import Any

import torch
from pyro.distributions import ConditionalTransformModule, constraints
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import ComposeTransform, Transform
from torch.distributions.transforms import _InverseTransform

from ..univariate.base import Bijection, Inverse


class FlowModule(Bijection, TransformModule):
    r"""A bijection of real vectors that registers its parameters.

    A subclass implements :meth:`call_and_ladj` and :meth:`inverse_and_ladj`.

    Nothing is cached between calls, so nothing can be stale, and threads may share a transform. To score a
    draw without inverting, keep what :meth:`call_and_ladj` returns.

    :param cache_size: 0 or 1, for torch's interface; it has no effect.
    """

    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector
    #: A weak reference to the inverse, so that there is no reference cycle.
    _inv: Any

    def inverse_at(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`inverse_and_ladj` if x, whose graph is ignored, is known, so that nothing is inverted."""
        return self.inverse_and_ladj(y)

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""The value, the log-determinant, and the score (gradient of the log density) at the value.

        If x has density p, ``y = T(x)`` has the density q with

        .. math:: \nabla_y \log q(y) = J^{-\top} (\nabla_x \log p(x) - \nabla_x \log |\det J|)

        with parameters held fixed. With this score, the gradient of an ELBO flows through draws only.

        :param score: the score of the density of x, shape ``(*, D)``.
        :return: the values of :meth:`call_and_ladj`, with their graph, and the score, ``(*, D)``, without.

        **References**

        1. Gradients should stay on Path: Better Estimators of the Reverse- and Forward KL Divergence
           for Normalizing Flows (Vaitl, Nicoli, Nakajima, Kessel, 2022),
           https://arxiv.org/abs/2207.08219
        """
        y, ladj = self.call_and_ladj(x)
        return y, ladj, _score_at(y, partial(self.inverse_at, x.detach()), score)

    def inverse_and_score(self, y: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`call_and_score` of the inverse: x, its log-determinant, and the score at x."""
        x, ladj = self.inverse_and_ladj(y)
        return x, ladj, _score_at(x, self.call_and_ladj, score)

    @property
    def inv(self) -> "FlowModule":
        """The inverse, a module with this one as its submodule; ``t.inv.inv is t``."""
        inverse = None if self._inv is None else self._inv()
        if inverse is None:
            inverse = InverseTransformModule(self)
            self._inv = weakref.ref(inverse)
        return inverse

    def __deepcopy__(self, memo: dict[int, Any]) -> "FlowModule":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy({**vars(self), "_inv": None}, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # as in Pyro's modules: the param store adds weak references to parameters, which cannot be pickled
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return {**vars(self), "_inv": None}

    # shows the tree of submodules
    __repr__ = torch.nn.Module.__repr__


def _score_at(y: Tensor, inverse: Any, score: Tensor) -> Tensor:
    """The score at y, given the score at its inverse."""
    with torch.enable_grad():
        point = y.detach().requires_grad_()
        x, ladj = inverse(point)
        log_prob = (x * score.detach()).sum() + ladj.sum()
        return torch.autograd.grad(log_prob, point)[0]


class InverseTransformModule(Inverse, FlowModule):
    """The inverse of a transform, which it has as submodule ``transform``."""

    transform: FlowModule

    def __init__(self, transform: FlowModule) -> None:
        super().__init__()
        self.transform = transform
        self.domain, self.codomain = transform.codomain, transform.domain
        self.sign = transform.sign

    @property
    def inv(self) -> FlowModule:
        inverse = self.transform._inv
        if inverse is None or inverse() is None:
            self.transform._inv = weakref.ref(self)
        return self.transform

    def call_and_score(self, y: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.transform.inverse_and_score(y, score)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.transform.forward_shape(shape)


class ConditionalFlowModule(ConditionalTransformModule):
    """The base class of conditional transforms; a subclass implements ``condition``."""

    domain = FlowModule.domain
    codomain = FlowModule.codomain
    bijective = True
    event_dim = 1

    def forward(self, *_: object) -> None:
        raise TypeError("a conditional transform has no value by itself: call .condition(context)")


def call_and_ladj(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """``y`` and ``log |dy/dx|``, summed over event dimensions, of any torch transform."""
    if not isinstance(transform, Bijection):
        _clear_caches(transform)
    together: Any = getattr(transform, "call_and_ladj", None)  # Zuko's have it, too
    if together is None:
        y = transform(x)
        ladj = transform.log_abs_det_jacobian(x, y)
    else:
        y, ladj = together(x)
    return y, ladj.expand(y.shape[: y.dim() - transform.codomain.event_dim])


def _clear_caches(transform: Any) -> None:
    """Torch's cache compares only identities, so it would return stale values after an optimizer step."""
    cached: Any = transform.inv if isinstance(transform, _InverseTransform) else transform
    cached.clear_cache()  # added by Pyro
    for part in cached.parts if isinstance(cached, ComposeTransform) else ():
        _clear_caches(part)


def call_and_ladj_over_vectors(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`call_and_ladj`; log-determinants of an elementwise transform are summed."""
    y, ladj = call_and_ladj(transform, x)
    return y, ladj if transform.codomain.event_dim else ladj.sum(-1)
