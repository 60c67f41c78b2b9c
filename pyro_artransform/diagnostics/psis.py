# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Pareto-smoothed importance sampling: the tail of log weights, and k-hat, its index."""

from math import ceil, isfinite, log, nan, sqrt
from typing import NamedTuple

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

WORST_KHAT = 10.0  #: the largest k-hat, also where a fit of the tail is meaningless


class ParetoTail(NamedTuple):
    """The generalized Pareto distribution of ``weight / cutoff - 1``, of the ``size`` largest weights.

    Its index is ``khat``; its ``scale`` is NaN where nothing was fitted.
    """

    khat: float
    scale: float
    log_cutoff: float
    size: int

    @property
    def khat_se(self) -> float:
        """The standard error of an index from ``size`` draws, and ten as which Pyro's prior counts."""
        return max(1 + self.khat, 0.5) / sqrt(self.size + 10)  # asymptotic, for k > -1/2


def fit_tail(log_weights: Tensor) -> ParetoTail:
    """The Pareto tail of importance weights, by Pyro's routine; k-hat is always finite.

    The tail is the largest ``min(S / 5, 3 sqrt(S))`` of S weights. Where the routine does not apply:

    - weights that are constant to round-off, or three quarters of the tail tied at the largest, have a
      k-hat of 0, and one of 10 where that round-off is half a nat or more;
    - weights of zero (``-inf``) count like others, as up to 1 % of NaN do, where the model has failed;
    - with more, with one of ``+inf``, where all are zero, of 20 weights or fewer, and with fewer than
      ten tail weights within a factor of 1e15 of the largest, k-hat is 10, which is its maximum.

    :param log_weights: log weights, up to a constant, of shape ``(S,)``.

    **References**

    1. Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry, 2024),
       https://arxiv.org/abs/1507.02646
    2. A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang, Stephens,
       2009), https://doi.org/10.1198/tech.2009.08017
    """
    if log_weights.dim() != 1 or not len(log_weights):
        raise ValueError(f"log_weights: expected shape (S,), got {tuple(log_weights.shape)}")
    log_weights = log_weights.detach()
    weights = log_weights.to("cpu", torch.float64)
    size = ceil(min(0.2 * len(weights), 3 * sqrt(len(weights))))
    ordered = torch.where(weights.isfinite(), weights, -torch.inf).sort().values
    largest = ordered[-1].item()
    is_failed = weights.isnan().double().mean().item() > 0.01
    if is_failed or not isfinite(largest) or bool((weights == torch.inf).any()):
        return ParetoTail(WORST_KHAT, nan, nan, size)
    log_cutoff = ordered[max(-size - 1, -len(ordered))].item()
    round_off = round_off_of(log_weights)
    if size < 5 or largest - log_cutoff <= round_off:
        is_known = size >= 5 and round_off < 0.5
        return ParetoTail(0.0 if is_known else WORST_KHAT, nan, log_cutoff, size)
    negligible = largest - 15 * log(10)
    is_cut, log_cutoff = log_cutoff < negligible, max(log_cutoff, negligible)
    above = ordered[ordered > log_cutoff]
    if is_cut and len(above) < min(size, 10):
        return ParetoTail(WORST_KHAT, nan, log_cutoff, size)
    # where even the quartile is the maximum the routine may divide by zero
    if len(above) >= 10 and largest - above[len(above) // 4].item() <= round_off:
        return ParetoTail(0.0, nan, log_cutoff, size)
    # the routine makes its grid on the default device
    with torch.device("cpu"):
        khat, scale = fit_generalized_pareto((above - log_cutoff).expm1())
    if not isfinite(khat):
        khat, scale = WORST_KHAT, nan
    return ParetoTail(min(khat, WORST_KHAT), scale, log_cutoff, len(above))


def round_off_of(log_weights: Tensor) -> float:
    """By how many nats round-off may blur the largest of some log weights, in their own dtype."""
    largest = log_weights[log_weights.isfinite()].double().max().item()
    return 16 * torch.finfo(log_weights.dtype).eps * max(1.0, abs(largest))


def smooth_tail(log_weights: Tensor, tail: ParetoTail) -> Tensor:
    """Log weights ``(S,)`` in float64 on the CPU, the largest replaced by quantiles of their tail.

    They are ``-inf`` where weights are not finite, and none is above the largest.
    """
    weights = log_weights.detach().to("cpu", torch.float64)
    weights = torch.where(weights.isfinite(), weights, -torch.inf)
    if isfinite(tail.scale):
        khat = tail.khat or 1e-9  # an index of zero is a limit
        levels = (weights.new_ones(tail.size).cumsum(0) - 0.5) / tail.size
        quantiles = tail.scale * torch.expm1(-khat * torch.log1p(-levels)) / khat
        smoothed = tail.log_cutoff + quantiles.log1p()
        weights[weights.argsort()[-tail.size :]] = smoothed.clamp(max=weights.max().item())
    return weights
