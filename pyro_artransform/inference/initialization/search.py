# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The initial guide: the best of many candidates, by their ELBO on common noise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from ...joint import LogDensity
from ...joint.protocols import FlowGuide
from ..config import InitializationConfig
from .gaussians import (
    Gaussians,
    Modes,
    antithetic_noise,
    climb,
    concatenate,
    elbos,
    evaluate_density,
    fit_mean_field,
)

#: the name of the candidate that is the guide itself, which then does not change
UNCHANGED = "initial guide"


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
    """Makes a guide the best of: itself, Gaussians on the way to modes, mean-field fits.

    :param model: the model, with its arguments.
    :raises ValueError: if the density has no gradient, or neither the guide nor any candidate has a finite
        ELBO.
    """
    if log_density.strategy == "loop":
        config = config.for_loop()
    own_elbo, needed, center = judge_guide(log_density, guide, config)
    _check_gradient(log_density, center)
    search = GaussianSearch(log_density, model, config)
    best = search.best(center)
    if best is not None:
        chosen, gaussian = best
        if chosen.elbo > needed and search.start_at(gaussian, guide, own_elbo):
            return chosen
        if own_elbo > -torch.inf:
            return InitialGuide(UNCHANGED, own_elbo, chosen.modes)
    sites = ", ".join(log_density.nonfinite_sites(center[None])) or "the sum of its sites"
    raise ValueError(
        "expected a model with a finite log density somewhere near its starting values, found none: "
        f"{sites} is not finite there. Give the guide an init_loc_fn with values that the data allow"
    )


def _check_gradient(log_density: LogDensity, z: Tensor) -> None:
    """Refuses a density that gradients do not go through."""
    z = z.detach()[None].requires_grad_()
    with torch.enable_grad():
        value = log_density(z).sum()
    if not value.requires_grad or torch.autograd.grad(value, z, allow_unused=True)[0] is None:
        raise ValueError(
            "expected a model whose log density has a gradient in its latents, got one without: does it "
            "run in torch.no_grad, or detach them?"
        )


def judge_guide(
    log_density: LogDensity, guide: FlowGuide, config: InitializationConfig
) -> tuple[float, float, Tensor]:
    """The ELBO of a guide as it is, the one that a candidate has to exceed, and the guide's median."""
    with torch.no_grad():
        z, log_q = guide.rsample_and_log_prob(config.num_fine)
    ratios = evaluate_density(log_density, z) - log_q
    elbo = ratios.mean().nan_to_num(-torch.inf, -torch.inf, -torch.inf).item()
    needed = _upper_bound(ratios, config.min_gain_in_se) + config.min_gain
    return elbo, needed, z.median(0).values


def _upper_bound(ratios: Tensor, num_se: float) -> float:
    """The mean and so many of its standard errors; the median if it is between: tails are one-sided."""
    mean, median = ratios.mean(), ratios.median()
    error = (ratios.std() / len(ratios) ** 0.5).nan_to_num(0.0, 0.0, 0.0)
    bound = mean + num_se * error
    bound = torch.where((mean <= median) & (median < bound), median, bound)
    return bound.nan_to_num(-torch.inf, -torch.inf, -torch.inf).item()


@dataclass(frozen=True)
class GaussianSearch:
    """A search for the Gaussian with the largest ELBO."""

    log_density: LogDensity
    model: Callable[[], object]
    config: InitializationConfig

    def start_at(self, gaussian: Gaussians, guide: FlowGuide, own_elbo: float) -> bool:
        """Starts a guide at a Gaussian, without its correlations if the guide cannot have any.

        :return: whether it did, which it does not where that is worse than the guide itself.
        """
        try:
            guide.start_at(gaussian.loc[0], gaussian.scale_tril[0])
        except ValueError:
            independent = gaussian.diagonal()
            noise = antithetic_noise(independent.loc, self.config.num_fine)
            if elbos(self.log_density, independent, noise).item() <= own_elbo:
                return False
            guide.start_at(independent.loc[0], independent.scale_tril[0])
        return True

    def best(self, center: Tensor) -> tuple[InitialGuide, Gaussians] | None:
        """The best candidate around a point, and itself as S = 1 Gaussians.

        :return: ``None`` if no point has a finite density.
        """
        points = self.points(center)
        if not len(points):
            return None
        candidates, modes = self._candidates(points)
        names = []
        for name, part in candidates.items():
            names += [name] * len(part.loc)
        gaussians = concatenate(candidates.values())
        noise = antithetic_noise(points, self.config.num_rough)
        rough = elbos(self.log_density, gaussians, noise)
        finalists = rough.argsort(descending=True)[: self.config.num_finalists]
        noise = antithetic_noise(points, self.config.num_fine)
        fine = elbos(self.log_density, gaussians.take(finalists), noise)
        k = fine.argmax(keepdim=True)
        chosen = InitialGuide(names[int(finalists[k])], fine[k].item(), modes)
        return chosen, gaussians.take(finalists[k])

    def _candidates(self, points: Tensor) -> tuple[dict[str, Gaussians], Modes | None]:
        """Candidates by their kind, and the modes."""
        density, config = self.log_density, self.config
        unit = torch.diag_embed(torch.ones_like(points))
        narrow = config.narrow_scale * unit
        noise = antithetic_noise(points, config.num_rough)
        rough = elbos(density, Gaussians(points, narrow), noise)
        promising = points[rough.argsort(descending=True)[: config.num_mean_fields]]
        candidates = {"a mean-field fit": fit_mean_field(density, promising, config)}
        if density.latents.latent_dim > config.max_hessian_dim:
            return candidates, None
        noise = antithetic_noise(points, config.num_rough)
        try:
            modes, best = climb(density, points, noise, config.max_newton_steps)
        except RuntimeError:  # a model whose gradient cannot be differentiated has no Hessian
            return candidates, None
        candidates["a Gaussian on the way to a mode"] = best
        candidates["the curvature at a mode"] = modes.gaussians
        candidates["a mode, with unit scale"] = Gaussians(modes.gaussians.loc, unit)
        candidates["a mode, with a small scale"] = Gaussians(modes.gaussians.loc, narrow)
        return candidates, modes

    def points(self, center: Tensor) -> Tensor:
        """Points of finite density: the center, draws of the prior, and in shells around the center.

        A point without a finite density is moved towards one that has it.

        :param center: shape ``(latent_dim,)``.
        :return: shape ``(S, latent_dim)``, S from 0 to ``config.num_points``.
        """
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
        values: dict[str, Any] = {}
        for name in latents.sites:
            values[name] = trace.nodes[name]["value"]
        return latents.unconstrain(values)
