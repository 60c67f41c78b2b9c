# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Importance sampling with a guide, and the thresholds of trust of the whole package."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, log, sqrt

import torch
from torch import Tensor

from .._base.arguments import check_integer
from .importance_weights import NUM_DRAWS, weighted_draws
from .psis import KHAT_OF_VARIANCE, fit_tail, share_above, smooth_tail

GOOD_KHAT = 0.7  #: the largest k-hat at which estimates with the weights are reliable
GOOD_GAP = 0.1  #: the largest gap between an ELBO and the log evidence, in nats
GOOD_ELBO_SE = 0.05  #: the largest standard error of an ELBO, in nats
GOOD_TAIL = 0.001  #: the largest excess of a tail, as a share of all weights, that is negligible
GOOD_LOST_MASS = 0.05  #: the largest share of a posterior in modes that the guide has missed
GOOD_ERROR = 0.15  #: the largest error of a mean, in posterior sds, and of an sd, in its units
CLEAR_IN_SE = 2.0  #: the number of standard errors at which a difference is clear
CONFIDENCE = 0.975  #: the probability that the bounds on all errors of means and sds hold


@dataclass(frozen=True, eq=False)
class Importance:
    """Importance sampling diagnostics of a guide.

    The evidence and ``ess`` are computed from Pareto-smoothed weights.

    :param elbo: the evidence lower bound, in nats, with standard error ``elbo_se``.
    :param log_evidence: the log of the mean weight.
    :param log_evidence_se: its standard error. If ``khat`` exceeds 0.5, weights have no variance, and
        the error of their mean falls with ``S ** (khat - 1)`` in place of ``S ** -0.5`` (Vehtari et al.
        2024): the standard error is multiplied by the ratio, unless the tail is negligible. Infinite if
        ``khat`` exceeds 1. Above 0.7 the evidence rests on a few draws and is usually too small.
    :param khat: the Pareto index of the weights' tail, with standard error ``khat_se``: up to 0.5
        the weights have finite variance, up to 0.7 estimates with them are reliable (see
        :func:`~pyro_artransform.diagnostics.fit_tail`).
    :param ess: the effective sample size, from 0 to ``num_samples``.
    :param num_nonfinite: the number of draws with zero or non-finite weight. These are left out, and
        the ELBO is that of the guide without them.
    :param tail_share: the share of the weights above the cutoff of their tail, from 0 to 1.
    :param log_weights: the log weights, of shape ``(num_samples,)``.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    khat: float
    khat_se: float
    ess: float
    num_samples: int
    num_nonfinite: int
    tail_share: float
    log_weights: Tensor = field(repr=False)

    @classmethod
    def from_log_weights(cls, log_weights: Tensor) -> "Importance":
        """Computes the diagnostics from log weights, log p - log q at draws of the guide, ``(S,)``."""
        tail = fit_tail(log_weights)
        known = log_weights.detach().to("cpu", torch.float64)
        finite = known[known.isfinite()]
        tail_share = float(share_above(known, known.new_tensor(tail.log_cutoff)))
        elbo, elbo_se, log_evidence, log_evidence_se, ess = -inf, inf, -inf, inf, 0.0
        if len(finite):
            share = len(finite) / len(log_weights)
            variance = finite.var().item() if len(finite) > 1 else inf
            elbo = finite.mean().item() + log(share)
            elbo_se = sqrt((variance + 1 - share) / len(finite))
            smoothed = smooth_tail(log_weights, tail)
            weights = (smoothed - smoothed.max()).exp()
            log_evidence = (smoothed.max() + weights.mean().log()).item()
            ess = (weights.sum() ** 2 / weights.square().sum()).item()
            khat = tail.khat if tail_share > GOOD_TAIL else 0.0
            if khat < 1:
                log_evidence_se = sqrt(max(1 / ess - 1 / len(weights), 0.0))
                log_evidence_se *= len(weights) ** max(khat - KHAT_OF_VARIANCE, 0.0)
        return cls(
            elbo=elbo,
            elbo_se=elbo_se,
            log_evidence=log_evidence,
            log_evidence_se=log_evidence_se,
            khat=tail.khat,
            khat_se=tail.khat_se,
            ess=ess,
            num_samples=len(log_weights),
            num_nonfinite=len(log_weights) - len(finite),
            tail_share=tail_share,
            log_weights=log_weights.detach(),
        )

    @property
    def has_good_khat(self) -> bool:
        """Whether k-hat is at most 0.7, so that estimates with the weights are reliable."""
        return self.khat <= GOOD_KHAT

    @property
    def has_heavy_tail(self) -> bool:
        """Whether k-hat is above 0.7 and the tail is not negligible."""
        return not self.has_good_khat and self.tail_share > GOOD_TAIL

    @property
    def is_close(self) -> bool:
        """Whether the ELBO is precisely known and at most 0.1 nats below the log evidence."""
        return self.elbo_se <= GOOD_ELBO_SE and self.log_evidence - self.elbo <= GOOD_GAP

    def __repr__(self) -> str:
        word = "acceptable" if self.has_good_khat else "bad"
        word = "good" if self.khat <= KHAT_OF_VARIANCE else word
        lines = [
            f"{'ELBO':14}{self.elbo:10.3f} ± {self.elbo_se:.3f}",
            f"{'log evidence':14}{self.log_evidence:10.3f} ± {self.log_evidence_se:.3f}",
            f"{'k-hat':14}{self.khat:10.2f} ± {self.khat_se:.2f} ({word})",
            f"{'ESS':14}{self.ess:10.0f} of {self.num_samples}",
        ]
        if self.num_nonfinite:
            lines.append(f"{'left out':14}{self.num_nonfinite:10} draws without a finite weight")
        return "\n".join(lines)


def importance(
    model: Callable[..., object],
    guide: Callable[..., object],
    num_samples: int = NUM_DRAWS,
    *args: object,
    **kwargs: object,
) -> Importance:
    """Importance sampling with a guide: ELBO, evidence, k-hat and effective sample size.

    Any Pyro guide of continuous latents will do. Discrete latents marked for enumeration are summed out. If
    the model subsamples its data, or its density is random otherwise, each
    draw sees another mini-batch, whose noise enters the weights: the ELBO is still correct, but k-hat
    and the evidence are meaningless.

    :param num_samples: the number of draws; model and guide both take ``args`` and ``kwargs``.
    :raises ValueError: if the guide lacks a latent of the model, draws a discrete one or was made for another
        model, or ``num_samples`` is not a positive integer.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_artransform.diagnostics import importance
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> result = importance(model, model, 1000)
        >>> result.elbo, result.khat, result.ess
        (0.0, 0.0, 1000.0)

    **References**

    1. Yes, but Did It Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson, Gelman,
       2018), https://arxiv.org/abs/1802.02538
    2. Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry, 2024),
       https://arxiv.org/abs/1507.02646
    """
    check_integer("num_samples", num_samples)
    chunks = weighted_draws(model, guide, num_samples, args, kwargs, None)
    return Importance.from_log_weights(torch.cat([chunk.log_weights for chunk in chunks]))
