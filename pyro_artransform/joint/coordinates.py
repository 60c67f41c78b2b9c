# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Which latents have coordinates from the model's own prior, and how centred these are."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import validation_enabled
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..graphs.dependencies import value_and_gradient
from .handlers import hidden_sites
from .prior_map import Coordinates
from .prior_scale import PriorScale, is_identity_or_exp
from .sites import Latents

# above it an element is as the model is written, which costs nothing (benchmarks/coordinates.md)
_CENTERED = 0.95
_BETWEEN_QUARTILES = 1.349  # sds of a normal distribution
# in units of the prior: curvatures are those of a smooth function
_DIFFERENCE = 1e-3


@torch.no_grad()
def find_mapped(
    run: Callable[[], object], latents: Latents, points: Tensor, with_shapes: bool = False
) -> dict[str, bool]:
    """The latents with coordinates from the prior, and whether their prior depends on other latents.

    Where none depends, there are none; where some do, scales at the root with a shape are among them.

    :param points: two points, shape ``(2, latent_dim)``, between which priors are compared.
    :param with_shapes: whether priors with a shape are among them in any case.
    """
    state, given = torch.get_rng_state(), list(map(latents.constrain, points))
    first, indices = _priors(run, latents, given[0])
    torch.set_rng_state(state)  # the same discrete latents and parts of data in both runs
    second, indices = _priors(run, latents, {**given[1], **indices})
    again, _ = _priors(run, latents, {**given[1], **indices})
    torch.set_rng_state(state)
    # that of a latent which depends on one that is hidden is no function of the latents
    random = depend_on_latents(second, again)
    priors = {name: prior for name, prior in first.items() if name not in random}
    dependent = depend_on_latents(priors, second)
    has_shapes = with_shapes or bool(dependent)
    shaped = [name for name, prior in priors.items() if prior.shape is not None and has_shapes]
    return {name: name in dependent for name in priors if name in {*dependent, *shaped}}


@torch.no_grad()
def prior_scales(run: Callable[[], object], latents: Latents, u: Tensor) -> Tensor:
    """The scale of each prior at a point of the unconstrained space, shape ``(latent_dim,)``; else 1."""
    priors, _ = _priors(run, latents, latents.constrain(u))
    found = torch.ones_like(u)
    for name, part in latents.views(found).items():
        if name in priors:
            part.copy_(priors[name].diagonal)
    return torch.where(found.isfinite() & (found > 0), found, 1.0)


def _priors(
    run: Callable[[], object], latents: Latents, values: dict[str, Tensor]
) -> tuple[dict[str, PriorScale], dict[str, Tensor]]:
    """The priors with a location and a scale in a run at values of sites, and the plates' indices."""
    with validation_enabled(False), hidden_sites():
        trace = poutine.trace(poutine.condition(run, values)).get_trace()
    priors, indices = dict[str, PriorScale](), {}
    site: Any
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and site_is_subsample(site):
            indices[name] = site["value"]
        # a mask that is still there makes the prior improper
        is_proper = name in latents.sites and site["mask"] is None
        prior = PriorScale.of(site["fn"]) if is_proper else None
        # more dimensions are those of discrete latents that are summed out
        if prior is None or prior.loc.dim() > site["value"].dim():
            continue
        # a log density of u is one of the value by these alone
        if prior.log_prob is None or is_identity_or_exp(latents.sites[name].bijection):
            priors[name] = prior
    return priors, indices


def depend_on_latents(
    one: Mapping[str, PriorScale | None], other: Mapping[str, PriorScale | None]
) -> list[str]:
    """The latents whose location or scale differs between runs with other values of the latents."""
    found = []
    for name, prior in one.items():
        second = other.get(name)
        if prior and second and not all(map(torch.equal, prior[:2], second[:2])):
            found.append(name)
    return found


def centered_by_curvature(
    non_centered: Any, x: Tensor, together: Tensor | None = None, weights: Tensor | float = 1.0
) -> Tensor:
    r"""lambda by what the data say of each element, against its prior.

    .. math::

        \lambda = \frac{h}{1 + h}, \qquad 1 + h = - \frac{\partial^2}{\partial x^2} \log p

    in non-centred coordinates x, where the prior has a curvature of 1 and the likelihood h: with weak data
    an element is left in units of its prior, with strong data it is as the model is written: 1 above 0.95.

    :param non_centered: the log joint density in coordinates with lambda 0.
    :param x: points, shape ``(n, latent_dim)``, over which h is averaged.
    :param together: labels, shape ``(latent_dim,)``: coordinates of one label have no second derivatives
        with each other, as the elements of a plate, and move together.
    :param weights: by which the density of a coordinate is scaled down: the share of a mini-batch.
    :return: shape ``(latent_dim,)``; 1 for all other latents.
    """
    lam = non_centered.coordinates.centered.detach().clone()
    labels = torch.arange(len(lam), device=lam.device) if together is None else together
    total, size = torch.zeros_like(lam), max(non_centered.chunk_size // 2, 1)
    for point in x:
        for part in labels[lam < 1].unique().split(size):
            moved = (labels == part[:, None]) & (lam < 1)
            steps = _DIFFERENCE * moved.to(x.dtype)
            ends = torch.cat([point + steps, point - steps])
            ahead, behind = value_and_gradient(non_centered, ends)[1].chunk(2)
            total += ((behind - ahead) * moved).sum(0) / (2 * _DIFFERENCE)
    return _centered(lam, weights * total / len(x))


def centered_by_draws(non_centered: Any, u: Tensor) -> Tensor:
    """The same by draws of the posterior on the unconstrained space ``(n, latent_dim)``.

    The variance of the gradient there is the mean curvature, 1 + h; by its quartiles, since in the neck of a
    funnel it is of another order.
    """
    x, _ = non_centered.from_unconstrained(u)
    _, gradients = value_and_gradient(non_centered, x)
    ordered = gradients[gradients.isfinite().all(-1)].sort(0).values
    between = ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]
    curvature = (between / _BETWEEN_QUARTILES).square()
    return _centered(non_centered.coordinates.centered.detach(), curvature)


def _centered(lam: Tensor, curvature: Tensor) -> Tensor:
    """lambda by 1 + h where it is below 1, each of shape ``(latent_dim,)``."""
    curvature = curvature.nan_to_num(1.0, 1e6, 1.0).clamp_min(1.0)
    lam = torch.where(lam < 1, 1 - 1 / curvature, lam)
    return torch.where(lam > _CENTERED, 1.0, lam)


def non_centered(log_joint: Any, with_shapes: bool = False) -> Any:
    """A log joint density with lambda 0 for all latents that may have coordinates, if it has none yet.

    :param with_shapes: see :func:`find_mapped`.
    """
    if log_joint.coordinates is not None or not log_joint.maps_priors:
        return log_joint
    if not (sites := log_joint.mapped_sites(with_shapes)):
        return log_joint
    ones = torch.ones_like(log_joint.start)
    found = Coordinates(ones, ones, dict.fromkeys(sites, True)).non_centered(log_joint.latents)
    return log_joint.with_coordinates(found)


def with_strong_data_centered(log_joint: Any, gradients: Tensor, has_parents: Tensor) -> Any:
    """A density with lambda 0, or 1 for those elements of which data say far more than their priors.

    The variance of a gradient under the posterior is the mean curvature, 1 + h in
    :func:`centered_by_curvature`. Where it is not large in nine chains of ten, as where some are in the neck
    of a funnel, lambda stays 0.

    :param gradients: in the coordinates of the density, by chain: shape ``(C, n, latent_dim)``.
    :param has_parents: where priors depend on other latents, shape ``(latent_dim,)``; else lambda stays 0.
    """
    given = log_joint.coordinates
    if given is None:
        return log_joint
    curvature = gradients.var(1).quantile(0.1, 0)
    is_strong = (curvature > 1 / (1 - _CENTERED)) & (given.centered < 1) & has_parents
    if not bool(is_strong.any()):
        return log_joint
    centered = given.centered.masked_fill(is_strong, 1.0)
    return log_joint.with_coordinates(Coordinates(centered, given.unit, given.with_location))


@torch.no_grad()
def coordinates_at(
    log_joint: Any, mapped: Coordinates, u: Tensor, together: Tensor | None = None
) -> Coordinates:
    """As centred as the curvature at points ``(n, latent_dim)`` asks, with the units of the prior there.

    :param mapped: which latents of the log joint density have coordinates.
    :param u: the points, on the unconstrained space.
    :param together: see :func:`centered_by_curvature`.
    """
    unit = log_joint.with_coordinates(mapped.non_centered(log_joint.latents))
    x, _ = unit.from_unconstrained(u)
    centered = centered_by_curvature(unit, x, together)
    return Coordinates(centered, log_joint.prior_scales(u.mean(0)), mapped.with_location)
