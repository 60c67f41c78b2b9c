# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Which latents are partially non-centred, and how much: their degree of centring, lambda.

The degree of centring of an element weighs the information in its data against its prior:

.. math::

    \lambda = \frac{h}{1 + h}, \qquad 1 + h = - \frac{\partial^2}{\partial x^2} \log p

in non-centred coordinates x, where the prior has curvature 1 and the likelihood curvature h. Elements with
weak data are non-centred. Elements with strong data are as the model is written: lambda above 0.95 is set to
1. The curvature is averaged over some points, or is the posterior variance of the gradient, its expectation.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..._base.arguments import shown
from ..graphs.dependencies import value_and_gradient
from ..run_once import run_once
from ..sites import SUPPORT_DEPENDS, Latents, same_support
from ..traces import subsampled_plates
from ..vectorization import fastest
from .coordinates import Coordinates
from .factors import find_factors
from .families import PriorScale, is_identity_or_exp
from .gaussian_sites import GaussianSites, LocScale

_STEP = 0.01  # of differences for second derivatives, in units of the prior

CoordinatesArgument = str | Mapping[str, Any]


# Which latents have coordinates from the prior


@torch.no_grad()
def find_mapped(run: Callable[[], object], latents: Latents, points: Tensor) -> dict[str, bool]:
    """The latents that may have coordinates from the prior, and whether it depends on other latents.

    :param points: two points, shape ``(2, latent_dim)``, between which priors are compared.
    :raises ValueError: if the support of a latent depends on other latents.
    """
    state, (start, other) = torch.get_rng_state(), map(latents.constrain, points)
    second = run_once(run, at=other)
    is_random = bool(subsampled_plates(second)) or not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)  # the same discrete latents and parts of data in both runs
    first = run_once(run, at=start)
    for name in latents.sites:
        fns: list[Any] = [t.nodes[name]["fn"] for t in (first, second) if name in t.nodes]
        both = [fn.support for fn in fns]
        if len(both) == 2 and not same_support(*both):
            raise ValueError(SUPPORT_DEPENDS.format(name=name, expected=both[0], got=both[1]))
    one, two = (priors_of(t.nodes, latents) for t in (first, second))
    if is_random:
        nodes: Iterable[tuple[str, Any]] = second.nodes.items()
        indices = {
            k: n["value"] for k, n in nodes if n["type"] == "sample" and site_is_subsample(n)
        }
        again = run_once(run, at={**other, **indices})
        torch.set_rng_state(state)
        # a prior that depends on a hidden discrete latent is not a function of the latents
        random = depend_on_latents(two, priors_of(again.nodes, latents))
        one = {k: prior for k, prior in one.items() if k not in random}
    dependent = depend_on_latents(one, two)
    return {k: k in dependent for k, prior in one.items() if prior.shape or k in dependent}


def scales_of(nodes: Mapping[str, Any], latents: Latents, like: Tensor) -> Tensor:
    """The scales of priors in a run as a vector ``(latent_dim,)``; 1 where a latent has none."""
    found, priors = torch.ones_like(like), priors_of(nodes, latents)
    for name, part in latents.views(found).items():
        if name in priors:
            part.copy_(priors[name].diagonal)
    return torch.where(found.isfinite() & (found > 0), found, 1.0)


def priors_of(nodes: Mapping[str, Any], latents: Latents) -> dict[str, PriorScale]:
    """The proper location-scale priors among the nodes of a traced run."""
    priors = dict[str, PriorScale]()
    for name, site in latents.sites.items():
        node: Any = nodes.get(name, {"mask": False})
        prior = None if node["mask"] is False else PriorScale.of(node["fn"])
        # enumerated discrete latents add dimensions
        if prior is None or prior.loc.dim() > node["value"].dim():
            continue
        # only with these bijections does a log density of u give that of the value
        if prior.log_prob is None or is_identity_or_exp(site.bijection):
            priors[name] = prior
    return priors


def depend_on_latents(
    one: Mapping[str, PriorScale | None], other: Mapping[str, PriorScale | None]
) -> list[str]:
    """The latents whose prior location or scale differs between two runs."""
    both = ((k, prior, other.get(k)) for k, prior in one.items())
    return [k for k, a, b in both if a and b and not all(map(torch.equal, a[:2], b[:2]))]


# How much they are centred


def centered_by_curvature(
    non_centered: Any, x: Tensor, together: Tensor | None = None, weights: Tensor | float = 1.0
) -> Tensor:
    """Computes lambda from second derivatives.

    :param non_centered: the log joint density in coordinates with lambda 0.
    :param x: points, shape ``(n, latent_dim)``; h is averaged over at most eight of them.
    :param together: labels, shape ``(latent_dim,)``. Coordinates of one label have no mixed second
        derivatives, like the elements of a plate, and share one Hessian-vector product.
    :param weights: factors by which the density of a coordinate is scaled down: the share of a mini-batch.
    :return: shape ``(latent_dim,)``; 1 for all other latents.
    """
    _, second = _second_derivatives(non_centered, x, together)
    return _centered(non_centered.coordinates.centered, -weights * second)


def _second_derivatives(
    non_centered: Any, x: Tensor, together: Tensor | None
) -> tuple[bool, Tensor]:
    """Whether density and gradient are usable at points ``(n, latent_dim)``; mean second derivatives."""
    is_mapped, found = non_centered.coordinates.centered < 1, torch.zeros_like(x[0])
    labels = torch.arange(len(found), device=x.device) if together is None else together
    x, is_sound = x[:: -(-len(x) // 8)], True
    for some in labels[is_mapped].unique().split(64):
        moved = (is_mapped & (labels == some[:, None])).to(x)[:, None]
        ends = torch.stack([x + _STEP * moved, x - _STEP * moved])
        values, slopes = _in_one_run(non_centered, torch.cat([x, ends.flatten(0, 2)]))
        forward, backward = slopes[len(x) :].view_as(ends)
        found += ((forward - backward) * moved).mean(1).sum(0) / (2 * _STEP)
        has_digits = values[: len(x)].abs() * torch.finfo(x.dtype).eps <= 1
        is_sound = is_sound and bool(has_digits.all() and slopes[: len(x)].isfinite().all())
    return is_sound, found


def _in_one_run(non_centered: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradients at points ``(n, latent_dim)``, without a comparison with single runs."""

    def evaluate(strategy: str) -> tuple[Tensor, Tensor]:
        return value_and_gradient(non_centered.by_strategy(strategy), x)

    return fastest(evaluate, lambda _: True, "vmap")[1]


def centered_by_draws(non_centered: Any, u: Tensor) -> Tensor:
    """Computes lambda from gradients at posterior draws ``(n, latent_dim)`` on the unconstrained space.

    Their variance is estimated from quartiles, since it is of another order in the neck of a funnel.
    """
    x, _ = non_centered.from_unconstrained(u)
    _, gradients = value_and_gradient(non_centered, x)
    ordered = gradients[gradients.isfinite().all(-1)].sort(0).values
    between = ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]
    curvature = (between / 1.349).square()  # which is 1 for a standard normal
    return _centered(non_centered.coordinates.centered, curvature)


def _centered(lam: Tensor, curvature: Tensor) -> Tensor:
    """Recomputes lambda from 1 + h where lambda is below 1; both have shape ``(latent_dim,)``."""
    curvature = curvature.nan_to_num(1.0, 1e6, 1.0).clamp_min(1.0)
    lam = torch.where(lam < 1, 1 - 1 / curvature, lam)
    return torch.where(lam > 0.95, 1.0, lam)


def non_centered(log_joint: Any, with_shapes: bool = False) -> Any:
    """A log joint density with lambda 0 for all latents that may be mapped, unless it has coordinates.

    :param with_shapes: whether to map priors with a shape although no prior depends on other latents, and
        latents that the model multiplies by others.
    """
    if log_joint.coordinates is not None or not log_joint.maps_priors:
        return log_joint
    factors = _factors_in(log_joint) if with_shapes else {}
    sites = dict.fromkeys([*log_joint.mapped_sites(with_shapes), *factors], True)
    zeros = torch.zeros_like(log_joint.start)
    found = Coordinates(log_joint.latents, sites, zeros, None, factors)
    return log_joint.with_coordinates(found) if sites else log_joint


def _factors_in(log_joint: Any) -> dict[str, int]:
    """The factors of latents by site; none if the model is looped over, or has discrete latents."""
    if log_joint.strategy == "loop" or log_joint.is_enumerated:
        return {}
    latents, start = log_joint.latents, log_joint.with_coordinates(None).start
    names = {name for name, site in latents.sites.items() if site.is_unconstrained}
    return find_factors(log_joint.run, latents.constrain(start), names)


@torch.no_grad()
def with_gaussian_sites(log_joint: Any, x: Tensor, gradients: Tensor) -> Any:
    """A density in coordinates given Gaussian sites that fit its likelihood; itself if there are none.

    :param x: draws in the coordinates of the density, shape ``(n, latent_dim)``.
    :param gradients: of its log density, same shape.
    """
    if (given := log_joint.coordinates) is None:
        return log_joint
    zeros = torch.zeros_like(given.unit)
    before = given.gaussian_sites or GaussianSites(zeros, zeros)
    priors = given.with_gaussian_sites(before).mapped(x, log_joint)
    prior = LocScale(priors["loc"], priors["scale"])
    found = before.refitted(x, gradients, prior, log_joint.latents.sizes)
    if not bool(found.precision.any()):
        return log_joint
    return log_joint.with_coordinates(given.with_gaussian_sites(found))


# The coordinates of guides


def check_coordinates(requested: CoordinatesArgument) -> Any:
    """The argument ``coordinates`` of a guide, with numbers as tensors.

    :raises ValueError: if it is not "prior", "model", or a mapping from sites to numbers between 0 and 1.
    """
    if isinstance(requested, Mapping):
        requested = {name: torch.as_tensor(value) for name, value in requested.items()}
        if all(bool(((c >= 0) & (c <= 1)).all()) for c in requested.values()):
            return requested
    elif isinstance(requested, str) and requested in ("prior", "model"):
        return requested
    raise ValueError(
        "coordinates: expected 'prior', 'model', or a mapping from sites to degrees of centring, "
        f"from 0 (non-centred) to 1 (as in the model), got {shown(requested)}"
    )


def find_sites(log_joint: Any, requested: CoordinatesArgument) -> dict[str, bool]:
    """The sites to map, and whether their prior depends on other latents; see ``LogJoint.mapped_sites``.

    :raises ValueError: if sites are requested that cannot be mapped.
    """
    with torch.random.fork_rng(devices=[]), poutine.block():
        found: dict[str, bool] = log_joint.mapped_sites()
    if not isinstance(requested, Mapping):
        return found
    if unknown := sorted(requested.keys() - found.keys()):
        raise ValueError(
            "coordinates: expected latents whose prior is not normal, or has a location or a scale "
            f"that depends on other latents, {list(found)}, got {unknown}"
        )
    return {name: found[name] for name in found if name in requested}


@torch.no_grad()
def center_at_start(
    given: Coordinates,
    requested: CoordinatesArgument,
    log_joint: Any,
    start: Tensor,
    together: Tensor | None,
) -> Tensor:
    """Sets lambda to the user's values or by the curvature; returns the start in coordinates.

    :param start: a point on the unconstrained space, shape ``(latent_dim,)``.
    :param together: see :func:`centered_by_curvature`.
    """
    with torch.random.fork_rng(devices=[]), poutine.block():
        if isinstance(requested, Mapping):
            given.set_requested(requested, log_joint.prior_scales(log_joint.or_usable(start).u))
        else:
            unit, point = log_joint.with_coordinates(given.non_centered()), start
            while True:
                x, _ = unit.from_unconstrained(point[None])
                is_sound, second = _second_derivatives(unit, x, together)
                other = point if is_sound else log_joint.or_usable(point).u
                if other is point:
                    break
                point = other
            centered = _centered(unit.coordinates.centered, -second)
            given.set_(centered, log_joint.prior_scales(point))
        return log_joint.with_coordinates(given).from_unconstrained(start[None])[0][0]
