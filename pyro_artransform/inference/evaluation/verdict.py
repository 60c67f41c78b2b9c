# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a posterior can be trusted, in words."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...diagnostics import Importance, fit_tail
from ...diagnostics.importance import GOOD_KHAT
from ..config import EvaluationConfig
from ..objectives.minibatch_elbo import PassEstimate
from .missed_modes import MissedModes

_POINT = (
    "the guide is a point at some site, as AutoDelta is (and AutoLaplaceApproximation before its "
    "laplace_approximation): an estimate of the mode, and no posterior. Use AutoIAF"
)
_SUBSAMPLED = (
    "the model sub-samples its data, so that the numbers below rest on the noisy density of "
    "minibatches: the ELBO is right but for noise, k-hat and the evidence mean nothing. Run "
    "diagnostics.importance with a model that sees all data"
)


class Verdict(NamedTuple):
    """Whether a posterior can be trusted, and the sentence that says so."""

    trusted: bool
    words: str


class FitStatus(NamedTuple):
    """How a fit ended, and of what kind its guide and model are.

    :param skipped_share: the share of steps that were skipped, from 0 to 1.
    :param is_complete: whether the fit ended by itself.
    :param is_point: whether the guide is a single value at some site.
    :param is_subsampled: whether the model draws mini-batches of its data itself.
    """

    skipped_share: float = 0.0
    is_complete: bool = True
    is_point: bool = False
    is_subsampled: bool = False


def judge(
    weights: Importance | None,
    missed: MissedModes | None,
    status: FitStatus,
    config: EvaluationConfig,
    about_minibatches: str = "",
) -> Verdict:
    """The verdict on a fit.

    :param weights: the weights of the guide's own draws; ``None`` if mini-batches hide them.
    :param missed: what was found outside of the guide; ``None`` if it was not computed.
    :param status: how the fit ended.
    :param config: the bounds of trust.
    :param about_minibatches: what :func:`about_minibatches` says of a fit that had a loader.
    """
    objections = list(_about_steps(status, config))
    if status.is_point or status.is_subsampled:
        objections.append(_POINT if status.is_point else _SUBSAMPLED)
    elif weights is not None:
        objections += _about_weights(weights, config)
        if missed is not None:
            objections += _about_missed_modes(weights, missed, config)
    if about_minibatches:
        objections.append(about_minibatches)
    if objections or weights is None:
        return Verdict(False, f"Not trusted: {'; '.join(objections)}.")
    return Verdict(True, _about_success(weights, missed))


def about_minibatches(found: PassEstimate, weights: Importance | None, is_of_all: bool) -> str:
    """Why a fit by mini-batches is never trusted: missed modes are not searched for.

    :param found: the ELBO from one pass over the loader.
    :param weights: the weights of the guide's draws with all data, where they are known.
    :param is_of_all: whether each batch is scaled up to all data.
    """
    of = "of all data" if is_of_all else "of a batch, on the average,"
    known = (
        f"it was trained on mini-batches: the ELBO {of} is {found.elbo:.3f} ± {found.elbo_se:.3f}"
    )
    if weights is not None:
        return (
            f"{known}, and k-hat is {weights.khat:.2f} ± {weights.khat_se:.2f} by a pass over all of "
            "them, but nobody has looked for mass elsewhere. On data that fit into memory fit "
            "without a loader, which does"
        )
    return (
        f"{known} ({found.num_batches} batches), but k-hat and the evidence are not known, since "
        "weights of mini-batches are noise. On data that fit into memory run "
        "diagnostics.importance with all of them and a model that does not sub-sample; on "
        "others, diagnostics.sbc with simulated data"
    )


def _about_weights(found: Importance, config: EvaluationConfig) -> Iterator[str]:
    if not math.isfinite(found.elbo) or found.num_nonfinite:
        yield (
            f"the model's density is zero or fails at {found.num_nonfinite} of {found.num_samples} "
            "draws of the guide: check supports and data"
        )
        return
    if found.khat > GOOD_KHAT and _tail_share(found) > config.small_tail:
        yield (
            f"k-hat is {found.khat:.2f} ± {found.khat_se:.2f}, above {GOOD_KHAT}: the posterior has "
            "tails or corners that the guide does not reach. Use a flow guide if this one is a "
            "Gaussian, a model without funnels (pyro.infer.reparam), or diagnostics.psis_resample "
            "for what importance weights can mend"
        )
    if found.elbo_se > config.max_se:
        yield (
            f"the ELBO is known to {found.elbo_se:.2g} nats only: the weights of the guide's draws "
            "vary too much"
        )
    gap = found.log_evidence - found.elbo
    if gap > config.max_gap:
        yield (
            f"the ELBO is {gap:.2f} nats below the log evidence: the guide is not flexible enough, or "
            "was not trained for long enough"
        )


def _tail_share(found: Importance) -> float:
    """How much of the sum of the weights is above the cutoff of their tail, from 0 to 1."""
    weights = found.log_weights.to("cpu", torch.float64).softmax(0)
    cutoff = fit_tail(found.log_weights).log_cutoff - found.log_weights.double().logsumexp(0).item()
    return float((weights - math.exp(cutoff)).clamp_min(0).sum())


def _about_missed_modes(
    found: Importance, missed: MissedModes, config: EvaluationConfig
) -> Iterator[str]:
    if missed.lost_mass > config.max_lost:
        yield (
            f"about {100 * missed.lost_mass:.0f} % of the posterior is in {missed.num_lost} other "
            "mode(s), found from other starting points, of which the guide has no draws: the starts "
            "disagree. Break the symmetry in the model (ordered supports, tighter priors), or sum "
            "out what switches"
        )
    more = missed.log_evidence - found.elbo
    noise = 2 * math.hypot(missed.log_evidence_se, found.elbo_se)
    already_said = found.log_evidence - found.elbo > config.max_gap
    if more > config.max_gap + noise and not already_said:
        yield (
            f"draws around the guide find {more:.2f} nats more evidence than its ELBO: there is "
            "mass of the posterior where the guide has none"
        )


def _about_steps(status: FitStatus, config: EvaluationConfig) -> Iterator[str]:
    if not status.is_complete:
        yield "the fit was interrupted before its end: resume it from its checkpoint"
    if status.skipped_share > config.max_skipped:
        yield (
            f"{100 * status.skipped_share:.0f} % of the steps had to be skipped, since the loss or its "
            "gradient was not finite"
        )


def _about_success(found: Importance, missed: MissedModes | None) -> str:
    gap = max(found.log_evidence - found.elbo, 0.0)
    words = (
        f"Trusted: the ELBO is {gap:.3f} nats below the log evidence {found.log_evidence:.3f}, k-hat "
        f"is {found.khat:.2f} ± {found.khat_se:.2f}"
    )
    if found.khat > GOOD_KHAT:
        words += f" (of a tail of {100 * _tail_share(found):.2g} % of the weight)"
    return words + (", and no start found mass elsewhere." if missed is not None else ".")
