# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The initial guide: the better one of itself and a Gaussian that is fitted from several points, by ELBO.

A guide that knows the elements of plates by one mini-batch at a time starts near the best Gaussian of one.
"""

import math
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from ...joint import LogDensity, LogJoint
from ...joint.protocols import FlowGuide, MinibatchGuide, PriorGuide
from ..config import InitializationConfig
from ..loader import Batch
from .batch_and_match import ascend, fit_independent, match_scores
from .gaussians import (
    Gaussians,
    Modes,
    antithetic_noise,
    elbos,
    evaluate_density,
)

#: the name of the candidate that is the guide itself, which then does not change
UNCHANGED = "initial guide"
#: draws of a start that the curvature is averaged over
NUM_DRAWS = 8
#: how far lambda has to be from where a start was found for another one to be looked for
FAR = 0.05


class InitialGuide(NamedTuple):
    """The name of the candidate that was chosen, its ELBO, and the modes found on the way, if any."""

    name: str
    elbo: float
    modes: Modes | None


def find_initial_guide(
    log_density: LogDensity,
    model: Callable[[], object],
    guide: FlowGuide,
    config: InitializationConfig,
) -> InitialGuide:
    """Makes a guide the better one of itself and a Gaussian that is fitted from several points."""
    if log_density.strategy == "loop":
        config = config.for_loop()
    own_elbo, needed, center = judge_guide(log_density, guide, config)
    z = center.detach()[None].requires_grad_()
    with torch.enable_grad():
        value = log_density(z).sum()
    if not value.requires_grad or torch.autograd.grad(value, z, allow_unused=True)[0] is None:
        raise ValueError(
            "expected a model whose log density has a gradient in its latents, got one without: does it "
            "run in torch.no_grad, or detach them?"
        )
    best = GaussianSearch(log_density, model, config).best(center)
    if best is not None:
        chosen, gaussian = best
        if chosen.elbo > needed and _start_at(guide, gaussian, log_density, own_elbo, config):
            return chosen
        if own_elbo > -torch.inf:
            return InitialGuide(UNCHANGED, own_elbo, chosen.modes)
    sites = ", ".join(log_density.nonfinite_sites(center[None])) or "the sum of its sites"
    raise ValueError(
        "expected a model with a finite log density somewhere near its starting values, found none: "
        f"{sites} is not finite there. Give the guide an init_loc_fn with values that the data allow"
    )


def _start_at(
    guide: FlowGuide,
    gaussian: Gaussians,
    log_density: LogDensity,
    own_elbo: float,
    config: InitializationConfig,
) -> bool:
    """Starts a guide at a Gaussian, without correlations if it has none; not where that is worse."""
    try:
        guide.start_at(gaussian.loc[0], gaussian.scale_tril[0])
    except ValueError:
        # the nearest independent one in KL(q|p), of the same conditional deviations
        precision = torch.cholesky_inverse(gaussian.scale_tril).diagonal(dim1=-2, dim2=-1)
        independent = Gaussians(gaussian.loc, precision.rsqrt())
        noise = antithetic_noise(independent.loc, config.num_fine)
        if elbos(log_density, independent, noise).item() <= own_elbo:
            return False
        guide.start_at(independent.loc[0], independent.scale_tril[0].diag())
    return True


def judge_guide(
    log_density: LogDensity, guide: FlowGuide, config: InitializationConfig
) -> tuple[float, float, Tensor]:
    """The ELBO of a guide as it is, the one that a candidate has to exceed, and the guide's median."""
    with torch.no_grad():
        z, log_q = guide.rsample_and_log_prob(config.num_fine)
    ratios = evaluate_density(log_density, z) - log_q
    mean, median = ratios.mean(), ratios.median()
    error = (ratios.std() / len(ratios) ** 0.5).nan_to_num(0.0, 0.0, 0.0)
    bound = mean + config.min_gain_in_se * error
    # tails are one-sided: the median if it is between
    bound = torch.where((mean <= median) & (median < bound), median, bound)
    elbo, bound = torch.stack([mean, bound]).nan_to_num(-torch.inf, -torch.inf, -torch.inf).tolist()
    return elbo, bound + config.min_gain, z.median(0).values


@dataclass(frozen=True)
class GaussianSearch:
    """A search for the Gaussian with the largest ELBO."""

    log_density: LogDensity
    model: Callable[[], object]
    config: InitializationConfig

    def best(self, center: Tensor) -> tuple[InitialGuide, Gaussians] | None:
        """The best candidate around a point, and itself as S = 1 Gaussians; needs a finite density."""
        points = self.points(center)
        if not len(points):
            return None
        config, density = self.config, self.log_density
        dim, modes = density.latents.latent_dim, None
        if dim > config.max_dense_dim:
            settings = config.narrow_scale, config.min_draws, config.num_matches
            name, fitted = "a mean-field fit", fit_independent(density, points, *settings).dense()
        else:
            # a Gaussian is known from as many draws as it has dimensions
            num_draws = max(dim + config.num_more_draws, config.min_draws)
            name, settings = "a Gaussian", (config.narrow_scale, num_draws, config.num_matches)
            fitted = match_scores(density, points, *settings)
            bounds = elbos(density, fitted, antithetic_noise(points, num_draws))
            modes = Modes.of_masses(fitted, bounds, bounds.isfinite())
        rough, noise = (antithetic_noise(points, n) for n in (config.num_rough, config.num_fine))
        fitted, bounds = self._finite(fitted, rough)
        best = fitted.take([int(bounds.argmax())])
        if modes is not None:
            best = ascend(density, best, 2 * num_draws, config.num_ascents)
        best, bounds = self._finite(best, noise)
        return InitialGuide(name, bounds.item(), modes), best

    def _finite(self, gaussians: Gaussians, noise: Tensor) -> tuple[Gaussians, Tensor]:
        """Gaussians, narrower where they reach beyond a finite density, and their ELBOs."""
        for _ in range(self.config.max_halvings):
            bounds = elbos(self.log_density, gaussians, noise)
            if bool(bounds.isfinite().all()):
                break
            scale = torch.where(bounds.isfinite(), 1.0, 0.5).to(gaussians.scale_tril)
            gaussians = Gaussians(gaussians.loc, scale[:, None, None] * gaussians.scale_tril)
        return gaussians, bounds

    def points(self, center: Tensor) -> Tensor:
        """Points of finite density, or moved towards it: the center, of the prior, in shells around."""
        density, config = self.log_density, self.config
        found = [center, density.start]
        for _ in range(max((config.num_points - 1) // 3, 1)):
            found.append(self._prior_draw())
        for k in range(config.num_points - len(found)):
            radius = config.shell_radius * config.shell_growth**k
            shell = center + radius * torch.randn_like(center.expand(config.num_tried, -1))
            found.append(shell[evaluate_density(density, shell).argmax()])
        points = torch.stack(found[: config.num_points])
        points = points[points.isfinite().all(-1)]
        is_good = evaluate_density(density, points).isfinite()
        good = points[is_good]
        for _ in range(config.max_halvings):
            if not len(good) or bool(is_good.all()):
                break
            points = torch.where(is_good[:, None], points, 0.5 * (points + good[0]))
            is_good = evaluate_density(density, points).isfinite()
        return points[is_good]

    def _prior_draw(self) -> Tensor:
        """A draw of the prior; the start where the model refuses it."""
        latents, start = self.log_density.latents, self.log_density.start

        def sampled(site: dict[str, Any]) -> Tensor:
            try:
                value: Tensor = site["fn"].sample().detach()
            except NotImplementedError:  # an improper prior has no draws
                near = latents.split(start)[site["name"]]
                near = near + self.config.improper_radius * torch.randn_like(near)
                value = latents.sites[site["name"]].bijection(near)
            return value

        quiet = pyro.validation_enabled(False)
        try:
            with quiet, torch.no_grad(), poutine.block(), InitMessenger(sampled):
                trace = poutine.trace(self.model).get_trace()
        except (torch.linalg.LinAlgError, ValueError):
            return start
        values: dict[str, Any] = {name: trace.nodes[name]["value"] for name in latents.sites}
        return self.log_density.from_unconstrained(latents.unconstrain(values)[None])[0][0]


class SharedPrior(LogJoint):
    """The log joint density of a mini-batch by itself, with its share of the density of the globals.

    The mini-batch is a share of all data, and the same in each run; its elements have some of the latents.
    """

    def __init__(self, log_joint: LogJoint, share: float, elements: Collection[str]) -> None:
        vars(self).update(vars(log_joint))
        self._share, self._elements = share, elements
        if log_joint.is_random:
            self._run = partial(_run_from, torch.get_rng_state(), log_joint._run)

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
    unchanged = InitialGuide(UNCHANGED, math.nan, None)
    structure = log_joint.structure(*batch)
    is_large = log_joint.latents.latent_dim > config.max_minibatch_latents
    if not structure.global_latents or is_large or log_joint.strategy == "loop":
        return unchanged
    share, run = 1 / structure.scale, partial(model, *batch[0], **batch[1])
    elements = log_joint.latents.sites.keys() - set(structure.global_latents)
    shared = SharedPrior(log_joint, share, elements)
    few_points = replace(config, num_points=config.num_points_by_loop)

    def compare() -> float:  # on the same noise each time
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            elbo = elbo_draws(config.num_minibatch_compared).mean()
        return elbo.nan_to_num(-torch.inf, -torch.inf, -torch.inf).item()

    initial = saved_parameters(guide)
    found = [(unchanged._replace(elbo=compare()), initial)]

    def attempt() -> Tensor | None:
        """Starts in the coordinates that the guide has: draws on the unconstrained space."""
        density = shared.with_coordinates(guide.coordinates_of(shared.latents))
        best = GaussianSearch(density, run, few_points).best(density.start)
        if best is None or best[0].elbo == -torch.inf:
            return None
        chosen, gaussian = best
        noise = antithetic_noise(gaussian.loc, config.num_minibatch_draws)
        draws = gaussian.loc + noise @ gaussian.scale_tril[0].mT
        with suppress(torch.linalg.LinAlgError):  # at the edge of a support: without covariance
            guide.start_near(log_joint.latents.constrain(draws), share)
            modes = chosen.modes if share == 1 else None
            found.append((InitialGuide(chosen.name, compare(), modes), saved_parameters(guide)))
        with torch.no_grad():
            return density.to_unconstrained(draws[:NUM_DRAWS])[0]

    draws = attempt()
    if guide.chooses_coordinates:
        # by the curvature, then the model as it is written
        for points in (draws, None):
            restore_parameters(guide, initial)
            if guide.center_at(points, log_joint, share) > FAR:
                found.append((unchanged._replace(elbo=compare()), saved_parameters(guide)))
                attempt()
    best, saved = max(found, key=lambda pair: pair[0].elbo)
    restore_parameters(guide, saved)
    return best


def saved_parameters(guide: PriorGuide | MinibatchGuide) -> list[Tensor]:
    """Copies of the parameters of a guide."""
    return [parameter.detach().clone() for parameter in guide.parameters()]


@torch.no_grad()
def restore_parameters(guide: PriorGuide | MinibatchGuide, values: list[Tensor]) -> None:
    """Puts the parameters of a guide back, in place."""
    for parameter, value in zip(guide.parameters(), values):
        parameter.copy_(value)
