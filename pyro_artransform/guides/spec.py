# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a guide is built from: the latent sites of its model, and its own arguments."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from ..joint.sites import Latents, Site
from . import plain_data

Arguments = dict[str, Any]


@dataclass(frozen=True, eq=False)
class GuideSpec:
    """What a guide is built from, a file holds, and a loaded guide is built from again.

    :param latents: the latent sites, packed into one unconstrained vector.
    :param arguments: the arguments of the constructor that decide which parameters there are.
    :param observed: the sites that had data at the set-up, None where that is not known.
    :param device: the device of the parameters.
    """

    latents: Latents
    arguments: Arguments
    observed: tuple[str, ...] | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The latent sites, in the order of the latent vector."""
        return tuple(self.latents.sites.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latent vector, which holds the values of each site."""
        return reduce(torch.promote_types, (site.dtype for site in self.sites))

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

    def to_plain(self) -> plain_data.Plain:
        """The spec as plain data; the error for what cannot be written names it."""
        sites, arguments = [], {}
        for site in self.sites:
            plain = {
                "name": site.name,
                "shape": list(site.shape),
                "event_dim": site.event_dim,
                "support": plain_data.support_to_plain(site.name, site.support),
                "dtype": str(site.dtype).removeprefix("torch."),
                "plates": [list(frame) for frame in site.plates],
            }
            sites.append(plain)
        for name, value in self.arguments.items():
            arguments[name] = plain_data.argument_to_plain(name, value)
        observed = None if self.observed is None else list(self.observed)
        return {"sites": sites, "arguments": arguments, "observed": observed}

    @classmethod
    def from_plain(cls, plain: plain_data.Plain, device: torch.device) -> "GuideSpec":
        """The spec from what :meth:`to_plain` made of it."""
        sites, arguments, observed = [], {}, plain["observed"]
        for site in plain["sites"]:
            support = plain_data.support_from_plain(site["support"], device)
            shape, dtype = torch.Size(site["shape"]), getattr(torch, site["dtype"])
            plates = tuple(CondIndepStackFrame(*frame) for frame in site["plates"])
            sites.append(Site(site["name"], shape, site["event_dim"], support, dtype, plates))
        for name, value in plain["arguments"].items():
            arguments[name] = plain_data.argument_from_plain(value)
        observed = None if observed is None else tuple(observed)
        return cls(Latents(sites), arguments, observed, device)
