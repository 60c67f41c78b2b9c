# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Where a guide starts."""

from collections.abc import Callable

from torch import Tensor

from .sites.records import Site, is_enumerated, refuse_discrete


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


class KnownStartingValues(StartingValues):
    """Starting values of the sites that a guide knows; whatever else is latent is drawn.

    What is predicted, because it has no data this time, may well be discrete.

    :param init_loc_fn: one of Pyro's starting functions.
    """

    #: the names of the sites; None as long as they are all there are
    known: frozenset[str] | None = None

    def __call__(self, site: Site) -> Tensor:
        """The value of a site.

        :raises ValueError: if it is known, discrete and not enumerated.
        """
        if self.known is not None and site["name"] not in self.known:
            value: Tensor = site["fn"].sample()
            return value
        return super().__call__(site)
