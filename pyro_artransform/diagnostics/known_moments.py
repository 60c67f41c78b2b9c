# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Means and mean squares of a guide, and of the chains that those of a posterior are paired with."""

from typing import NamedTuple

import torch
from torch import Tensor

from .hamiltonian import ToLatent
from .preconditioning import Stretched

# pairs of opposite draws: an sd is known to 1 %, a mean of a transform that is nearly linear much better
_NUM_PAIRS = 4000
_AT_A_TIME = 500


class Expectation(NamedTuple):
    """The expectation of a function under the guide and under the companions' distribution, shape ``(D,)``.

    Both are from draws, with variances and a covariance: a draw of one may belong to a draw of the
    other, and then much of the noise of a difference cancels.
    """

    guide: Tensor
    known: Tensor
    guide_variance: Tensor
    known_variance: Tensor
    covariance: Tensor

    @classmethod
    def of_sums(cls, sums: Tensor, count: int) -> "Expectation":
        """That of values at paired draws, from the sums that :func:`sums_of_pairs` gives of them."""
        guide, known, squares, known_squares, products = sums / count
        moments = (
            squares - guide.square(),
            known_squares - known.square(),
            products - guide * known,
        )
        return cls(guide, known, *(moment / (count - 1) for moment in moments))

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


class PairedMoments(NamedTuple):
    """What is known of the guide and of the companions' distribution: the means and the mean squares."""

    mean: Expectation
    square: Expectation


def moments_of_draws(draws: Tensor, stretched: Stretched) -> PairedMoments:
    """The moments of standardized draws, and those of a standard normal that was stretched."""
    widened = stretched.directions.square() @ (stretched.factors.square() - 1)
    mean = Expectation.of_known(draws, torch.zeros_like(widened))
    return PairedMoments(mean, Expectation.of_known(draws.square(), 1 + widened))


def moments_of_transform(
    transform: ToLatent, stretched: Stretched, loc: Tensor, scale: Tensor
) -> PairedMoments:
    """The moments of a transformed standard normal, and of one that was stretched before that."""
    means = squares = torch.zeros((5, 1), dtype=loc.dtype, device=loc.device)
    for _ in range(_NUM_PAIRS // _AT_A_TIME):
        base = torch.randn((_AT_A_TIME, len(loc)), dtype=loc.dtype, device=loc.device)
        of_guide = known = _mean_of_pairs(transform, base, loc, scale)
        if len(stretched.factors):
            known = _mean_of_pairs(stretched.before(transform), base, loc, scale)
        means = means + sums_of_pairs(of_guide[0], known[0])
        squares = squares + sums_of_pairs(of_guide[1], known[1])
    return PairedMoments(
        Expectation.of_sums(means, _NUM_PAIRS), Expectation.of_sums(squares, _NUM_PAIRS)
    )


def sums_of_pairs(one: Tensor, other: Tensor) -> Tensor:
    """The sums of paired values, of their squares and of their products: ``(5, D)`` from ``(n, D)``."""
    return torch.stack([one, other, one.square(), other.square(), one * other]).sum(1)


def _mean_of_pairs(
    transform: ToLatent, base: Tensor, loc: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The values and squares at pairs of opposite points, whose odd parts cancel."""
    one, other = ((transform(points)[0] - loc) / scale for points in (base, -base))
    return (one + other) / 2, (one.square() + other.square()) / 2
