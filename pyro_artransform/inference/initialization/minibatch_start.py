# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The initial guide where the guide knows the elements of plates by one mini-batch at a time."""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...joint import LogJoint
from ...joint.protocols import MinibatchGuide
from ..config import InitializationConfig
from ..loader import Batch
from .gaussians import Gaussians, antithetic_noise
from .search import UNCHANGED, GaussianSearch, InitialGuide


class SharedPrior:
    """The log joint density of a mini-batch by itself, with its share of the density of the globals.

    A model scales the log-density of a mini-batch up to all data, that of its local latents included,
    whose posterior does not become narrower by that. Times the share of the mini-batch it is the
    density of its own elements. A mini-batch that the model draws itself stays the same one.

    :param share: what part of all data the mini-batch is.
    :param elements: the names of the latents of its elements.
    """

    def __init__(self, log_joint: LogJoint, share: float, elements: Collection[str]) -> None:
        self._log_joint, self._share = log_joint, share
        self.latents, self.start = log_joint.latents, log_joint.start
        self.strategy, self.nonfinite_sites = log_joint.strategy, log_joint.nonfinite_sites
        sites = [self.latents.sites[name] for name in elements]
        self._constrained = [site for site in sites if not site.is_unconstrained]
        self._random_state = torch.get_rng_state()

    def __call__(self, z: Tensor) -> Tensor:
        """The log density of draws, shape ``(n,)``."""
        parts, ladj = self.latents.split(z), z.new_zeros(z.shape[:-1])
        for site in self._constrained:
            ladj = ladj + site.constrain_with_ladj(parts[site.name], z.shape[:-1])[1]
        with torch.random.fork_rng(devices=[], enabled=self._log_joint.is_random):
            if self._log_joint.is_random:
                torch.set_rng_state(self._random_state)
            # the Jacobian of an element is not scaled up as its density is
            return self._share * self._log_joint(z) + (1 - self._share) * ladj


def find_initial_minibatch_guide(
    log_joint: LogJoint,
    model: Callable[..., object],
    guide: MinibatchGuide,
    batch: Batch,
    elbo_draws: Callable[[int], Tensor],
    config: InitializationConfig,
) -> InitialGuide:
    """Starts a guide near the best Gaussian of the latents of one mini-batch, if that is better.

    :param batch: the arguments of model and guide.
    :param elbo_draws: estimates of the guide's ELBO, from so many draws.
    """
    unchanged = InitialGuide(UNCHANGED, math.nan, None)
    best = _best_gaussian(log_joint, model, batch, config)
    if best is None or best[0].elbo == -torch.inf:
        return unchanged
    chosen, gaussian = best
    scale = log_joint.structure(*batch).scale
    before = _compare(elbo_draws, config)
    saved = [parameter.detach().clone() for parameter in guide.parameters()]
    noise = antithetic_noise(gaussian.loc, config.num_minibatch_draws)
    draws = gaussian.loc + noise @ gaussian.scale_tril[0].mT
    try:
        guide.start_near(log_joint.latents.constrain(draws), 1 / scale)
        after = _compare(elbo_draws, config)
    except torch.linalg.LinAlgError:  # draws at the edge of a support have no covariance
        after = -torch.inf
    if after > before:
        return InitialGuide(chosen.name, after, chosen.modes if scale == 1 else None)
    with torch.no_grad():
        for parameter, value in zip(guide.parameters(), saved):
            parameter.copy_(value)
    return unchanged._replace(elbo=before)


def _best_gaussian(
    log_joint: LogJoint, model: Callable[..., object], batch: Batch, config: InitializationConfig
) -> tuple[InitialGuide, Gaussians] | None:
    """The best Gaussian of the latents of a mini-batch; ``None`` if there is none, or it is too expensive."""
    structure = log_joint.structure(*batch)
    is_large = log_joint.latents.latent_dim > config.max_minibatch_latents
    if not structure.global_latents or is_large or log_joint.strategy == "loop":
        return None
    elements = log_joint.latents.sites.keys() - set(structure.global_latents)
    density = SharedPrior(log_joint, 1 / structure.scale, elements)
    few_points = replace(config, num_points=config.num_points_by_loop)
    search = GaussianSearch(density, partial(model, *batch[0], **batch[1]), few_points)
    return search.best(log_joint.start)


def _compare(elbo_draws: Callable[[int], Tensor], config: InitializationConfig) -> float:
    """The ELBO on the same noise each time; minus infinity where it is not finite."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        elbo = elbo_draws(config.num_minibatch_compared).mean()
    return elbo.nan_to_num(-torch.inf, -torch.inf, -torch.inf).item()
