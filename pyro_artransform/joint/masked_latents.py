# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Latents that a mask leaves without a density."""

from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from .sites import is_enumerated


class WholeLatents(Messenger):
    """Gives the masked elements of continuous latents their prior density.

    A mask, as ``obs_mask`` makes one, leaves the elements that stand for nothing without a density.
    A guide of them would grow for ever, and its ELBO with it. With the prior they have a posterior,
    the prior, and the others keep theirs. A mask that is ``False`` as a whole is left: it is how an
    improper prior is written.
    """

    def _pyro_sample(self, message: Any) -> None:
        is_latent = not (message["is_observed"] or site_is_subsample(message))
        if is_latent and not is_enumerated(message) and message["mask"] is not False:
            message["mask"] = None
