# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The start of a fit: the better one of a flow guide and the best Gaussian that it can be, by ELBO.

The Gaussian is found from several overdispersed points by batch and match, then by natural gradients, in
the pattern that the guide can have: full, that of its graph, or diagonal where latents are many. Then it is
tried in other coordinates, from draws of the first one.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ...arguments import describe_tensors
from ...joint import LogJoint
from ...joint.coordinates import Coordinates, coordinates_at
from ...joint.protocols import FlowGuide, MinibatchGuide, PriorGuide, StructuredGuide
from ..config import InitializationConfig
from ..optimization.training import copies, copy_to
from .gaussian_approximation import ascend, ascend_with_graph, elbo_of, match_scores
from .gaussians import Gaussians, antithetic_noise, elbos, evaluate_density
from .gradient_check import check_gradient
from .points import starting_points

#: the name of the candidate that is the guide itself, which then does not change
UNCHANGED = "initial guide"
#: how far lambda has to be from where a start was found for another one to be looked for
FAR = 0.05
#: draws of a start that the curvature is averaged over
NUM_DRAWS = 8
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


class InitialGuide(NamedTuple):
    """The name of the candidate that was chosen, and its ELBO."""

    name: str
    elbo: float


def find_start(
    density: LogJoint,
    model: Callable[[], object],
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
    initial = _start_from_points(search, model, guide)
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
        few = min(NUM_DRAWS, max(_MOST_GRADIENTS // (2 * num_moves), 1))
        z, _ = guide.rsample_and_log_prob(few)
        u, _ = density.to_unconstrained(z)
    second = coordinates_at(density, coordinates, u, colors)
    others = [second.centered, torch.ones_like(first)]
    if bool((second.centered < _WEAK).any()):
        others.append(coordinates.non_centered(density.latents).centered)
    for centered in others:
        if bool((centered - first).abs().max() > FAR):
            coordinates.centered.data.copy_(centered)
            coordinates.unit.data.copy_(second.unit)
            with torch.no_grad():
                center, _ = density.from_unconstrained(u.mean(0, keepdim=True))
            yield _start_at_best(search, guide, search.from_points(center), -math.inf)


def best_of(guide: PriorGuide | MinibatchGuide, candidates: Iterable[InitialGuide]) -> InitialGuide:
    """Leaves a guide at the one with the largest ELBO of the candidates that it becomes in turn."""
    best = None
    for candidate in candidates:
        if best is None or candidate.elbo > best.elbo:
            best, saved = candidate, copies(guide.parameters())
    copy_to(guide.parameters(), saved)
    return cast(InitialGuide, best)


def _start_from_points(
    search: "GaussianSearch", model: Callable[[], object], guide: FlowGuide
) -> InitialGuide:
    """The better one of a guide and what is found from points around it."""
    density, config = search.density, search.config
    elbo, needed, center = _judge(search.target, guide, config)
    check_gradient(density, center)
    points = starting_points(density, model, center, config.num_points)
    if len(points):
        start = _start_at_best(search, guide, search.from_points(points), needed)
        if start.elbo > needed:
            return start
        if elbo > -torch.inf:
            return InitialGuide(UNCHANGED, elbo)
    sites = ", ".join(density.nonfinite_sites(center[None])) or "the sum of its sites"
    remedy = ". Give"
    if isinstance(model, partial):
        given = describe_tensors(model.func, model.args, model.keywords)
        if found := ", ".join(filter(given.get, given)):
            remedy = f", nor are arguments of the model: {found}. Mend or mask these, or give"
    raise ValueError(
        "expected a model with a finite log density somewhere near its starting values, found none: "
        f"{sites} is not finite there{remedy} the guide an init_loc_fn with values that the data allow"
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
        elbo = elbo_of(density, found, noise)
        if elbo > needed:
            guide.start_at_gaussian(found)
        return InitialGuide("a Gaussian with the graph of the latents", elbo)
    gaussian, bounds = finite(density, gaussian, noise)
    elbo, name = bounds.item(), "a mean-field fit" if gaussian.is_independent else "a Gaussian"
    gaussian = gaussian.dense() if gaussian.is_independent else gaussian
    if not elbo > needed:
        return InitialGuide(name, elbo)
    try:
        guide.start_at(gaussian.loc[0], gaussian.scale_tril[0])
    except ValueError:
        # the nearest independent one in KL(q|p), of the same conditional deviations
        precision = torch.cholesky_inverse(gaussian.scale_tril).diagonal(dim1=-2, dim2=-1)
        independent = Gaussians(gaussian.loc, precision.rsqrt())
        elbo = elbos(density, independent, noise).item()
        if elbo > needed:
            guide.start_at(independent.loc[0], independent.scale_tril[0].diag())
    return InitialGuide(name, elbo)


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
        fitted, bounds = finite(density, fitted, antithetic_noise(points, _NUM_ROUGH))
        best = fitted.take([int(bounds.argmax())])
        return ascend(self.target, best, 2 * count, self.config.num_ascents)


def finite(density: LogJoint, gaussians: Gaussians, noise: Tensor) -> tuple[Gaussians, Tensor]:
    """Gaussians, narrower where they reach beyond a finite density, and their ELBOs."""
    for _ in range(_MAX_HALVINGS):
        bounds = elbos(density, gaussians, noise)
        if bool(bounds.isfinite().all()):
            break
        scale = torch.where(bounds.isfinite(), 1.0, 0.5).to(gaussians.scale_tril)
        scale = scale.reshape(-1, *(1,) * (gaussians.scale_tril.dim() - 1))
        gaussians = Gaussians(gaussians.loc, scale * gaussians.scale_tril)
    return gaussians, bounds
