# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models without data, whose posterior is their prior; and the funnel.

With `prior_as_data` a tenth of the log density of each latent becomes a factor, as that of data would be:
the density is the same, and a verdict does not say that the model has no data.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import pyro
from pyro import distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

_SHARE = 0.1


class PriorAsData(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg)):
            msg["scale"] = (1 - _SHARE) * msg["scale"]
            # where the model is conditioned, the site is observed afterwards
            msg["infer"] = {**msg["infer"], "is_latent": True}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["infer"].get("is_latent"):
            log_prob = _SHARE * msg["fn"].log_prob(msg["value"])
            pyro.factor(f"data of {msg['name']}", log_prob)


def prior_as_data(model: Callable[..., object]) -> Callable[..., object]:
    @wraps(model)
    def with_data(*args: object, **kwargs: object) -> object:
        with PriorAsData():
            return model(*args, **kwargs)

    return with_data


def neals_funnel(num_latents: int) -> None:
    """Neal's funnel (Slice Sampling, 2003, section 8): no data, so that its evidence is 1."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("latents", num_latents):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


#: the same, which a verdict does not call a model without data
funnel_with_data = prior_as_data(neals_funnel)


def funnel_by_factor() -> None:
    """The same of ten latents by a factor, so that no site has a prior to take coordinates from."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (9,)))
    below = dist.Normal(0.0, (v / 2).exp().unsqueeze(-1))
    pyro.factor("below", below.log_prob(x).sum(-1))
