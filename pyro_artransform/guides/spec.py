# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a guide is built from: the latent sites of its model, and its own arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from ..joint.sites import Latents, Site
from .persistence import serialization


@dataclass(frozen=True, eq=False)
class GuideSpec:
    """What a guide is built from, a file holds, and a loaded guide is built from again.

    :param sites: the latent sites, in the order of the latent vector.
    :param arguments: the arguments of the constructor that decide which parameters there are.
    :param observed: the sites that had data at the set-up, None where that is not known.
    :param device: the device of the parameters.
    """

    sites: tuple[Site, ...]
    arguments: Mapping[str, Any]
    observed: tuple[str, ...] | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @cached_property
    def latents(self) -> Latents:
        """The packing of the sites into one unconstrained vector."""
        return Latents(self.sites)

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

    def prototype_trace(self, values: Mapping[str, Tensor] | None = None) -> poutine.Trace:
        """The latent sites as a trace, as Pyro's autoguides and ``NeuTraReparam`` want it.

        :param values: the starting value of each site; by default some value in its support.
        """
        trace = poutine.Trace()
        for site in self.sites:
            if values is None:
                z = torch.zeros(site.unconstrained_shape, dtype=site.dtype, device=self.device)
                value = site.bijection(z).to(site.dtype)
            else:
                value = values[site.name]
            trace.add_node(
                site.name,
                type="sample",
                name=site.name,
                fn=SiteShape(site),
                value=value,
                is_observed=False,
                infer={},
                args=(),
                kwargs={},
                cond_indep_stack=site.plates,
            )
        return trace

    def to(self, fn: Callable[[Tensor], Tensor]) -> "GuideSpec":
        """The spec as a conversion of tensors leaves it, such as ``Tensor.double``."""
        device = fn(torch.empty(0, dtype=self.dtype, device=self.device)).device
        return replace(self, sites=tuple(site.to(fn) for site in self.sites), device=device)

    def to_plain(self) -> dict[str, Any]:
        """The spec as plain data.

        :raises ValueError: if a support or an argument cannot be written; the message names it.
        """
        return {
            "sites": [_site_to_plain(site) for site in self.sites],
            "arguments": {
                name: serialization.argument_to_plain(name, value)
                for name, value in self.arguments.items()
            },
            "observed": None if self.observed is None else list(self.observed),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], device: torch.device) -> "GuideSpec":
        """The spec from what :meth:`to_plain` made of it.

        :param plain: plain data.
        :param device: the device of the parameters.
        """
        observed = plain["observed"]
        return cls(
            sites=tuple(_site_from_plain(site, device) for site in plain["sites"]),
            arguments={
                name: serialization.argument_from_plain(value)
                for name, value in plain["arguments"].items()
            },
            observed=None if observed is None else tuple(observed),
            device=device,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each site."""
        return {site.name: tuple(site.shape) for site in self.sites}


class SiteShape(dist.TorchDistribution):
    """The shapes and the support of a latent site's distribution, and nothing else of it.

    A prototype trace holds it in place of the distribution, which may hold the data, graphs, and
    functions that cannot be copied.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    # an attribute of each object: a guide reads it in each call
    support: constraints.Constraint = constraints.real

    def __init__(self, site: Site) -> None:
        self.support = site.support
        event_shape = site.shape[len(site.batch_shape) :]
        super().__init__(site.batch_shape, event_shape, validate_args=False)


def _site_to_plain(site: Site) -> dict[str, Any]:
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
