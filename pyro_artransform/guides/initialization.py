# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Where a guide starts."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..joint.sites import is_enumerated


@dataclass(frozen=True)
class StartingValues:
    """The starting value of each latent site of a model, for Pyro's ``InitMessenger``.

    :param init_loc_fn: one of Pyro's functions of starting values.
    :param sites: the names of the sites of the guide, where they are known: every other latent is
        predicted, and may be discrete. By default all latents are the guide's.
    """

    init_loc_fn: Callable[[Any], Tensor]
    sites: Collection[str] | None = None

    def __call__(self, site: Any) -> Tensor:
        """The value of a site.

        :param site: a message of Pyro.
        :raises ValueError: if it is a site of the guide, discrete and not enumerated.
        """
        is_predicted = self.sites is not None and site["name"] not in self.sites
        if is_predicted or is_enumerated(site):
            value: Tensor = site["fn"].sample()
            return value
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"site '{site['name']}' is discrete, and a flow guide covers continuous latents "
                "only: expected it to be enumerated, hidden or summed out. Give the guide and "
                "TraceEnum_ELBO the model pyro.infer.config_enumerate(model); or hide the site from "
                f"the guide by poutine.block(model, hide=['{site['name']}']) and guide it by "
                "another one of an AutoGuideList; or write the model without it, as a mixture"
            )
        return self.init_loc_fn(site)
