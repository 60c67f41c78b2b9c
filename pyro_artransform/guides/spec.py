# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a guide is built from: the latent sites of its model, and its own arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from ..joint.sites import Latents, Site
from .persistence import serialization


@dataclass(frozen=True, eq=False)
class GuideSpec:
    """What a guide is built from, a file holds, and a loaded guide is built from again.

    :param latents: the latent sites, packed into one unconstrained vector.
    :param arguments: the arguments of the constructor that decide which parameters there are.
    :param observed: the sites that had data at the set-up, None where that is not known.
    :param device: the device of the parameters.
    """

    latents: Latents
    arguments: Mapping[str, Any]
    observed: tuple[str, ...] | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The latent sites, in the order of the latent vector."""
        return tuple(self.latents.sites.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latent vector, which holds the values of each site."""
        dtype = self.sites[0].dtype
        for site in self.sites:
            dtype = torch.promote_types(dtype, site.dtype)
        return dtype

    def zeros(self) -> Tensor:
        """A latent vector of zeros, shape ``(latent_dim,)``."""
        return torch.zeros(self.latents.latent_dim, dtype=self.dtype, device=self.device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each site."""
        return {site.name: tuple(site.shape) for site in self.sites}

    def to(self, fn: Callable[[Tensor], Tensor]) -> "GuideSpec":
        """The spec as a conversion of tensors leaves it, such as ``Tensor.double``."""
        latents = Latents(site.to(fn) for site in self.sites)
        return replace(self, latents=latents, device=fn(self.zeros()).device)

    def to_plain(self) -> dict[str, Any]:
        """The spec as plain data; the error for what cannot be written names it."""
        arguments = {}
        for name, value in self.arguments.items():
            arguments[name] = serialization.argument_to_plain(name, value)
        return {
            "sites": [_site_to_plain(site) for site in self.sites],
            "arguments": arguments,
            "observed": None if self.observed is None else list(self.observed),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], device: torch.device) -> "GuideSpec":
        """The spec from what :meth:`to_plain` made of it."""
        latents = Latents(_site_from_plain(site, device) for site in plain["sites"])
        arguments, observed = {}, plain["observed"]
        for name, value in plain["arguments"].items():
            arguments[name] = serialization.argument_from_plain(value)
        return cls(latents, arguments, None if observed is None else tuple(observed), device)


def _site_to_plain(site: Site) -> dict[str, object]:
    return {
        "name": site.name,
        "shape": list(site.shape),
        "event_dim": site.event_dim,
        "support": serialization.support_to_plain(site.name, site.support),
        "dtype": str(site.dtype).removeprefix("torch."),
        "plates": [list(frame) for frame in site.plates],
    }


def _site_from_plain(plain: Mapping[str, Any], device: torch.device) -> Site:
    return Site(
        plain["name"],
        torch.Size(plain["shape"]),
        plain["event_dim"],
        serialization.support_from_plain(plain["support"], device),
        getattr(torch, plain["dtype"]),
        tuple(CondIndepStackFrame(*frame) for frame in plain["plates"]),
    )
