# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The posterior mass of modes."""

import math
from typing import NamedTuple

from torch import Tensor

from .._base.arguments import first_of


class ModeShares(NamedTuple):
    """The modes that were found, none of which is an image of another one, and the mass of each.

    Others may exist: no search is exhaustive.
    """

    share: Tensor  #: the share of each mode, ``(num_modes,)``
    #: standard errors; ``nan`` for the approximation by a Gaussian for each mode
    se: Tensor
    names: tuple[str, ...]  #: the latents in which modes differ

    def __str__(self) -> str:
        shares = [*map(_percent, self.share.tolist(), self.se.tolist())]
        return (
            f"{len(shares)} modes with {', '.join(shares)} of the posterior, which differ in "
            f"{first_of(self.names)}"
        )


def _percent(share: float, se: float) -> str:
    """A share in percent, with as many digits as its standard error determines."""
    if math.isnan(se):
        return f"about {100 * share:.3g} %"
    digits = max(0, -math.floor(math.log10(max(100 * se, 1e-3))))
    return f"{100 * share:.{digits}f} ± {100 * se:.{digits}f} %"
