# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Where a guide starts."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro.infer.autoguide import init_to_median
from torch import Tensor

from .structure import Site, is_enumerated, refuse_discrete


def init_to_prior_median(site: Site | None = None) -> Any:
    """The prior median of each coordinate, as Pyro's ``init_to_median`` finds it by sampling.

    Pyro's function takes every site with an event dimension for a multivariate one, which has no
    median, and starts it at an arbitrary point. Here only what is really multivariate starts so:
    coordinates that are independent, as those of ``Normal(...).to_event(1)``, each start at their
    own median.

    :param site: a message of Pyro.
    :return: the value.
    """
    if site is None:
        return init_to_prior_median
    fn = site["fn"]
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return init_to_median(site if fn.event_shape else {**site, "fn": fn})


class StartingValues:
    """The starting value of each site that a guide covers, for Pyro's ``InitMessenger``.

    :param init_loc_fn: one of Pyro's starting functions.
    """

    def __init__(self, init_loc_fn: Callable[[Site], Tensor]) -> None:
        self.init_loc_fn = init_loc_fn

    def __call__(self, site: Site) -> Tensor:
        """The value of a site.

        :raises ValueError: if it is discrete and not enumerated.
        """
        if is_enumerated(site):
            value: Tensor = site["fn"].sample()
            return value
        refuse_discrete(site)
        return self.init_loc_fn(site)
