# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Tails that chains do not enter, by draws wider than those of the chains.

Chains that never enter a tail agree, whatever R-hat is asked of them. Heavy-tailed draws around theirs are
weighted by the density: where they find more mass beyond a quantile than the chains have draws, the chains
have missed it. In many dimensions hardly one of these draws counts, and nothing is found.
"""

import math

import torch
from pyro import distributions as dist
from torch import Tensor

from ..joint import LogJoint

# the share of the draws in each tail that is looked at, and by how many standard errors there must be more
_SHARE, _NUM_SES = 0.005, 4.0
# draws of a mixture of Student's t of these widths, and the most latents of which they say something
_NUM_DRAWS, _DEGREES, _WIDTHS = 16_000, 3.0, (1.2, 3.6, 12.0)
MOST_LATENTS = 100


@torch.no_grad()
def missed_tail(
    log_joint: LogJoint, draws: Tensor, ess: Tensor, log_evidence: float
) -> tuple[int, float] | None:
    """The latent with the clearest missed tail, and the share of the posterior that is there.

    :param draws: those of chains, shape ``(n, D)``, in the coordinates of ``log_joint``.
    :param ess: their effective number in the tails of each latent, shape ``(D,)``.
    :param log_evidence: that of the guide; where the wide draws find more, theirs counts.
    :return: ``None`` if each tail has the mass that its draws say.
    """
    loc, covariance = draws.double().mean(0), draws.double().mT.cov().reshape(2 * draws.shape[1:])
    scale_tril, info = torch.linalg.cholesky_ex(covariance)
    if int(info):
        return None
    widths = scale_tril.new_tensor(_WIDTHS)
    wide = dist.MixtureSameFamily(
        dist.Categorical(torch.ones_like(widths)),
        dist.MultivariateStudentT(
            loc.new_tensor(_DEGREES), loc, widths[:, None, None] * scale_tril
        ),
    )
    points = wide.sample((_NUM_DRAWS,))
    log_p = torch.cat([log_joint(each) for each in points.to(draws).split(log_joint.chunk_size)])
    log_weights = (log_p.double() - wide.log_prob(points)).nan_to_num(-torch.inf, -torch.inf)
    by_these = float(log_weights.logsumexp(0)) - math.log(_NUM_DRAWS)
    log_evidence = max(by_these, log_evidence)  # even if the guide's is not a number
    weights = (log_weights - log_evidence).exp()[:, None]
    ordered, count = draws.sort(0).values.double(), int(_SHARE * len(draws))
    lower, upper = ordered[count], ordered[-1 - count]
    in_tails = torch.cat([weights * (points < lower), weights * (points > upper)], 1)
    shares = in_tails.mean(0)
    variances = in_tails.var(0) / _NUM_DRAWS + shares / ess.repeat(2)
    num_ses = ((shares - _SHARE) / variances.sqrt()).nan_to_num(0.0)
    at = int(num_ses.argmax())
    return (at % len(loc), float(shares[at])) if num_ses[at] > _NUM_SES else None
