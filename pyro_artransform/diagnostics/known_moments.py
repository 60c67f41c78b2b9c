# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Means and mean squares of a guide, and of the law of the chains that a posterior's are paired with."""

from typing import NamedTuple

import torch
from torch import Tensor

from .hamiltonian import ToLatent
from .preconditioning import Stretched

# pairs of opposite draws: an sd is known to 1 %, a mean of a transform that is nearly linear much better
_NUM_PAIRS = 4000
_AT_A_TIME = 500


class Expectation(NamedTuple):
    """The expectation of a function under the guide and under the companions' law, shape ``(D,)``.

    Both are from draws, with variances and a covariance: a draw of one may belong to a draw of the
    other, and then much of the noise of a difference cancels.
    """

    guide: Tensor
    known: Tensor
    guide_variance: Tensor
    known_variance: Tensor
    covariance: Tensor

    @classmethod
    def of_draws(cls, guide: Tensor, known: Tensor) -> "Expectation":
        """That of values at paired draws, of shape ``(n, D)`` each."""
        means = guide.mean(0), known.mean(0)
        one, other = guide - means[0], known - means[1]
        scale = 1 / (len(guide) * (len(guide) - 1))
        moments = ((a * b).sum(0) * scale for a, b in ((one, one), (other, other), (one, other)))
        return cls(*means, *moments)

    @classmethod
    def of_known(cls, guide: Tensor, known: Tensor) -> "Expectation":
        """That of values at draws of the guide, ``(n, D)``, where the other is exact, ``(D,)``."""
        zeros = torch.zeros_like(known)
        return cls(guide.mean(0), known, guide.var(0) / len(guide), zeros, zeros)

    def error_variance(self, guide_share: Tensor, known_share: Tensor) -> Tensor:
        """The variance of a share of the one less a share of the other."""
        own = (
            guide_share.square() * self.guide_variance + known_share.square() * self.known_variance
        )
        return (own - 2 * guide_share * known_share * self.covariance).clamp_min(0)


class Laws(NamedTuple):
    """What is known of the guide and of the companions' law: the means and the mean squares."""

    mean: Expectation
    square: Expectation


def laws_of_draws(draws: Tensor, stretched: Stretched) -> Laws:
    """The moments of standardized draws, and those of a standard normal that was stretched."""
    widened = stretched.directions.square() @ (stretched.factors.square() - 1)
    mean = Expectation.of_known(draws, torch.zeros_like(widened))
    return Laws(mean, Expectation.of_known(draws.square(), 1 + widened))


def laws_of_transform(
    transform: ToLatent, stretched: Stretched, loc: Tensor, scale: Tensor
) -> Laws:
    """The moments of a transformed standard normal, and of one that was stretched before that."""
    base = torch.randn(_NUM_PAIRS, len(loc), dtype=loc.dtype, device=loc.device)
    means, squares = [], []
    for part in base.split(_AT_A_TIME):
        of_guide = _mean_of_pairs(transform, part, loc, scale)
        known = of_guide
        if len(stretched.factors):
            known = _mean_of_pairs(stretched.before(transform), part, loc, scale)
        means.append((of_guide[0], known[0]))
        squares.append((of_guide[1], known[1]))
    return Laws(*(Expectation.of_draws(*map(torch.cat, zip(*parts))) for parts in (means, squares)))


def _mean_of_pairs(
    transform: ToLatent, base: Tensor, loc: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The values and squares at pairs of opposite points, whose odd parts cancel."""
    one, other = ((transform(points)[0] - loc) / scale for points in (base, -base))
    return (one + other) / 2, (one.square() + other.square()) / 2
