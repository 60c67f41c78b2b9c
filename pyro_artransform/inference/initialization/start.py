# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The start of a fit: the better one of a guide and the best Gaussian that it can be, by ELBO.

The Gaussian is found from several overdispersed points by batch and match, then by natural gradients, in
the pattern that the guide can have: full, that of its graph, or diagonal where latents are many. Then it is
tried in other coordinates, from draws of the first one. A guide that knows the elements of plates by one
mini-batch at a time starts near the Gaussian of the latents of one of them.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ...joint import LogJoint
from ...joint.coordinates import Coordinates, coordinates_at
from ...joint.protocols import FlowGuide, MinibatchGuide, PriorGuide, StructuredGuide
from ..config import InitializationConfig
from ..loader import Batch
from ..optimization.training import copies, copy_to
from .gaussian_approximation import ascend, ascend_with_graph, elbo_of, match_scores
from .gaussians import Gaussians, antithetic_noise, elbos, evaluate_density
from .gradient_check import check_gradient
from .points import starting_points

#: the name of the candidate that is the guide itself, which then does not change
UNCHANGED = "initial guide"
#: the same, where no Gaussian was found that it could be compared with
FAILED = "initial guide, since no Gaussian around a starting point has a finite ELBO"
# how far lambda has to be from where a start was found for another one to be looked for
_FAR = 0.05
# draws of a start that the curvature is averaged over
_NUM_DRAWS = 8
# gradients that the curvature takes at most
_MOST_GRADIENTS = 4096
# units of the prior throughout are tried where the data of some element are weaker than the prior
_WEAK = 0.5
# standard errors, and nats, by which a candidate has to beat the guide
_GAIN_IN_SE, _GAIN = 2.0, 0.01
# many independent Gaussians begin at the best of the points alone
_NUM_INDEPENDENT = 4
# draws of a Gaussian beyond one for each coordinate, and the fewest; by loop
_DRAWS, _DRAWS_BY_LOOP = (16, 32), (2, 8)
_NUM_ROUGH = 64  # draws that candidates are compared on first
_MAX_HALVINGS = 12  # of the scale of a Gaussian that reaches beyond a finite density
# latents of a mini-batch with a Gaussian at most: memory
_MOST_LATENTS = 1000
# draws of that Gaussian that a guide is started by, and draws that the started guide is compared on
_NUM_DRAWN, _NUM_FOR_ELBO = 4000, 512


class InitialGuide(NamedTuple):
    """The name of the candidate that was chosen, and its ELBO."""

    name: str
    elbo: float


def find_start(
    density: LogJoint,
    guide: FlowGuide,
    config: InitializationConfig,
    whole: LogJoint | None = None,
) -> InitialGuide:
    """Starts a flow guide at the best candidate for it, in the coordinates where this has the largest ELBO.

    Tried are the coordinates that the guide has, those that the curvature at the first start asks for, the
    model as it is written, and units of the prior throughout.

    :param density: the log joint density, in the coordinates of the guide, which change in place.
    :param whole: that of all data, where the other one is of some mini-batches: what is found in these
        goes on in it, and is judged by it.
    :raises ValueError: if none of the starts is finite, or the gradient of the model lacks a latent.
    """
    search, coordinates = GaussianSearch(density, whole or density, config), density.coordinates
    initial = _start_from_points(search, guide)
    if coordinates is None or not (isinstance(guide, PriorGuide) and guide.chooses_coordinates):
        return initial
    return best_of(guide, _in_other_coordinates(search, guide, coordinates, initial))


def _in_other_coordinates(
    search: "GaussianSearch", guide: PriorGuide, coordinates: Coordinates, initial: InitialGuide
) -> Iterator[InitialGuide]:
    """The start that a guide has, and then others, in other coordinates."""
    yield initial
    density, first = search.density, coordinates.centered.detach().clone()
    with torch.no_grad():
        colors = None
        if isinstance(guide, StructuredGuide):
            colors = guide.markov_graph().coloring.on(first.device)
        num_moves = len(first) if colors is None else int(colors.max()) + 1
        few = min(_NUM_DRAWS, max(_MOST_GRADIENTS // (2 * num_moves), 1))
        z, _ = guide.rsample_and_log_prob(few)
        u, _ = density.to_unconstrained(z)
    second = coordinates_at(density, coordinates, u, colors)
    others = [second.centered, torch.ones_like(first)]
    if bool((second.centered < _WEAK).any()):
        others.append(coordinates.non_centered(density.latents).centered)
    for centered in others:
        if bool((centered - first).abs().max() > _FAR):
            coordinates.centered.data.copy_(centered)
            coordinates.unit.data.copy_(second.unit)
            with torch.no_grad():
                center, _ = density.from_unconstrained(u.mean(0, keepdim=True))
            yield _start_at_best(search, guide, search.from_points(center), initial.elbo)


def best_of(guide: PriorGuide | MinibatchGuide, candidates: Iterable[InitialGuide]) -> InitialGuide:
    """Leaves a guide at the one with the largest ELBO of the candidates that it becomes in turn."""
    best = None
    for candidate in candidates:
        if best is None or candidate.elbo > best.elbo:
            best, saved = candidate, copies(guide.parameters())
    copy_to(guide.parameters(), saved)
    return cast(InitialGuide, best)


def _start_from_points(search: "GaussianSearch", guide: FlowGuide) -> InitialGuide:
    """The better one of a guide and what is found from points around it."""
    density, config = search.density, search.config
    elbo, needed, center = _judge(search.target, guide, config)
    check_gradient(density, center)
    points, start = starting_points(density, center, config.num_points), None
    if len(points):
        start = _start_at_best(search, guide, search.from_points(points), needed)
        if start.elbo > needed:
            return start
    if elbo > -torch.inf:
        is_found = start is not None and start.elbo > -torch.inf
        return InitialGuide(UNCHANGED if is_found else FAILED, elbo)
    sites = ", ".join(density.nonfinite_sites(center[None])) or "the sum of its sites"
    raise ValueError(
        "expected a model with a finite log density somewhere near its starting values, found none: "
        f"{sites} is not finite there. Give the guide an init_loc_fn with values that the data allow"
    )


def _start_at_best(
    search: "GaussianSearch", guide: FlowGuide, gaussian: Gaussians, needed: float
) -> InitialGuide:
    """Makes a guide the best Gaussian that it can be near S = 1 others, if its ELBO is as needed."""
    density, config = search.target, search.config
    noise = antithetic_noise(gaussian.loc, config.num_compared)
    if isinstance(guide, StructuredGuide):
        steps = config.max_sparse_steps, config.num_ascents // 2
        found = ascend_with_graph(density, guide.markov_graph(), gaussian, *steps)
        elbo = _known(elbo_of(density, found, noise), needed, noise)
        if elbo > needed:
            guide.start_at_gaussian(found)
        return InitialGuide("a Gaussian with the graph of the latents", elbo)
    gaussian, bounds = _finite(density, gaussian, noise)
    elbo = _known(bounds.item(), needed, noise)
    name = "a mean-field fit" if gaussian.is_independent else "a Gaussian"
    gaussian = gaussian.dense() if gaussian.is_independent else gaussian
    if not elbo > needed:
        return InitialGuide(name, elbo)
    try:
        guide.start_at(gaussian.loc[0], gaussian.scale_tril[0])
    except ValueError:
        # the nearest independent one in KL(q|p), of the same conditional deviations
        identity = Gaussians(gaussian.loc, torch.ones_like(gaussian.loc)).dense().scale_tril
        root = torch.linalg.solve_triangular(gaussian.scale_tril, identity, upper=False)
        independent = Gaussians(gaussian.loc, root.norm(dim=-2).reciprocal())
        elbo = _known(elbos(density, independent, noise).item(), needed, noise)
        if elbo > needed:
            guide.start_at(independent.loc[0], independent.scale_tril[0].diag())
    return InitialGuide(name, elbo)


def _known(elbo: float, needed: float, like: Tensor) -> float:
    """An ELBO; ``-inf`` where it is not finite, or round-off is a nat of it and not of the one needed."""
    return elbo if abs(elbo) < max(1 / torch.finfo(like.dtype).eps, abs(needed)) else -math.inf


@torch.no_grad()
def _judge(
    density: LogJoint, guide: FlowGuide, config: InitializationConfig
) -> tuple[float, float, Tensor]:
    """The ELBO of a guide as it is, the one that a candidate has to exceed, and the guide's median."""
    z, log_q = guide.rsample_and_log_prob(config.num_compared)
    ratios = evaluate_density(density, z) - log_q
    mean, median = ratios.mean(), ratios.median()
    error = (ratios.std() / len(ratios) ** 0.5).nan_to_num(0.0, 0.0, 0.0)
    bound = mean + _GAIN_IN_SE * error
    # tails are one-sided: the median if it is between
    bound = torch.where((mean <= median) & (median < bound), median, bound)
    elbo, bound = torch.stack([mean, bound]).nan_to_num(-torch.inf, -torch.inf, -torch.inf).tolist()
    return elbo, bound + _GAIN, z.median(0).values


@dataclass(frozen=True)
class GaussianSearch:
    """A search for the Gaussian with the largest ELBO: without correlations where latents are many."""

    density: LogJoint
    target: LogJoint  #: the density in which it ends, that of all data where there are mini-batches
    config: InitializationConfig

    def from_points(self, points: Tensor) -> Gaussians:
        """The best one from points ``(S, D)``, as S = 1."""
        density, dim = self.density, points.shape[-1]
        more, fewest = _DRAWS_BY_LOOP if density.strategy == "loop" else _DRAWS
        is_dense = dim <= self.config.max_dense_dim
        count = max(dim + more, fewest) if is_dense else fewest
        if not is_dense:
            order = evaluate_density(density, points).argsort(descending=True)
            points = points[order[:_NUM_INDEPENDENT]]
        given = density, points, count, self.config.num_matches
        fitted = match_scores(*given, is_independent=not is_dense)
        fitted, bounds = _finite(density, fitted, antithetic_noise(points, _NUM_ROUGH))
        best = fitted.take([int(bounds.argmax())])
        return ascend(self.target, best, 2 * count, self.config.num_ascents)


def _finite(density: LogJoint, gaussians: Gaussians, noise: Tensor) -> tuple[Gaussians, Tensor]:
    """Gaussians, narrower where they reach beyond a finite density, and their ELBOs."""
    for _ in range(_MAX_HALVINGS):
        bounds = elbos(density, gaussians, noise)
        if bool(bounds.isfinite().all()):
            break
        scale = torch.where(bounds.isfinite(), 1.0, 0.5).to(gaussians.scale_tril)
        scale = scale.reshape(-1, *(1,) * (gaussians.scale_tril.dim() - 1))
        gaussians = Gaussians(gaussians.loc, scale * gaussians.scale_tril)
    return gaussians, bounds


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
    share = 1 / structure.scale
    elements = log_joint.latents.sites.keys() - set(structure.global_latents)
    shared = SharedPrior(log_joint, share, elements)
    before = copies(guide.parameters())

    def candidate(name: str) -> InitialGuide:
        """The guide as it is, on the same noise each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            elbo = elbo_draws(_NUM_FOR_ELBO).mean()
        return InitialGuide(name, elbo.nan_to_num(-torch.inf, -torch.inf, -torch.inf).item())

    def move() -> Tensor | None:
        """Moves to a Gaussian in the guide's coordinates: draws of it on the unconstrained space."""
        density = shared.with_coordinates(guide.coordinates_of(shared.latents))
        search = GaussianSearch(density, density, config)
        points = starting_points(density, density.start, config.num_points_by_loop)
        if not len(points):
            return None
        gaussian, bounds = _finite(
            density, search.from_points(points), antithetic_noise(points, config.num_compared)
        )
        if not bool(bounds.isfinite()):
            return None
        noise = antithetic_noise(points, _NUM_DRAWN)
        draws = (gaussian.loc[:, None] + gaussian.deviations(noise))[0]
        with suppress(torch.linalg.LinAlgError):  # at the edge of a support: without covariance
            guide.start_near(log_joint.latents.constrain(draws), share)
        with torch.no_grad():
            return density.to_unconstrained(draws[:_NUM_DRAWS])[0]

    def candidates() -> Iterator[InitialGuide]:
        yield candidate(UNCHANGED)
        draws = move()
        yield candidate("a Gaussian")
        # by the curvature, then the model as it is written
        for points in (draws, None) if guide.chooses_coordinates else ():
            copy_to(guide.parameters(), before)
            if guide.center_at(points, log_joint, share) > _FAR:
                yield candidate(UNCHANGED)
                move()
                yield candidate("a Gaussian")

    return best_of(guide, candidates())
