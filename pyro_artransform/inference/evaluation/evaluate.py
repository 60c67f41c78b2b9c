# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Evaluates a guide by its importance weights and against the draws of an ensemble."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..._base.time_limit import abandonable, until_deadline
from ...diagnostics import Importance
from ...diagnostics.checks import Check, FailedCheck, Verdict
from ...diagnostics.convergence import MODES_RHAT
from ...diagnostics.importance_sampling import CLEAR_IN_SE, GOOD_KHAT
from ...diagnostics.importance_weights import ModelAndGuide, has_point
from ...diagnostics.marginals import marginals_of
from ...diagnostics.plates import ElementDiagnostics
from ...model import FullDataDensity, LogJoint
from ...model.elements import ElementTerms
from ...model.sites import Rounding, find_rounding
from ...model.vectorization import draws_at_a_time
from ...sampling import Ensemble, StopReason
from ..optimization.minibatches import NUM_COMMON_DRAWS, PassEstimate
from ..optimization.objective import FEWER
from .conditionals import conditional_diagnostics
from .elements import ElementWeights
from .verdict import (
    NOT_SEARCHED,
    FitStatus,
    LostModes,
    about_elements,
    about_good_elements,
    about_marginals,
    about_plate,
    judge,
)

_BY_WEIGHTS = (
    *("elbo", "elbo_se", "num_samples", "log_evidence", "log_evidence_se"),
    *("khat", "khat_se", "ess"),
)
# draws behind a verdict (as in Yao et al. 2018), and if weights have the noise of mini-batches
_NUM_SAMPLES, _NUM_NOISY = 10_000, 500
# additional draws, as many as before each time, while only k-hat is in doubt, at most as many as the
# gradients of the fit: its standard error falls from 0.09 to 0.05
_NUM_MORE = 90_000
_MIN_SHARE = 0.01  # the least share of a mode that matters


def draw(
    subject: ModelAndGuide, count: int, max_more_draws: int = 0
) -> tuple[Tensor, Tensor | None, LogJoint]:
    """The log weights of draws, with more draws if k-hat is in doubt, and the first latents ``(m, D)``.

    Returns the density, too, by a strategy that suits all draws.
    """
    latents, parts = list[Tensor](), list[Tensor]()
    most = draws_at_a_time(subject.log_joint.latents.latent_dim)  # the number of latents to keep
    for chunk in until_deadline(subject.weighted_draws(count), at_least=1):
        parts.append(chunk.log_weights)
        if chunk.log_joint is not None:
            subject = subject._replace(log_joint=chunk.log_joint)
        if chunk.latent is not None and sum(map(len, latents)) < most:
            latents.append(chunk.latent.clone())
    left = min(_NUM_MORE, max_more_draws)
    while left >= count:
        weights = Importance.from_log_weights(torch.cat(parts))
        if not weights.is_close or weights.khat + CLEAR_IN_SE * weights.khat_se < GOOD_KHAT:
            break
        # only k-hat is in doubt: it is not clearly below its threshold
        more = min(weights.num_samples, left)
        left -= more
        parts += [chunk.log_weights for chunk in until_deadline(subject.weighted_draws(more))]
    return torch.cat(parts), torch.cat(latents) if latents else None, subject.log_joint


def _fields(verdict: Verdict, weights: Importance | None = None, **others: Any) -> dict[str, Any]:
    """The fields of a ``FitResult`` about the posterior; numbers are ``nan`` if weights are unknown."""
    fields = {name: getattr(weights, name, math.nan) for name in _BY_WEIGHTS}
    judged = {"trusted": verdict.trusted, "verdict": verdict.words, "judged": verdict}
    return {**fields, **judged, "importance": weights, **others}


def evaluate(
    subject: ModelAndGuide,
    status: FitStatus,
    num_gradients: int = 0,
    ensemble: Ensemble | None = None,
    *,
    is_loop: bool = False,
    terms: ElementTerms | None = None,
) -> dict[str, Any]:
    """Evaluates a guide with a density of all data; of a random model only a noisy ELBO is known.

    :param num_gradients: the gradients of all steps, which limit the draws added if k-hat is in doubt.
    :param ensemble: chains whose draws the guide is compared with.
    :param is_loop: whether model or guide run for one draw at a time, so that draws are few.
    :param terms: the elements of plates that rows of mini-batches read, if known.
    :return: fields of a ``FitResult``.
    """
    log_joint, strategy = subject.log_joint, subject.log_joint.strategy
    if log_joint.is_random:
        chunks = until_deadline(subject.weighted_draws(_NUM_NOISY), at_least=1)
        noisy = Importance.from_log_weights(torch.cat([chunk.log_weights for chunk in chunks]))
        numbers = {name: getattr(noisy, name) for name in ("elbo", "elbo_se", "num_samples")}
        return _without_density(subject, status._replace(is_random=True), **numbers)
    num_samples = _NUM_SAMPLES // FEWER if is_loop else _NUM_SAMPLES
    if has_passes := isinstance(log_joint, FullDataDensity):
        num_samples = NUM_COMMON_DRAWS
    more = 0 if is_loop or has_passes else num_gradients
    log_weights, latents, log_joint = draw(subject, num_samples, more)
    weights = Importance.from_log_weights(log_weights)
    rounding = Rounding([], [])
    lost, marginals, num_images = NOT_SEARCHED, None, 1.0
    elements = dict[str, ElementDiagnostics]()
    is_point = latents is not None and bool((latents == latents[:1]).all(0).any())
    if latents is not None and not is_point:
        draws, _ = log_joint.to_unconstrained(latents)
        rounding = find_rounding(log_joint.latents, draws)
        draws = draws[draws.isfinite().all(-1)]
        if isinstance(log_joint, FullDataDensity) and len(draws) > 1:
            with abandonable():
                elements.update(conditional_diagnostics(log_joint, draws, terms))
        if ensemble is not None and len(draws) > 1:
            draws, num_images = _in_one_image(ensemble, draws)
            lost = lost_modes(ensemble, draws)
            if ensemble.convergence().has_mixed:
                marginals = marginals_of(log_joint, ensemble.draws, draws)
    status = status._replace(
        is_point=is_point,
        mixes_draws=log_joint.strategy != strategy,
        coarse=rounding.coarse,
        at_edge=rounding.at_edge,
    )
    about = about_marginals(marginals, ensemble)
    about_others = [each for e in elements.values() for each in about_plate(e, status.remedy)]
    verdict = judge(status, weights, lost, marginals, about_others=about_others)
    return _fields(
        verdict._replace(marginals=about),
        weights,
        elements=elements,
        marginals=marginals,
        marginals_trusted=None if marginals is None else marginals.trusted,
        num_images=num_images,
    )


def _without_density(
    subject: ModelAndGuide,
    status: FitStatus,
    about_others: Iterable[FailedCheck] = (),
    praise: str = "",
    **fields: Any,
) -> dict[str, Any]:
    """The fields of a fit whose density of all data is not known, with what is known of the others."""
    values = next(subject.weighted_draws(8)).values  # a few draws show whether all are equal
    is_point = has_point({name: values[name] for name in subject.log_joint.latents.sites})
    verdict = judge(status._replace(is_point=is_point), about_others=about_others, praise=praise)
    return _fields(verdict._replace(marginals=about_marginals(None, None)), **fields)


def not_evaluated(failure: str, status: FitStatus) -> dict[str, Any]:
    """The fields of a guide that failed with an error; its numbers are ``nan``."""
    failed = Check.FAILED.failed(error=failure)
    verdict = judge(status._replace(missing=tuple), about_others=[failed])
    return _fields(verdict, num_samples=0)


def _in_one_image(ensemble: Ensemble, draws: Tensor) -> tuple[Tensor, float]:
    """A guide's draws ``(n, D)`` in the image of the ensemble's, and the number of images like theirs."""
    if ensemble.to_image is None:
        return draws, 1.0
    found = ensemble.to_image.of_latents(ensemble.log_joint.latents, draws)
    change = ((found - draws).abs() / draws.std(0)).amax(1)
    is_in_one = float((change > 0.01).double().mean()) < _MIN_SHARE
    return found, math.prod(s.num_images for s in ensemble.symmetries) if is_in_one else 1.0


def lost_modes(ensemble: Ensemble, draws: Tensor) -> LostModes:
    """Finds modes of an ensemble in which a guide has almost no unconstrained ``draws``, ``(n, D)``."""
    modes, is_mixed = ensemble.modes, ensemble.convergence().has_mixed
    if modes is None:
        had_time = ensemble.end is not StopReason.OUT_OF_TIME
        rhat, unmixed = ensemble.convergence().rhat, tuple[FailedCheck, ...]()
        if had_time and rhat.max() > MODES_RHAT:
            name = ensemble.log_joint.latents.name_of(int(rhat.argmax()))
            remedy = "Use tighter priors, or another parametrization"
            unmixed = Check.MIXING.apply(rhat=float(rhat.max()), name=name, remedy=remedy)
        return LostModes(was_searched=is_mixed, unmixed=unmixed)
    # before mixing, the chains' shares of modes are wrong, and those of Gaussians are only approximate
    share = modes.shares_of(ensemble.draws.flatten(0, 1)) if is_mixed else modes.share
    is_lost = (share > _MIN_SHARE) & (modes.shares_of(draws) < 0.1 * share)
    return LostModes(float(share[is_lost].sum()), int(is_lost.sum()), was_searched=True)


def evaluate_minibatches(
    subject: ModelAndGuide,
    found: PassEstimate,
    status: FitStatus,
    by_element: ElementWeights | str,
) -> dict[str, Any]:
    """Evaluates a posterior with passes over a loader, without a search for modes.

    The verdict depends on the weights of elements, if each mini-batch has latents of its own.

    :param by_element: these weights, or the reason why they are unknown.
    :return: fields of a ``FitResult``.
    """
    elbo: dict[str, Any] = {"elbo": found.elbo, "elbo_se": found.elbo_se}
    of_pass = {**elbo, "num_samples": found.num_draws}
    if isinstance(by_element, str):
        is_of_all = subject.log_joint.structure(subject.args, subject.kwargs).is_scaled
        failed = Check.MINIBATCHES.failed(
            of="of all data" if is_of_all else "averaged over batches",
            num_batches=found.num_batches,
            reason=by_element,
            **elbo,
        )
        return _without_density(subject, status, about_others=[failed], **of_pass)
    return _without_density(
        subject,
        status,
        about_others=about_elements(by_element, status.remedy),
        praise=about_good_elements(by_element),
        weights=by_element.shared,
        elements={by_element.elements.plate: by_element.elements},
        **(of_pass if by_element.shared is None else elbo),
    )
