# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What can be fitted to draws: a guide, a transformed distribution, and one that is conditional."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyro.distributions as dist
import torch
from pyro.distributions import ConditionalTransformedDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import Distribution, TransformedDistribution

from ...joint.protocols import StructuredGuide, UnconstrainingGuide
from ...transforms.flow_module import call_and_ladj_over_vectors
from ...transforms.location_scale import check_rows, location_and_scale

_WANTED = (
    "density: expected a guide of this package that has one vector of all latents, such as AutoMAF, or a "
    "FlowDistribution, TransformedDistribution or ConditionalTransformedDistribution, got {}"
)
_CHUNK = 4096


class Rows(NamedTuple):
    """Draws, a row for each.

    :param values: shape ``(n, D)``.
    :param context: shape ``(n, C)``, or ``None``.
    :param offset: what is added to the log-density of each, shape ``(n,)``.
    """

    values: Tensor
    context: Tensor | None
    offset: Tensor

    def take(self, index: Tensor | slice) -> "Rows":
        """The rows at an index."""
        context = None if self.context is None else self.context[index]
        return Rows(self.values[index], context, self.offset[index])


class Density(Protocol):
    """A density with parameters."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""

    def log_prob(self, rows: Rows) -> Tensor:
        """The log-density of rows with a graph, without their offset; shape ``(n,)``."""

    def start(self, rows: Rows, max_distance: float) -> str:
        """Goes near the rows, as far as it can by itself; says where it is in words.

        :param max_distance: the nats a coordinate from which a start is far.
        """


@torch.no_grad()
def log_probs(density: Density, rows: Rows) -> Tensor:
    """The log-density of rows, without a graph and with their offset; shape ``(n,)``."""
    parts = []
    for start in range(0, len(rows.values), _CHUNK):
        part = rows.take(slice(start, start + _CHUNK))
        parts.append(density.log_prob(part) + part.offset)
    return torch.cat(parts)


@dataclass(frozen=True)
class GuideDensity:
    """A guide on the unconstrained space."""

    guide: UnconstrainingGuide

    def parameters(self) -> list[nn.Parameter]:
        self.guide.get_transform()  # entries of Pyro's store that count more are adopted first
        return _trained(self.guide.parameters())

    def log_prob(self, rows: Rows) -> Tensor:
        x, ladj = call_and_ladj_over_vectors(self.guide.get_transform().inv, rows.values)
        return dist.Normal(torch.zeros_like(x), 1.0, validate_args=False).log_prob(x).sum(-1) + ladj

    @torch.no_grad()
    def start(self, rows: Rows, max_distance: float) -> str:
        """Becomes the Gaussian of the draws' moments, unless it is better already."""
        loc, scale = location_and_scale("draws", rows.values)
        own = log_probs(self, rows._replace(offset=torch.zeros_like(rows.offset))).mean()
        if own > _log_prob_of_gaussian(len(rows.values), scale):  # false for NaN
            return "the guide as it was"
        if scale.dim() == 1 and not isinstance(self.guide, StructuredGuide):
            scale = scale.diag()  # which is small, unless there are thousands of latents
        try:
            self.guide.start_at(loc, scale)
        except ValueError:  # the guide has no correlations
            self.guide.start_at(loc, rows.values.std(0).diag())
        return "the Gaussian of the draws' moments"


@dataclass(frozen=True)
class DistributionDensity:
    """A transformed distribution, conditional or not, whose transforms are modules."""

    distribution: TransformedDistribution | ConditionalTransformedDistribution

    def parameters(self) -> list[nn.Parameter]:
        found: list[nn.Parameter] = []
        for transform in self.distribution.transforms:
            # Pyro wraps those of a conditional distribution that need no context
            module = getattr(transform, "transform", transform)
            for part in (transform, module):
                if isinstance(part, nn.Module):
                    found += part.parameters()
        return _trained(dict.fromkeys(found))

    def log_prob(self, rows: Rows) -> Tensor:
        distribution: Any = self.distribution
        if rows.context is not None:
            distribution = distribution.condition(rows.context)
        transforms = distribution.transforms
        if any(t.domain.event_dim != 1 or t.codomain.event_dim != 1 for t in transforms):
            return torch.as_tensor(distribution.log_prob(rows.values))
        # torch evaluates each transform twice
        x, total = rows.values, rows.values.new_zeros(len(rows.values))
        for transform in reversed(transforms):
            x, ladj = call_and_ladj_over_vectors(transform.inv, x)
            total = total + ladj
        if not x.isfinite().all():
            # a step that is skipped, where the base would raise an error
            return x.sum(-1) * math.nan
        base: Tensor = distribution.base_dist.log_prob(x)
        return sum_rightmost(base, base.dim() - 1) + total

    @torch.no_grad()
    def start(self, rows: Rows, max_distance: float) -> str:
        """Stays where it is, with a warning if that is far from the draws."""
        own = log_probs(self, rows).mean().item()
        _, scale = location_and_scale("draws", rows.values, full_rank=False)
        distance = _log_prob_of_gaussian(len(rows.values), scale) - own
        if not math.isfinite(own) or distance > max_distance * len(scale):
            warnings.warn(
                f"the density begins {distance:.3g} nats a draw below a Gaussian of the draws' means and "
                "standard deviations, and may never get there: end the flow with "
                "transforms.standardize(draws), as in chain([maf(D), standardize(draws)])",
                stacklevel=4,
            )
        return "the density as it was"


def density_and_rows(
    density: object,
    draws: Any,
    context: Any,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> tuple[Density, Rows]:
    """What is fitted, and the draws as rows of its dtype and on its device.

    :raises TypeError: if it is nothing that can be fitted.
    :raises ValueError: if draws or context have another shape, or are not finite.
    """
    if isinstance(density, UnconstrainingGuide):
        if context is not None:
            raise ValueError("context: expected none for a guide, whose latents have no context")
        return GuideDensity(density), _rows_of_guide(density, draws, args, kwargs)
    if not isinstance(density, (TransformedDistribution, ConditionalTransformedDistribution)):
        raise TypeError(_WANTED.format(type(density).__name__))
    is_conditional = isinstance(density, ConditionalTransformedDistribution)
    if args or kwargs:
        raise ValueError("expected arguments of a model for a guide only, got some for a density")
    if (context is not None) != is_conditional:
        wanted = "one for each draw" if is_conditional else "none for a density without one"
        got = "none" if context is None else "one"
        raise ValueError(f"context: expected {wanted}, got {got}")
    fitted = DistributionDensity(density)
    parameters = fitted.parameters()
    if not parameters:
        raise TypeError(
            "density: expected transforms that are modules with parameters, such as maf(D) or a chain "
            "of them, got none"
        )
    values = check_rows("draws", draws).to(parameters[0])
    _check_event_shape(density, values)
    if context is not None:
        context = check_rows("context", context).to(parameters[0])
        if len(context) != len(values):
            raise ValueError(
                f"context: expected a row for each of {len(values)} draws, got {len(context)}"
            )
    return fitted, Rows(values, context, values.new_zeros(len(values)))


def _rows_of_guide(
    guide: UnconstrainingGuide,
    draws: Any,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> Rows:
    """Draws of all sites of any batch shape, on the unconstrained space."""
    if not isinstance(draws, Mapping):
        got = type(draws).__name__
        raise TypeError(f"draws: expected a dict of the values of each site, got {got}")
    with torch.no_grad():
        values, ladj = guide.unconstrain(draws, *args, **kwargs)
    values, ladj = values.reshape(-1, values.shape[-1]), ladj.reshape(-1)
    at_edge = int((~ladj.isfinite()).sum())
    if at_edge:
        raise ValueError(
            f"draws: expected values inside the supports, got {at_edge} of {len(ladj)} at an edge, where "
            "there is no density on the unconstrained space: leave them out"
        )
    return Rows(check_rows("draws", values), None, -ladj.to(values))


def _check_event_shape(density: object, values: Tensor) -> None:
    """Checks that a distribution is one of rows, as far as it says so."""
    if not isinstance(density, Distribution):
        return
    got = (*density.batch_shape, *density.event_shape)
    if density.batch_shape or got != values.shape[1:]:
        raise ValueError(
            f"draws: expected shape (n, *event_shape) = (n, {', '.join(map(str, got))}) of a "
            f"distribution without a batch shape, got {tuple(values.shape)} and a batch shape "
            f"{tuple(density.batch_shape)}"
        )


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _log_prob_of_gaussian(count: int, scale: Tensor) -> float:
    """The mean log-density of so many rows under the Gaussian of their own moments."""
    diagonal = scale if scale.dim() == 1 else scale.diagonal()
    squares = len(diagonal) * (1 - 1 / count)
    return -diagonal.log().sum().item() - 0.5 * (len(diagonal) * math.log(2 * math.pi) + squares)
