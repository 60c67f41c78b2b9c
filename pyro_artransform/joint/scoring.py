# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Runs a model at given latents, and adds up its log-density."""

from collections.abc import Mapping
from typing import Any

from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor


class ScoredRun(Messenger):
    """Puts the latents of a model where they are given, and adds up the log-density of its sites.

    It is what a trace of the conditioned model would give, for a fraction of the time.

    :param values: the value of each latent site.
    :param keep_dim: the dimension, counted from the right of a site's batch shape, that is not
        summed over: the plate of the draws; ``None`` sums over everything.
    """

    def __init__(self, values: Mapping[str, Tensor], keep_dim: int | None = None) -> None:
        super().__init__()
        self._values = values
        self._keep_dim = keep_dim
        self.terms: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self._values and not message["is_observed"]:
            message["value"] = self._values[message["name"]]

    def _pyro_post_sample(self, message: Any) -> None:
        if site_is_subsample(message):
            return
        log_prob = message["fn"].log_prob(message["value"], *message["args"], **message["kwargs"])
        log_prob = scale_and_mask(log_prob, message["scale"], message["mask"])
        self.terms[message["name"]] = self._summed(log_prob)

    def _summed(self, log_prob: Tensor) -> Tensor:
        if self._keep_dim is None:
            return log_prob.sum()
        if log_prob.dim() != -self._keep_dim:
            raise ValueError(f"expected {-self._keep_dim} batch dimensions, got {log_prob.dim()}")
        return log_prob.reshape(log_prob.shape[0], -1).sum(-1)
