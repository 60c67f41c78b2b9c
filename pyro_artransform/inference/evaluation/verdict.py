# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a posterior can be trusted, in words."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...diagnostics import Importance, fit_tail
from ...diagnostics.importance import GOOD_KHAT
from ..objectives.minibatch_elbo import PassEstimate
from .missed_modes import SecondOpinion

# k-hat has no scale: a tail above all other weights by less than this share of their sum moves
# nothing, whatever its index
_SMALL_TAIL = 0.001
_MAX_GAP = 0.1
_MAX_SE = 0.05
_MAX_LOST = 0.05
_MAX_SKIPPED = 0.1


class Verdict(NamedTuple):
    """Whether a posterior can be trusted, and the sentence that says so."""

    trusted: bool
    words: str


class Facts(NamedTuple):
    """What else a verdict has to know.

    :param skipped_share: the share of steps that were skipped, from 0 to 1.
    :param is_over: whether the fit came to its end by itself.
    :param is_point: whether the guide is a single value at some site.
    :param is_subsampled: whether the model sees a minibatch of its data at a time.
    """

    skipped_share: float = 0.0
    is_over: bool = True
    is_point: bool = False
    is_subsampled: bool = False


def judge(importance: Importance, second: SecondOpinion | None, facts: Facts) -> Verdict:
    """The verdict on a fit.

    :param importance: the weights of the guide's own draws.
    :param second: what was found around the guide; ``None`` if nobody looked.
    :param facts: what else is known of the fit.
    """
    objections = [*_about_steps(facts)]
    if facts.is_point:
        objections.append(_POINT)
    elif facts.is_subsampled:
        objections.append(
            "the model sub-samples its data, so that the numbers below rest on the noisy density of "
            "minibatches: the ELBO is right but for noise, k-hat and the evidence mean nothing. Run "
            "diagnostics.importance with a model that sees all data"
        )
    else:
        objections += [
            *_about_weights(importance),
            *_about_surroundings(importance, second),
        ]
    if objections:
        return Verdict(False, f"Not trusted: {'; '.join(objections)}.")
    return Verdict(True, _praise(importance, second))


_POINT = (
    "the guide is a point at some site, as AutoDelta is (and AutoLaplaceApproximation before its "
    "laplace_approximation): an estimate of the mode, and no posterior. Use AutoIAF"
)


def judge_minibatches(
    found: PassEstimate, weights: Importance | None, is_of_all: bool, facts: Facts
) -> Verdict:
    """The verdict on a fit by mini-batches, of which nobody can say that it can be trusted.

    :param found: the ELBO from one pass over the loader.
    :param weights: the weights of the guide's draws with all data, where they are known.
    :param is_of_all: whether each batch is scaled up to all data.
    :param facts: what else is known of the fit.
    """
    objections = [*_about_steps(facts)]
    if facts.is_point:
        objections.append(_POINT)
    elif weights is not None:
        objections += _about_weights(weights)
    of = "of all data" if is_of_all else "of a batch, on the average,"
    known = (
        f"it was trained on mini-batches: the ELBO {of} is {found.elbo:.3f} ± {found.elbo_se:.3f}"
    )
    if weights is not None:
        objections.append(
            f"{known}, and k-hat is {weights.khat:.2f} ± {weights.khat_se:.2f} by a pass over all of "
            "them, but nobody has looked for mass elsewhere. On data that fit into memory fit "
            "without a loader, which does"
        )
    else:
        objections.append(
            f"{known} ({found.num_batches} batches), but k-hat and the evidence are not known, since "
            "weights of mini-batches are noise. On data that fit into memory run "
            "diagnostics.importance with all of them and a model that does not sub-sample; on "
            "others, diagnostics.sbc with simulated data"
        )
    return Verdict(False, f"Not trusted: {'; '.join(objections)}.")


def _about_weights(found: Importance) -> Iterator[str]:
    if not math.isfinite(found.elbo) or found.num_nonfinite:
        yield (
            f"the model's density is zero or fails at {found.num_nonfinite} of {found.num_samples} "
            "draws of the guide: check supports and data"
        )
        return
    if found.khat > GOOD_KHAT and _tail_share(found) > _SMALL_TAIL:
        yield (
            f"k-hat is {found.khat:.2f} ± {found.khat_se:.2f}, above {GOOD_KHAT}: the posterior has "
            "tails or corners that the guide does not reach. Use a flow guide if this one is a "
            "Gaussian, a model without funnels (pyro.infer.reparam), or diagnostics.psis_resample "
            "for what importance weights can mend"
        )
    if found.elbo_se > _MAX_SE:
        yield (
            f"the ELBO is known to {found.elbo_se:.2g} nats only: the weights of the guide's draws "
            "vary too much"
        )
    gap = found.log_evidence - found.elbo
    if gap > _MAX_GAP:
        yield (
            f"the ELBO is {gap:.2f} nats below the log evidence: the guide is not flexible enough, or "
            "was not trained for long enough"
        )


def _tail_share(found: Importance) -> float:
    """How much of the sum of the weights is above the cutoff of their tail, from 0 to 1."""
    weights = found.log_weights.to("cpu", torch.float64).softmax(0)
    cutoff = fit_tail(found.log_weights).log_cutoff - found.log_weights.double().logsumexp(0).item()
    return float((weights - math.exp(cutoff)).clamp_min(0).sum())


def _about_surroundings(found: Importance, second: SecondOpinion | None) -> Iterator[str]:
    if second is None:
        return
    if second.lost_mass > _MAX_LOST:
        yield (
            f"about {100 * second.lost_mass:.0f} % of the posterior is in {second.num_lost} other "
            "mode(s), found from other starting points, of which the guide has no draws: the starts "
            "disagree. Break the symmetry in the model (ordered supports, tighter priors), or sum "
            "out what switches"
        )
    missed = second.log_evidence - found.elbo
    noise = 2 * math.hypot(second.log_evidence_se, found.elbo_se)
    already_said = found.log_evidence - found.elbo > _MAX_GAP
    if missed > _MAX_GAP + noise and not already_said:
        yield (
            f"draws around the guide find {missed:.2f} nats more evidence than its ELBO: there is "
            "mass of the posterior where the guide has none"
        )


def _about_steps(facts: Facts) -> Iterator[str]:
    if not facts.is_over:
        yield "the fit was interrupted before its end: resume it from its checkpoint"
    if facts.skipped_share > _MAX_SKIPPED:
        yield (
            f"{100 * facts.skipped_share:.0f} % of the steps had to be skipped, since the loss or its "
            "gradient was not finite"
        )


def _praise(found: Importance, second: SecondOpinion | None) -> str:
    gap = max(found.log_evidence - found.elbo, 0.0)
    words = (
        f"Trusted: the ELBO is {gap:.3f} nats below the log evidence {found.log_evidence:.3f}, k-hat "
        f"is {found.khat:.2f} ± {found.khat_se:.2f}"
    )
    if found.khat > GOOD_KHAT:
        words += f" (of a tail of {100 * _tail_share(found):.2g} % of the weight)"
    return words + (", and no start found mass elsewhere." if second is not None else ".")
