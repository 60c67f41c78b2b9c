# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The start of a guide that knows the elements of plates by one mini-batch at a time."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from ...joint import LogJoint
from ...joint.protocols import MinibatchGuide
from ..config import InitializationConfig
from ..loader import Batch
from ..optimization.training import copies, copy_to
from .gaussians import antithetic_noise
from .points import starting_points
from .start import FAR, NUM_DRAWS, UNCHANGED, GaussianSearch, InitialGuide, best_of, finite

# latents of a mini-batch with a Gaussian at most: memory
_MOST_LATENTS = 1000
# draws of that Gaussian that a guide is started by, and draws that the started guide is compared on
_NUM_DRAWN, _NUM_COMPARED = 4000, 512


class SharedPrior(LogJoint):
    """The log joint density of a mini-batch by itself, with its share of the density of the globals.

    The mini-batch is a share of all data, and the same in each run; its elements have some of the latents.
    """

    def __init__(self, log_joint: LogJoint, share: float, elements: Collection[str]) -> None:
        vars(self).update(vars(log_joint))
        self._share, self._elements = share, elements
        if log_joint.is_random:
            self.run = partial(_run_from, torch.get_rng_state(), log_joint.run)

    def __call__(self, z: Tensor) -> Tensor:
        u, _ = self.to_unconstrained(z)
        parts, ladj = self.latents.split(u), z.new_zeros(z.shape[:-1])
        for name in self._elements:
            ladj = ladj + self.latents.sites[name].constrain_with_ladj(parts[name], z.shape[:-1])[1]
        if self.coordinates is not None:
            found = self.coordinates.with_location
            mapped = {name: found[name] for name in found if name in self._elements}
            of_elements = self.with_coordinates(self.coordinates._replace(with_location=mapped))
            ladj = ladj - of_elements.from_unconstrained(u)[1]
        # the Jacobian of an element is not scaled up as its density is
        return self._share * super().__call__(z) + (1 - self._share) * ladj


def _run_from(state: Tensor, run: Callable[[], object]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        run()


def find_initial_minibatch_guide(
    log_joint: LogJoint,
    model: Callable[..., object],
    guide: MinibatchGuide,
    batch: Batch,
    elbo_draws: Callable[[int], Tensor],
    config: InitializationConfig,
) -> InitialGuide:
    """Starts a guide near the best Gaussian of the latents of one mini-batch, if that is better.

    A guide of too many latents, or without any that all mini-batches share, stays as it is.

    :param elbo_draws: estimates of the guide's ELBO, from a number of draws.
    """
    structure = log_joint.structure(*batch)
    is_large = log_joint.latents.latent_dim > _MOST_LATENTS
    if not structure.global_latents or is_large or log_joint.strategy == "loop":
        return InitialGuide(UNCHANGED, math.nan)
    share, run = 1 / structure.scale, partial(model, *batch[0], **batch[1])
    elements = log_joint.latents.sites.keys() - set(structure.global_latents)
    shared = SharedPrior(log_joint, share, elements)
    before = copies(guide.parameters())

    def candidate(name: str) -> InitialGuide:
        """The guide as it is, on the same noise each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            elbo = elbo_draws(_NUM_COMPARED).mean()
        return InitialGuide(name, elbo.nan_to_num(-torch.inf, -torch.inf, -torch.inf).item())

    def move() -> Tensor | None:
        """Moves to a Gaussian in the guide's coordinates: draws of it on the unconstrained space."""
        density = shared.with_coordinates(guide.coordinates_of(shared.latents))
        search = GaussianSearch(density, density, config)
        points = starting_points(density, run, density.start, config.num_points_by_loop)
        if not len(points):
            return None
        gaussian, bounds = finite(
            density, search.from_points(points), antithetic_noise(points, config.num_compared)
        )
        if not bool(bounds.isfinite()):
            return None
        noise = antithetic_noise(points, _NUM_DRAWN)
        draws = (gaussian.loc[:, None] + gaussian.deviations(noise))[0]
        with suppress(torch.linalg.LinAlgError):  # at the edge of a support: without covariance
            guide.start_near(log_joint.latents.constrain(draws), share)
        with torch.no_grad():
            return density.to_unconstrained(draws[:NUM_DRAWS])[0]

    def candidates() -> Iterator[InitialGuide]:
        yield candidate(UNCHANGED)
        draws = move()
        yield candidate("a Gaussian")
        # by the curvature, then the model as it is written
        for points in (draws, None) if guide.chooses_coordinates else ():
            copy_to(guide.parameters(), before)
            if guide.center_at(points, log_joint, share) > FAR:
                yield candidate(UNCHANGED)
                move()
                yield candidate("a Gaussian")

    return best_of(guide, candidates())
