# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The ELBO with the path gradient, for guides that draw on the unconstrained space."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ...joint import LogJoint
from ...joint.handlers import traced_parameters
from ...joint.protocols import ReparametrizedGuide
from ..config import OptimizationConfig
from ..loader import Batch
from .objective import BatchObjective

_CHUNK = 1024
# of draws that are held at once: 64 MB in double precision
_MOST_VALUES = 2**23
# the same with a graph, which holds some hundred times as many numbers
_MOST_TRAINED = 2**20


@dataclass
class PathObjective(BatchObjective):
    """The ELBO with the path gradient, which vanishes where the guide is the posterior.

    :param log_joint: the log joint density of the model.
    :param guide: the guide.
    :param config: the weights of :meth:`tail_loss`.

    **References**

    1. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference
       (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194
    """

    log_joint: LogJoint
    guide: ReparametrizedGuide
    config: OptimizationConfig
    has_weights = True

    def __post_init__(self) -> None:
        self._last = self.log_joint.start[None]

    def with_arguments(self, batch: Batch) -> "PathObjective":
        return replace(self, log_joint=self.log_joint.with_arguments(*batch))

    def loss(self, num_particles: int) -> Tensor:
        return self._terms(num_particles).mean()

    def tail_loss(self, num_particles: int) -> Tensor:
        r"""As :meth:`loss`, with the gradient of another divergence, which covers the tails better.

        Near the posterior the ELBO hardly notices a tail that is too light, since few draws are
        there; k-hat does. With :math:`w = p / q`, every f-divergence :math:`E_q[f(w)]` has the path
        gradient of the ELBO with weights :math:`w^2 f''(w)`, which are one for the ELBO. Here they
        are :math:`1 + \lambda \min(d^2, c)`, d the deviation of :math:`\log w` from its median in
        units of its spread. The minimum is the posterior all the same.

        **References**

        1. Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker, Lawson, Gu,
           Maddison, 2019), https://arxiv.org/abs/1810.04152
        2. Variational Inference via chi Upper Bound Minimization (Dieng, Tran, Ranganath, Paisley,
           Blei, 2017), https://arxiv.org/abs/1611.00328
        """
        most = max(_MOST_TRAINED // self.log_joint.latents.latent_dim, num_particles)
        terms = self._terms(min(self.config.tail_particles * num_particles, most))
        value = terms.detach()
        deviation = (value - value.median()).abs()
        spread = deviation.square().mean().sqrt() + torch.finfo(terms.dtype).tiny
        squared = (deviation / spread).square().clamp(max=self.config.tail_max_deviation)
        weighted = ((1 + self.config.tail_weight * squared) * terms).mean()
        return value.mean() + (weighted - weighted.detach())

    def _terms(self, num_particles: int) -> Tensor:
        z, log_q = self.guide.rsample_and_log_prob(num_particles, path=True)
        self._last = z.detach()
        return log_q - self.log_joint(z)

    def parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if isinstance(self.guide, nn.Module):
            found.update(self.guide.named_parameters(prefix="guide"))
        known = set(found.values())
        with torch.no_grad():
            traced = traced_parameters(partial(self.loss, 1))
        for name, parameter in traced.items():
            if parameter not in known:
                found[name] = parameter
        return found

    def is_guide_alone(self) -> bool:
        return all(name.startswith("guide.") for name in self.parameters())

    @torch.no_grad()
    def elbo_draws(self, count: int) -> Tensor:
        found, most = [], max(_MOST_VALUES // self.log_joint.latents.latent_dim, 1)
        for start in range(0, count, most):
            z, log_q = self.guide.rsample_and_log_prob(min(most, count - start))
            found.append(self.log_density(z) - log_q)
        return torch.cat(found)

    @torch.no_grad()
    def log_density(self, z: Tensor) -> Tensor:
        """The log joint density of draws ``(n, latent_dim)``, without gradients, shape ``(n,)``."""
        return torch.cat([*map(self.log_joint, z.split(_CHUNK))])

    def nonfinite_sites(self) -> list[str]:
        if not bool(self._last.isfinite().all()):
            return ["the guide's own draws"]
        return self.log_joint.nonfinite_sites(self._last)
