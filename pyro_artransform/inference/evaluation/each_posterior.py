# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The verdict on many posteriors at once, on each by its own weights.

The weights of all together are products, whose tail is hopeless where each alone is good: a thousand gaps of
0.01 nats are one of 10. So k-hat and gap are those of each posterior.

Modes that a guide has missed are searched for in all at once: a row of points is one for each of them, a
gradient at it has the gradients of all, and each climbs by its own. Where climbs end, draws of the Gaussian
of the curvature say how much mass there is, as of a single posterior (``missed_modes.py``): much where the
guide has few draws is lost.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...diagnostics import Importance
from ...diagnostics.importance import GOOD_ELBO_SE, GOOD_GAP, GOOD_LOST_MASS
from ...graphs.dependencies import value_and_gradient
from ...joint import log_density_by_element
from ...joint.posteriors import Posteriors
from ...time_limit import cut_off, has_limit, limited, say, within
from ..config import FitConfig
from ..initialization.gaussians import Gaussians, climb
from ..initialization.points import starting_points
from .elements import Elements
from .missed_modes import MIN_SHARE, NUM_FOR_MODES, moments
from .mode_search import Shape
from .verdict import ELSEWHERE

_CHUNK, _SMALL_CHUNK = 1000, 100
MOST_VALUES = 20_000_000  # of draws that are kept: 160 MB
_NUM_STEPS = 26  # of a climb
_SETTLED = 1e-4  # nats below which none of a row of points has gained
_SHELLS = (3.0, 10.0, 30.0)  # where points are far outside, in sds


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class EachPosterior(Elements):
    """What is known of each of E posteriors, which are those of the elements of a plate.

    A posterior is not trusted for what would keep a fit of it alone from being trusted. Of a thousand good
    ones some exceed a bound by chance: a k-hat of 0.5 with a standard error of 0.09 is above 0.7 once in
    80. So what the first draws object to has to be seen again at as many new ones, which do not know that
    it was chosen: once in 6,000. A k-hat of 0.9 is above 0.7 both times in 95 of 100 cases; a bound that
    grows with the number, as of :class:`Elements`, would let it pass.

    :param elbo: that of each, in nats, shape ``(E,)``, as all others; with its standard error ``elbo_se``.
    :param log_evidence: by Pareto-smoothed weights; ``log_evidence_se`` is its standard error.
    :param ess: the effective number of the draws behind all this.
    :param searched_by: how modes of each were searched for: by "curvature", or "none".
    """

    elbo: Tensor
    elbo_se: Tensor
    log_evidence: Tensor
    log_evidence_se: Tensor
    ess: Tensor
    searched_by: str = "none"

    def numbers(self, elbo: float) -> dict[str, float]:
        """Those of a result on all, of a given ELBO: the product's evidence, the worst of the rest."""
        worst = int(self.khat.argmax())
        return {
            "log_evidence": elbo + float(self.gap.sum()),
            "log_evidence_se": float(self.log_evidence_se.square().sum().sqrt()),
            "khat": float(self.khat[worst]),
            "khat_se": float(self.khat_se[worst]),
            "ess": float(self.ess.min()),
        }

    @property
    def praise(self) -> str:
        """The verdict on all where each is trusted."""
        gap, khat = self.gap.max(), self.khat.max()
        return (
            f"Trusted: each of the {len(self.elbo):,} posteriors of plate '{self.plate}'. Their ELBOs are at "
            f"most {gap:.3f} nats below the log evidence, and k-hat is at most "
            f"{khat:.2f}{ELSEWHERE[self.searched_by]}"
        )


def weigh_each(
    posteriors: Posteriors, config: FitConfig
) -> tuple[EachPosterior, Importance, Tensor] | None:
    """What is known of each, the importance of all together, and the first draws ``(m, latent_dim)``.

    None where the weights of all together are good, so that those of each are.
    """
    count, log_joint = config.evaluation.num_samples, posteriors.log_joint
    chunk = min(count, _SMALL_CHUNK if has_limit() else _CHUNK)
    with within(0.5):
        z, _, rest = posteriors.log_weights(chunk)
        log_joint.checked(z, torch.zeros_like(rest))  # a model that mixes draws is found here
        weights, rest, latents = _draw(posteriors, count, chunk)
    joint = Importance.from_log_weights(weights.sum(1) + rest)
    if joint.trusted and joint.is_close:
        return None
    found = [Importance.from_log_weights(own) for own in weights.T]
    suspects = [k for k, own in enumerate(found) if _fault_of(own)]
    if suspects:
        again, _, _ = _draw(posteriors, count, chunk)
        for k in suspects:
            found[k] = Importance.from_log_weights(again[:, k])
    names = ("elbo", "elbo_se", "log_evidence", "log_evidence_se", "khat", "khat_se", "ess")
    numbers: dict[str, Any] = {
        name: weights.new_tensor([getattr(own, name) for own in found]) for name in names
    }
    objections = {k: words for k in suspects if (words := _fault_of(found[k]))}
    searched_by = "none"
    if len(posteriors.elements) <= posteriors.size * config.evaluation.max_dense_dim:
        say("verdict: the search for mass elsewhere")
        with cut_off("the search for mass elsewhere"), within(0.7):
            search = EachSearch(posteriors, latents[:NUM_FOR_MODES])
            lost = search.shares_lost(config, numbers["log_evidence"].to(latents))
            searched_by = "curvature"
            for k in (lost > GOOD_LOST_MASS).nonzero()[:, 0].tolist():
                objections[k] = f"about {100 * lost[k]:.0f} % of it in a mode without draws"
    gap, places = numbers["log_evidence"] - numbers["elbo"], torch.arange(len(found), device="cpu")
    numbers |= {"objections": objections, "gap": gap, "index": places, "searched_by": searched_by}
    return EachPosterior(plate=posteriors.plate, **numbers), joint, latents


def _draw(posteriors: Posteriors, count: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights of each ``(n, E)`` and of the rest ``(n,)``, and the first draws ``(m, latent_dim)``."""
    weights, rests, latents = list[Tensor](), list[Tensor](), list[Tensor]()
    for start in limited(range(0, count, chunk), at_least=1):
        z, of_each, rest = posteriors.log_weights(min(chunk, count - start))
        weights.append(of_each)
        rests.append(rest)
        if sum(each.numel() for each in latents) < MOST_VALUES:
            latents.append(z)
    return torch.cat(weights), torch.cat(rests), torch.cat(latents)


def _fault_of(found: Importance) -> str:
    """What keeps a posterior from being trusted, in words; empty where nothing does."""
    if found.num_nonfinite or not math.isfinite(found.elbo):
        return f"the density is zero or fails at {found.num_nonfinite} of {found.num_samples} draws"
    if found.has_heavy_tail:
        return f"k-hat {found.khat:.2f} ± {found.khat_se:.2f}"
    if found.elbo_se > GOOD_ELBO_SE:
        return f"an ELBO known to {found.elbo_se:.2g} nats only"
    gap = found.log_evidence - found.elbo
    return f"an ELBO {gap:.2f} nats below the log evidence" if gap > GOOD_GAP else ""


class EachSearch:
    """A search for modes of E posteriors of d latents each, by draws ``(m, latent_dim)`` of a guide."""

    def __init__(self, posteriors: Posteriors, draws: Tensor) -> None:
        self.posteriors = posteriors
        #: the coordinates of each, shape ``(E, d)``
        self.index = posteriors.elements.argsort(stable=True).reshape(posteriors.size, -1)
        self.draws = draws[:, self.index].movedim(1, 0)  #: shape ``(E, m, d)``
        self.around = Shape(moments(self.draws, self.index.shape[1]))

    def shares_lost(self, config: FitConfig, log_evidence: Tensor) -> Tensor:
        """The share of each posterior in its largest mode without draws of the guide, 0 without one.

        :param log_evidence: according to draws of the guide, shape ``(E,)``.
        """
        lost = torch.zeros_like(log_evidence)
        points = self._points(config.initialization.num_points)
        modes = climb(self._log_densities, points, _NUM_STEPS, self._gradients, _SETTLED)
        for k in limited(range(len(points))):
            mass, of_draws = self._mass_at(modes.gaussians.take(k), config.evaluation.num_for_mode)
            share = (mass - log_evidence).sigmoid()
            is_lost = modes.converged[k] & (of_draws < MIN_SHARE * share)
            lost = torch.where(is_lost, torch.maximum(lost, share), lost)
        return lost

    def _points(self, count: int) -> Tensor:
        """Points of the prior, around the guide, far outside and mirrored, shape ``(P, E, d)``."""
        density, around = self.posteriors.log_joint, self.around.gaussian
        center = torch.empty_like(density.start)
        center[self.index] = around.loc
        near = starting_points(density, center, count)
        images = torch.stack([-center, 2 * density.start - center])
        rows = torch.cat([near, images])[:, self.index]
        noise = torch.randn_like(around.loc.expand(len(_SHELLS), -1, -1))
        noise *= noise.new_tensor(_SHELLS)[:, None, None]
        afar = around.loc + around.deviations(noise.movedim(1, 0)).movedim(1, 0)
        points = torch.cat([rows, afar])
        is_finite = self._log_densities(points).isfinite()[..., None]
        return torch.where(is_finite, points, around.loc)

    def _packed(self, points: Tensor) -> Tensor:
        """Points ``(..., E, d)`` as rows of all latents ``(n, latent_dim)``."""
        rows = points.reshape(-1, self.index.numel())
        return torch.empty_like(rows).index_copy_(1, self.index.flatten(), rows)

    def _log_densities(self, points: Tensor) -> Tensor:
        """The log density of each at points ``(..., E, d)``; ``-inf`` where it is not finite."""
        log_joint, plate = self.posteriors.log_joint, self.posteriors.plate
        found, _ = log_density_by_element(log_joint, self._packed(points), plate)
        found = found.reshape(points.shape[:-1])
        return found.nan_to_num(-torch.inf, -torch.inf, -torch.inf)

    def _gradients(self, points: Tensor) -> Tensor:
        """The gradients of the log densities of each at points ``(..., E, d)``."""
        _, gradients = value_and_gradient(self.posteriors.log_joint, self._packed(points))
        return gradients[:, self.index].reshape(points.shape)

    def _mass_at(self, mode: Gaussians, count: int) -> tuple[Tensor, Tensor]:
        """The log mass ``(E,)`` in the region of a mode of each, and the share of the guide's draws there."""
        noise = torch.randn_like(mode.loc.expand(count, -1, -1)).movedim(1, 0)
        draws, shape = mode.loc[:, None] + mode.deviations(noise), Shape(mode)
        log_weights = self._log_densities(draws.movedim(1, 0)).T - shape.log_probs(draws)[0]
        # no draw decides alone
        total = log_weights.logsumexp(1, keepdim=True)
        log_weights = log_weights.clamp_max(total - 0.5 * math.log(count))
        of_mode, of_draws = (
            (shape.log_probs(each)[1] - self.around.log_probs(each)[0]).sigmoid()
            for each in (draws, self.draws)
        )
        mass = (log_weights + of_mode.log()).logsumexp(1) - math.log(count)
        return mass, of_draws.mean(1)
