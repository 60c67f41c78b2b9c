# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Between the vector of all latents of a model and the constrained value of each site."""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to


class LatentSite(NamedTuple):
    """A latent site of a model, without its distribution.

    ``shape`` is that of its value, of which the last ``event_dim`` dimensions are of one event.
    """

    name: str
    shape: torch.Size
    event_dim: int
    dtype: torch.dtype
    bijection: Transform
    unconstrained_shape: torch.Size
    start: Tensor

    @property
    def size(self) -> int:
        """How many coordinates of the latent vector are this site's."""
        return prod(self.unconstrained_shape)

    def with_ladj(self, part: Tensor, batch: torch.Size) -> tuple[Tensor, Tensor]:
        """The value of an unconstrained part, and the log-determinant of the way there.

        :param part: shape ``batch + unconstrained_shape``.
        :param batch: the batch shape, that of the log-determinant.
        """
        value = self.bijection(part)
        ladj = self.bijection.log_abs_det_jacobian(part, value)
        return value, ladj.reshape((*batch, -1)).sum(-1)

    @property
    def is_free(self) -> bool:
        """Whether the site is on the unconstrained space itself."""
        return not getattr(self.bijection, "parts", [None])


class Latents:
    """The continuous latents of a model in one vector.

    The sites stand in the order of the model's trace, each taken to the unconstrained space by
    Pyro's ``biject_to`` and flattened, as Pyro's ``AutoContinuous`` packs them.

    :param trace: a trace of the model.
    :raises ValueError: if a latent is discrete and not enumerated, or there is no latent.
    """

    def __init__(self, trace: poutine.Trace) -> None:
        nodes = dict(trace.iter_stochastic_nodes())
        self.sites = {name: _latent_site(node) for name, node in nodes.items() if _is_ours(node)}
        if not self.sites:
            raise ValueError("the model has no continuous latent: expected at least one")
        self.latent_dim = sum(site.size for site in self.sites.values())
        self.start = torch.cat([site.start.flatten() for site in self.sites.values()])

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """The unconstrained value of each site.

        :param z: shape ``batch + (latent_dim,)``.
        :return: for each site, shape ``batch + unconstrained shape``.
        """
        parts = z.split([site.size for site in self.sites.values()], -1)
        return {
            site.name: part.reshape(z.shape[:-1] + site.unconstrained_shape).to(site.dtype)
            for site, part in zip(self.sites.values(), parts)
        }

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """The value of each site.

        :param z: shape ``batch + (latent_dim,)``.
        :return: for each site, shape ``batch + site shape``.
        """
        return {name: self.sites[name].bijection(part) for name, part in self.split(z).items()}

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
            if not site.is_free:
                values[name], ladj = site.with_ladj(part, batch)
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

    def names(self) -> list[str]:
        """A name for each coordinate of the latent vector: ``tau``, ``theta[3]``."""
        return [
            site.name if site.size == 1 else f"{site.name}[{i}]"
            for site in self.sites.values()
            for i in range(site.size)
        ]


def is_enumerated(node: Any) -> bool:
    """Whether a site is discrete and marked for enumeration.

    :param node: a site of a trace.
    """
    return node["infer"].get("enumerate") is not None


def _is_ours(node: Any) -> bool:
    if site_is_subsample(node) or is_enumerated(node):
        return False
    if node["fn"].support.is_discrete:
        raise ValueError(
            f"site '{node['name']}' is discrete: expected continuous latents, and discrete ones "
            "marked by pyro.infer.config_enumerate(model), so that they are summed out"
        )
    return True


def _latent_site(node: Any) -> LatentSite:
    value, bijection = node["value"].detach(), biject_to(node["fn"].support)
    return LatentSite(
        name=node["name"],
        shape=value.shape,
        event_dim=node["fn"].event_dim,
        dtype=value.dtype,
        bijection=bijection,
        unconstrained_shape=bijection.inverse_shape(value.shape),
        start=bijection.inv(value),
    )
