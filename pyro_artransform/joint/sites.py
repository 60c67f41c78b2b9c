# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The continuous latent sites of a model, their supports, and their packing into one vector."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import constraints, is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to

from ..arguments import to_tensor, values_can_be_read


@dataclass(frozen=True, eq=False)
class Site:
    """A continuous latent site of a model, without its distribution.

    :param name: its name.
    :param shape: the shape of its value.
    :param event_dim: the number of event dimensions, the last ones of the shape.
    :param support: its support.
    :param dtype: the dtype of its value.
    :param plates: the frames of the plates around it, as Pyro's traces hold them.
    """

    name: str
    shape: torch.Size
    event_dim: int
    support: constraints.Constraint
    dtype: torch.dtype
    plates: tuple[CondIndepStackFrame, ...] = ()

    @classmethod
    def from_node(cls, node: Any) -> "Site":
        """The site of a node of a trace, with the support's bounds detached."""
        fn, value = node["fn"], node["value"]
        support = map_bounds(fn.support, Tensor.detach)
        return cls(
            node["name"], value.shape, fn.event_dim, support, value.dtype, node["cond_indep_stack"]
        )

    @cached_property
    def bijection(self) -> Transform:
        """Pyro's bijection from the unconstrained space onto the support."""
        bijection: Transform = biject_to(self.support)
        return bijection

    @cached_property
    def unconstrained_shape(self) -> torch.Size:
        """The shape of its value on the unconstrained space."""
        shape: torch.Size = self.bijection.inverse_shape(self.shape)
        return shape

    @cached_property
    def is_unconstrained(self) -> bool:
        """Whether the bijection is the identity."""
        return not getattr(self.bijection, "parts", [None])

    @property
    def size(self) -> int:
        """How many coordinates of the latent vector are this site's."""
        return prod(self.unconstrained_shape)

    @property
    def batch_shape(self) -> torch.Size:
        """The shape without the event dimensions."""
        return self.shape[: len(self.shape) - self.event_dim]

    def constrain_with_ladj(self, part: Tensor, batch: torch.Size) -> tuple[Tensor, Tensor]:
        """The value of an unconstrained part, and the log-determinant of the way there.

        :param part: shape ``batch + unconstrained_shape``.
        :param batch: the batch shape, that of the log-determinant.
        """
        value = self.bijection(part)
        ladj = self.bijection.log_abs_det_jacobian(part, value)
        return value, ladj.reshape((*batch, -1)).sum(-1)

    def check_support(self, value: Tensor) -> None:
        """Refuses values outside the support, where Pyro's validation is on and values can be read.

        :raises ValueError: if there is one.
        """
        if not is_validation_enabled() or not values_can_be_read(value):
            return
        inside = self.support.check(value)
        if not inside.all():
            raise ValueError(
                f"values: expected '{self.name}' inside its support "
                f"{describe_support(self.support)}, got {value[~inside][0].tolist()}"
            )

    def to(self, fn: Callable[[Tensor], Tensor]) -> "Site":
        """The site as a conversion of tensors leaves it, such as ``Tensor.double``.

        :param fn: converts the bounds of the support; its dtype is that of the values from then on.
        """
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return replace(self, support=map_bounds(self.support, fn), dtype=dtype)


class Latents:
    """The continuous latents of a model in one vector.

    The sites stand in the order of the model's trace, each taken to the unconstrained space by
    Pyro's ``biject_to`` and flattened, as Pyro's ``AutoContinuous`` packs them.

    :param sites: the sites.
    :raises ValueError: if there is none.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self.sites: dict[str, Site] = {}
        self._sizes: list[int] = []
        for site in sites:
            self.sites[site.name] = site
            self._sizes.append(site.size)
        if not self.sites:
            raise ValueError("the model has no continuous latent: expected at least one")
        self.latent_dim = sum(self._sizes)

    @classmethod
    def from_trace(cls, trace: poutine.Trace) -> "Latents":
        """The latents of a trace of the model.

        :raises ValueError: if a latent is discrete and not enumerated, or there is no latent.
        """
        return cls(map(Site.from_node, filter(_is_continuous, latent_nodes(trace))))

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """The unconstrained value of each site, in the site's dtype.

        :param z: shape ``batch + (latent_dim,)``.
        :return: for each site, shape ``batch + unconstrained shape``.
        """
        parts = {}
        for site, part in zip(self.sites.values(), z.split(self._sizes, -1)):
            shape = z.shape[:-1] + site.unconstrained_shape
            parts[site.name] = part.reshape(shape).to(site.dtype)
        return parts

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """The value of each site.

        :param z: shape ``batch + (latent_dim,)``.
        :return: for each site, shape ``batch + site shape``.
        """
        values = {}
        for name, part in self.split(z).items():
            values[name] = self.sites[name].bijection(part)
        return values

    def constrain_with_ladj(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The value of each site, and the log-determinant of the way there.

        :param z: shape ``batch + (latent_dim,)``.
        :return: for each site, shape ``batch + site shape``; and shape ``batch``.
        """
        batch = z.shape[:-1]
        values, total = {}, z.new_zeros(batch)
        for name, part in self.split(z).items():
            site = self.sites[name]
            values[name] = part
            if not site.is_unconstrained:
                values[name], ladj = site.constrain_with_ladj(part, batch)
                total = total + ladj
        return values, total

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The latent vector of values of all sites, shape ``batch + (latent_dim,)``.

        :param values: for each site, shape ``batch + site shape``.
        :raises ValueError: if a site is missing, or a value has another shape.
        """
        missing = self.sites.keys() - values.keys()
        if missing:
            raise ValueError(
                f"values: expected the sites {sorted(self.sites)}, no {sorted(missing)}"
            )
        parts = []
        for site in self.sites.values():
            value = values[site.name]
            batch = value.shape[: value.dim() - len(site.shape)]
            if value.shape != batch + site.shape:
                raise ValueError(
                    f"values: expected '{site.name}' of shape (..., *{tuple(site.shape)}), got "
                    f"{tuple(value.shape)}"
                )
            parts.append(site.bijection.inv(value).reshape((*batch, -1)))
        return torch.cat(parts, -1)

    def unconstrain_with_ladj(
        self, values: Mapping[str, Any], device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """The latent vector, and the log-determinant of :meth:`constrain` at it.

        :param values: the values of all sites, each of shape ``batch + site shape``; arrays and lists
            become tensors of the site's dtype.
        :param device: the device of these tensors.
        :return: shapes ``batch + (latent_dim,)`` and ``batch``.
        :raises ValueError: if a site is missing or unknown, or a value has another shape or (where
            Pyro's validation is on) is outside its support.
        """
        given = self._check_values(values, device)
        first = next(iter(self.sites.values()))
        value = given[first.name]
        batch = value.shape[: max(value.dim() - len(first.shape), 0)]
        for name, site in self.sites.items():
            expected, got = batch + site.shape, given[name].shape
            if got != expected:
                raise ValueError(
                    f"values: expected '{name}' of shape {tuple(expected)}, got {tuple(got)}"
                )
        if not batch.numel():
            # torch's bijections and supports fail where there is nothing to sum
            return value.new_zeros((*batch, self.latent_dim)), value.new_zeros(batch)
        latents, ladjs = [], []
        for name, site in self.sites.items():
            site.check_support(given[name])
            z = site.bijection.inv(given[name])
            ladj = site.bijection.log_abs_det_jacobian(z, given[name])
            latents.append(z.reshape((*batch, -1)))
            ladjs.append(ladj.reshape((*batch, -1)))
        return torch.cat(latents, -1), torch.cat(ladjs, -1).sum(-1)

    def _check_values(
        self, values: Mapping[str, Any], device: torch.device | None
    ) -> dict[str, Tensor]:
        """The values as tensors, one for each site."""
        if values.keys() != self.sites.keys():
            raise ValueError(
                f"values: expected the sites {sorted(self.sites)}, got {sorted(values)}"
            )
        return {
            name: to_tensor(
                f"values['{name}']", values[name], torch.empty(0, dtype=site.dtype, device=device)
            )
            for name, site in self.sites.items()
        }

    def names(self) -> list[str]:
        """A name for each coordinate of the latent vector: ``tau``, ``theta[3]``."""
        return [
            site.name if site.size == 1 else f"{site.name}[{i}]"
            for site in self.sites.values()
            for i in range(site.size)
        ]


def latent_nodes(trace: poutine.Trace) -> list[Any]:
    """The nodes of a trace that are latent sample sites, without the indices of sub-sampled plates."""
    return [node for _, node in trace.iter_stochastic_nodes() if not site_is_subsample(node)]


def is_enumerated(node: Any) -> bool:
    """Whether a site is discrete and marked for enumeration.

    :param node: a node of a trace.
    """
    return node["infer"].get("enumerate") is not None


def _is_continuous(node: Any) -> bool:
    if is_enumerated(node):
        return False
    if node["fn"].support.is_discrete:
        raise ValueError(
            f"site '{node['name']}' is discrete: expected continuous latents, and discrete ones "
            "marked by pyro.infer.config_enumerate(model), so that they are summed out"
        )
    return True


def map_bounds(
    support: constraints.Constraint, fn: Callable[[Tensor], Tensor]
) -> constraints.Constraint:
    """A copy of a support whose bounds are changed.

    :param support: a support.
    :param fn: applied to each tensor in it.
    """
    changed = copy.copy(support)
    for key, value in vars(support).items():
        if isinstance(value, Tensor):
            setattr(changed, key, fn(value))
        elif isinstance(value, constraints.Constraint):
            setattr(changed, key, map_bounds(value, fn))
    return changed


def same_support(a: constraints.Constraint, b: constraints.Constraint) -> bool:
    """Whether two supports are of one kind and have equal bounds."""
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    return all(_same(value, vars(b)[key]) for key, value in vars(a).items())


def describe_support(support: constraints.Constraint) -> str:
    """A support in words, with its bounds."""
    bounds = (f"{key}={_describe(value)}" for key, value in vars(support).items())
    return f"{type(support).__name__.lstrip('_')}({', '.join(bounds)})"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, constraints.Constraint):
        return same_support(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    same = a == b
    return bool(same.all() if isinstance(same, Tensor) else same)


def _describe(value: Any) -> str:
    if isinstance(value, constraints.Constraint):
        return describe_support(value)
    return str(value.tolist() if isinstance(value, Tensor) else value)
