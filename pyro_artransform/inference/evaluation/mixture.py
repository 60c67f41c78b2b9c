# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""One sample from several densities, and what its weights say of the posterior's mass.

The sample has strata: draws of all widths around those of a guide, and draws at each place that a search has
proposed. A draw counts by the density of all strata together, whichever it came from (the balance heuristic
of a deterministic mixture), so that no weight is larger than that of the best stratum. The guide itself is
none of them: its density is known at its own draws alone, and what it leaves out it has no draws of.

Places have regions: the share of the Gaussian of each, as far as it reaches, in the sum of all of them and
that of the guide. Where the guide is the posterior both have the same mass in each region, whatever the
regions are. What has much mass by the weights and few of the guide's draws is lost; and so is a tail, of
chains in the place of a guide, with more mass beyond a quantile than they have draws. Chains that never
enter a tail agree, whatever R-hat is asked of them.

**References**

1. Optimally Combining Sampling Techniques for Monte Carlo Rendering (Veach, Guibas, 1995),
   https://doi.org/10.1145/218380.218498
2. Safe and Effective Importance Sampling (Owen, Zhou, 2000),
   https://doi.org/10.1080/01621459.2000.10473909
3. Generalized Multiple Importance Sampling (Elvira, Martino, Luengo, Bugallo, 2019),
   https://doi.org/10.1214/18-STS668
4. Truncated Importance Sampling (Ionides, 2008), https://doi.org/10.1198/106186008X320456
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..initialization.gaussians import Density, Gaussians, evaluate_density

# the share of the draws in each tail that is looked at, and by how many standard errors there must be more
_TAIL, _NUM_SES = 0.005, 4.0


class Shape(NamedTuple):
    """A density: a Gaussian, or, where it is heavy, half of that and half of a Cauchy of its scale.

    The multivariate Cauchy has draws at all distances, so that a spike sees a wide part around it; the
    Gaussian half is what is left of such draws in many dimensions. Angles are those of one turn.
    """

    gaussian: Gaussians
    is_heavy: bool = False
    is_circular: Tensor | None = None

    def stratum(self, log_density: Density, count: int) -> "Stratum":
        """Draws, with their weights; those of angles beyond a turn have none."""
        noise = torch.randn_like(self.gaussian.loc.expand(count, -1))
        if self.is_heavy:
            far = noise[count // 2 :]
            far /= torch.randn_like(far[:, :1]).abs()
        away = self.gaussian.deviations(noise)[0]
        draws = self.gaussian.loc + away
        log_p = evaluate_density(log_density, draws)
        if self.is_circular is not None:
            is_beyond = (self.is_circular & (away.abs() > math.pi)).any(-1)
            log_p = log_p.masked_fill(is_beyond, -torch.inf)
        return Stratum(draws, log_p - self.log_probs(draws)[0][0], self)

    def log_probs(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The log density, and that of the Gaussian alone where its draws are.

        :param points: shape ``(n, D)``; of S densities ``(S, n, D)``, each has its own.
        :return: shape ``(S, n)``.
        """
        dim = points.shape[-1]
        squares = squared_distances(self.gaussian, points, self.is_circular)
        log_volume = self.gaussian.log_volume()[:, None]
        normal = -0.5 * squares - 0.5 * dim * math.log(2 * math.pi) - log_volume
        near = normal.masked_fill(squares > dim + 3 * math.sqrt(2 * dim), -torch.inf)
        if not self.is_heavy:
            return normal, near
        half = 0.5 * (1 + dim)
        cauchy = math.lgamma(half) - half * (math.log(math.pi) + squares.log1p()) - log_volume
        return torch.logaddexp(normal, cauchy) - math.log(2), near


class Stratum(NamedTuple):
    """Draws ``(n, D)``, the density of the model over their own ``(n,)``, and what they look like."""

    draws: Tensor
    log_weights: Tensor
    shape: Shape


class Mixture(NamedTuple):
    """What strata say together."""

    log_evidence: float  #: by all strata, ``nan`` without one around the guide
    log_evidence_se: float
    log_masses: Tensor  #: of the posterior in the region of each place, shape ``(K,)``
    shares_of_draws: Tensor  #: of the guide there
    points: Tensor  #: the draws of all strata ``(n, D)``
    log_weights: Tensor  #: theirs ``(n,)``, the sum of the weights is the evidence

    @classmethod
    def of(
        cls, draws: Tensor, guide: Shape, around: Sequence[Stratum], places: Sequence[Stratum]
    ) -> "Mixture":
        """Of strata around a guide and at K places; the guide's draws are ``(n, D)``."""
        strata = [*around, *places]
        if not strata:
            none = draws.new_zeros(0)
            return cls(math.nan, math.nan, none, none, draws[:0], none)
        points = torch.cat([s.draws for s in strata])
        densities = [s.shape.log_probs(points) for s in strata]
        by_stratum, near = (torch.cat(each).double() for each in zip(*densities))
        log_weights = _balanced_weights(strata, by_stratum)
        log_evidence = log_weights.logsumexp(0)
        variances = [
            len(each) * (each - log_evidence).exp().var(correction=0).item()
            for each in log_weights.split([len(s.draws) for s in strata])
        ]
        by_guide = guide.log_probs(points)[0].double()
        regions = torch.cat([by_guide, near[len(around) :]]).log_softmax(0)[1:]
        of_draws = [guide.log_probs(draws)[0], *(s.shape.log_probs(draws)[1] for s in places)]
        return cls(
            log_evidence.item() if around else math.nan,
            math.sqrt(sum(variances)),
            (regions + log_weights).logsumexp(-1),
            torch.cat(of_draws).double().softmax(0)[1:].mean(-1),
            points,
            log_weights,
        )

    def missed_tail(
        self, draws: Tensor, ess: Tensor, log_evidence: float
    ) -> tuple[int, float] | None:
        """The latent with the clearest tail that draws ``(n, D)`` of chains lack, and the mass there.

        :param ess: the effective number of draws in the tails of each latent, shape ``(D,)``.
        :param log_evidence: that of a guide; where all strata find more, theirs counts.
        """
        weights = (self.log_weights - max(self.log_evidence, log_evidence)).exp()[:, None]
        ordered, count = draws.sort(0).values, int(_TAIL * len(draws))
        is_beyond = torch.cat([self.points < ordered[count], self.points > ordered[-1 - count]], 1)
        masses = (weights * is_beyond).sum(0)
        variances = (weights.square() * is_beyond).sum(0) + masses / ess.repeat(2)
        num_ses = ((masses - _TAIL) / variances.sqrt()).nan_to_num(0.0)
        at = int(num_ses.argmax())
        return (at % len(ess), float(masses[at])) if num_ses[at] > _NUM_SES else None


def _balanced_weights(strata: Sequence[Stratum], by_stratum: Tensor) -> Tensor:
    """Log weights of all draws, of the model over the densities of all strata: their sum is the evidence."""
    sizes = [len(s.draws) for s in strata]
    own = torch.cat([log_q.split(sizes)[k] for k, log_q in enumerate(by_stratum)])
    of_all = (by_stratum + by_stratum.new_tensor(sizes).log()[:, None]).logsumexp(0)
    log_weights = torch.cat([s.log_weights for s in strata]).double() + own - of_all
    log_weights = log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    # no draw decides alone: truncated as in the last reference
    return log_weights.clamp_max(log_weights.logsumexp(0) - 0.5 * math.log(len(own)))


def squared_distances(
    gaussian: Gaussians, points: Tensor, is_circular: Tensor | None = None
) -> Tensor:
    """Squared distances ``(S, n)`` of points from the means of Gaussians, in their units."""
    away = points - gaussian.loc[:, None]
    if is_circular is not None:
        away = torch.where(is_circular, wrapped(away), away)
    return gaussian.units(away).square().sum(-1)


def wrapped(angles: Tensor) -> Tensor:
    """Angles less whole turns, from -pi to pi."""
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi
