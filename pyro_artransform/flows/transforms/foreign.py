# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Any other transforms, such as those of torch, Pyro and Zuko, as a :class:`FlowModule`."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from .flow_module import FlowModule, call_and_ladj


@runtime_checkable
class DensityByTransform(Protocol):
    """A distribution whose values a transform maps to those of a base, as of a flow of Zuko."""

    transform: Transform
    base: Distribution


class ForeignTransform(FlowModule):
    """Wraps any other transform as a :class:`FlowModule`.

    Some transforms of Pyro have no inverse: their draws have densities with gradients, but the inverse
    raises a ``NotImplementedError``.

    :param source: a torch transform; or a module that, called without arguments, returns a transform or a
        :class:`DensityByTransform`, which is used in the direction of its draws.
    :raises TypeError: if it is neither.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source
        try:
            made = self._make_transform()
        except (TypeError, NotImplementedError) as error:  # as of a module that needs arguments
            raise TypeError(_wrong_source(source)) from error
        self.domain, self.codomain = made.domain, made.codomain
        self.bijective = made.bijective

    def _make_transform(self) -> Transform:
        """The transform, made by the source in each call if it is not the source itself."""
        made = self.source if isinstance(self.source, Transform) else self.source()
        made = made.transform.inv if isinstance(made, DensityByTransform) else made
        if not isinstance(made, Transform):
            raise TypeError(_wrong_source(self.source))
        return made

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return call_and_ladj(self._make_transform(), x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return call_and_ladj(self._make_transform().inv, y)
        except (KeyError, NotImplementedError) as error:  # Pyro's ways of saying so
            raise NotImplementedError(
                f"{type(self.source).__name__} has no inverse, so only the densities of its own draws are "
                "known. For those of other values use a flow with an inverse, such as an autoregressive one "
                "of affine layers or splines"
            ) from error

    def inverse_at(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.inverse_and_ladj(y)
        except NotImplementedError:
            # a step of Newton's method, which at a solution has the value and the gradients of the inverse
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                known, _ = self.call_and_ladj(point)
                slopes = [
                    torch.autograd.grad(known[..., i].sum(), point, retain_graph=True)[0]
                    for i in range(known.shape[-1])
                ]
            step = torch.linalg.solve(torch.stack(slopes, -2), (y - known)[..., None])[..., 0]
            new = x.detach() + step
            return new, -self.call_and_ladj(new)[1]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self._make_transform().forward_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self._make_transform().inverse_shape(shape)


def _wrong_source(source: object) -> str:
    kind = type(source).__name__
    if isinstance(source, nn.Module):
        kind = f"the module {kind}"
    return (
        "expected a transform, or a module that returns one when called without arguments, as Zuko's flows "
        f"do, got {kind}. If it needs a context, condition the flow first: flow.condition(context)"
    )


def as_flow(transform: Any) -> FlowModule:
    """A transform, or a module that makes one, as a :class:`FlowModule`."""
    return transform if isinstance(transform, FlowModule) else ForeignTransform(transform)
