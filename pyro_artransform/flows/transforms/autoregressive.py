# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The autoregressive transform, and the check that its meta is autoregressive."""

import copy
from collections.abc import Callable

import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Transform

from ..._base.arguments import (
    check_callable,
    check_integer,
    shown,
    values_can_be_read,
    warn_user,
)
from .conditioned import (
    AutoregressiveMeta,
    ContextMeta,
    Meta,
    check_returned,
    is_right_by_construction,
)
from .flow_module import ConditionalFlowModule, FlowModule, call_and_ladj_over_vectors
from .inversion import at_solution, invert, invert_with_score, score_by_substitution


class StructureCheck:
    """The check of a transform and of its conditioned copies, due at the first call."""

    is_due = True

    def fault(self, meta: Meta, x: Tensor) -> str:
        r"""Says which coordinates depend on themselves; empty if none does.

        The inverse iterates :math:`u \mapsto \mathrm{meta}(u)^{-1}(y)`; the transform is autoregressive, for
        some order of the coordinates, if the graph of this map's Jacobian has no cycle. The Jacobian is taken
        at a random point, and with redrawn parameters, since a last layer of zeros hides all dependencies.

        :param x: shape ``(*, D)``; its values are not used.
        """
        generator = torch.Generator().manual_seed(0)

        def normal(shape: torch.Size) -> Tensor:
            draw = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            return draw.to(dtype=x.dtype, device=x.device)

        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            if isinstance(meta, nn.Module):
                # a copy, since layers such as batch normalization change in training
                meta = copy.deepcopy(meta).eval()
                for p in meta.parameters():
                    fan_in = p[0].numel() if p.dim() > 1 else 4
                    p.data = (normal(p.shape) / max(fan_in, 1) ** 0.5).to(p)
            point = normal(torch.Size((1,) * (x.dim() - 1) + x.shape[-1:]))

            def image(u: Tensor) -> Tensor:
                transform = check_returned(meta(u))
                out = transform.inv(meta(point)(point)) if transform.event_dim else transform(point)
                return out.reshape(-1, out.shape[-1]).sum(0)

            size = torch.autograd.functional.jacobian(image, point).abs()
        size = size.reshape(x.shape[-1:] * 2)
        reach = (size > 1e3 * torch.finfo(size.dtype).eps * size.nan_to_num().max()).float()
        for _ in range(len(reach).bit_length()):
            reach = ((reach + reach @ reach) > 0).float()
        self.is_due = False
        nodes = reach.diagonal().nonzero().flatten().tolist()  # coordinates on a cycle
        if not nodes:
            return ""
        return (
            f"the meta is not autoregressive: the parameters of the coordinates {nodes} depend on these "
            "coordinates themselves, so the log-determinant and the inverse are wrong. Use "
            "pyro_artransform.flows.conditioners.MaskedMLP, or wrap the network in MaskedInput(net), which "
            "makes any network autoregressive"
        )


class AutoregressiveTransform(FlowModule):
    r"""Transforms each coordinate by a univariate transform that depends on the coordinates before it.

    .. math:: y_i = f(x_i \mid x_{<i})

    This direction takes one evaluation of the network; the inverse takes a few, since each coordinate needs
    those before it. Applied to a base distribution, the transform is an inverse autoregressive flow (cheap
    to sample, expensive to evaluate at given points), and ``t.inv`` a masked autoregressive flow.

    :param meta: a function that returns, for x of shape ``(*, D)``, a bijective torch transform, elementwise
        (event_dim 0) or of vectors (event_dim 1). A module is registered.
    :param passes: the maximum number of fixed-point passes of the inverse, which is exact if this is at least
        the depth of the dependency graph (D for a full graph, 2 for a coupling); ``None`` means exact.
    :param cache_size: as for :class:`~pyro_artransform.flows.transforms.FlowModule`.

    With Pyro's validation on, the first call differentiates a ``meta`` that is not autoregressive by
    construction, as a :class:`~pyro_artransform.flows.conditioners.MaskedMLP` is, and warns if it is not
    autoregressive. An inverse that did not converge warns with its residual.

    Example::

        >>> import torch
        >>> from pyro_artransform.flows.conditioners import MaskedMLP
        >>> from pyro_artransform.flows.transforms import ConditionedUnivariate
        >>> from pyro_artransform.flows.univariate import Affine
        >>> meta = ConditionedUnivariate(MaskedMLP(5, 2), Affine())
        >>> t = AutoregressiveTransform(meta)
        >>> y, ladj = t.call_and_ladj(torch.zeros(32, 5))
        >>> y.shape, ladj.shape
        (torch.Size([32, 5]), torch.Size([32]))
    """

    def __init__(self, meta: Meta, passes: int | None = None, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.meta = check_callable("meta", meta, "a callable of x")
        self.passes = None if passes is None else check_integer("passes", passes)
        #: None if the meta is autoregressive by construction, and needs no check
        self.structure = None if is_right_by_construction(meta) else StructureCheck()

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        meta = self.meta if self.structure is None else self._checked_meta(x)
        return call_and_ladj_over_vectors(check_returned(meta(x)), x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return invert(self._checked_meta(y), y, self.passes)

    def inverse_and_score(self, y: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = None
        if self.passes is None:
            found = invert_with_score(self._checked_meta(y), y, score)
        return super().inverse_and_score(y, score) if found is None else found

    def inverse_at(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return at_solution(self._checked_meta(x), x, y)

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        meta = self._checked_meta(x)
        found = None
        if isinstance(meta, AutoregressiveMeta) and not meta.batch_shape:
            found = score_by_substitution(meta, x, score.detach())
        return super().call_and_score(x, score) if found is None else found

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        batch = self.meta.batch_shape if isinstance(self.meta, AutoregressiveMeta) else ()
        return torch.broadcast_shapes(shape, (*batch, shape[-1])) if batch else shape

    inverse_shape = forward_shape

    def _checked_meta(self, x: Tensor) -> Meta:
        """The meta. If it needs a check, x is validated, and a fault is reported in one warning."""
        check = self.structure
        if check is None:
            return self.meta
        if x.dim() == 0 or not x.is_floating_point():
            raise ValueError(
                f"expected floating-point numbers of shape (*, D), got {x.dtype} of {tuple(x.shape)}"
            )
        is_due = check.is_due and is_validation_enabled()
        if not is_due or not values_can_be_read(x) or torch.is_inference_mode_enabled():
            return self.meta
        if fault := check.fault(self.meta, x):
            warn_user(f"AutoregressiveTransform: {fault}", UserWarning)
        return self.meta

    def extra_repr(self) -> str:
        return "" if self.passes is None else f"passes={self.passes}"


class ConditionalAutoregressiveTransform(ConditionalFlowModule):
    r"""An autoregressive transform whose univariate transforms also depend on a context.

    .. math:: y_i = f(x_i \mid x_{<i}, \mathrm{context})

    :param meta: a function ``meta(x, context)`` that returns a transform. A module is registered.
    :param passes: as for :class:`AutoregressiveTransform`.
    """

    def __init__(
        self, meta: Callable[[Tensor, Tensor], Transform], passes: int | None = None
    ) -> None:
        super().__init__()
        self.meta = check_callable("meta", meta, "a callable of x and a context")
        self.passes = None if passes is None else check_integer("passes", passes)
        self.structure = None if is_right_by_construction(meta) else StructureCheck()

    def condition(self, context: Tensor) -> AutoregressiveTransform:
        """The transform given a context ``(*, C)``, whose batch shape broadcasts with that of x."""
        if not isinstance(context, Tensor):
            raise ValueError(f"context: expected a tensor of shape (*, C), got {shown(context)}")
        conditioned = AutoregressiveTransform(ContextMeta(self.meta, context), self.passes)
        conditioned.structure = self.structure
        return conditioned
