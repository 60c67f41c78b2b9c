# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The evaluation of a posterior: weighted draws of the guide, mass it misses, and single latents."""

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...diagnostics import Importance, Marginals
from ...diagnostics.base_space import ensemble_of, transform_of
from ...diagnostics.defensive_mixture import MixtureDraws, mixture_draws
from ...diagnostics.importance import GOOD_KHAT, GOOD_LOST_MASS
from ...diagnostics.importance_weights import ModelAndGuide, has_point
from ...diagnostics.marginals import marginals_by_chains, marginals_by_weights
from ...joint import MeanLogJoint
from ...sampling import GOOD_RHAT
from ...time_limit import cut_off, is_out_of_time, left_out, limited, say, within
from ..config import EvaluationConfig, FitConfig
from ..optimization.minibatches import PassEstimate
from .elements import Elements, ElementWeights
from .missed_modes import NOT_SEARCHED, MissedModes, find_missed_modes
from .verdict import (
    FitStatus,
    Verdict,
    about_elements,
    about_good_elements,
    about_minibatches,
    judge,
)

_UNCLEAR_KHAT_IN_SE = 2.0
_NUM_BESIDE_DRAWS = 2000  # draws that tell of a guide where chains give those of the posterior
_MOST_VALUES = 20_000_000  # of draws that are kept: 160 MB


def draw(
    subject: ModelAndGuide, config: EvaluationConfig, max_more_draws: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The log weights of draws, more where k-hat is hardly known, and the first latents ``(m, D)``."""
    # the weights of mini-batches are noise, and draws for them come one at a time
    is_noisy = subject.log_joint.is_random
    count = config.num_noisy_samples if is_noisy else config.num_samples
    latents, parts = list[Tensor](), list[Tensor]()
    for chunk in limited(subject.weighted_draws(count), at_least=1):
        parts.append(chunk.log_weights)
        if chunk.latent is not None and sum(each.numel() for each in latents) < _MOST_VALUES:
            latents.append(chunk.latent.clone())
    more = min(config.num_more_samples, max_more_draws)
    if not is_noisy and more >= count:
        found = Importance.from_log_weights(torch.cat(parts))
        # k-hat alone decides, and is not clearly below its limit
        if found.is_close and found.khat + _UNCLEAR_KHAT_IN_SE * found.khat_se >= GOOD_KHAT:
            parts += [chunk.log_weights for chunk in limited(subject.weighted_draws(more))]
    return torch.cat(parts), torch.cat(latents) if latents else None


class MarginalVerdict(NamedTuple):
    """What is known of single latents after a fit, ``None`` where not checked; words for the verdict."""

    found: Marginals | None = None
    trusted: bool | None = None
    words: str = ""


def _not_checked(reason: str) -> MarginalVerdict:
    return MarginalVerdict(words=f" Single latents were not checked: {reason}.")


class Evaluation(NamedTuple):
    """What is known of a posterior after a fit."""

    elbo: float
    elbo_se: float
    num_samples: int
    weights: Importance | None  #: ``None`` where mini-batches make them unknown
    verdict: Verdict
    is_noisy: bool = False  #: whether weights are the noise of mini-batches that the model draws
    missed: MissedModes = NOT_SEARCHED
    is_of_minibatches: bool = False  #: whether it is by a pass over a loader
    #: the first draws behind it, of :func:`draw`; ``None`` where they were of mini-batches
    latents: Tensor | None = None
    elements: Elements | None = None  #: of mini-batches

    def result_fields(self, marginals: MarginalVerdict, chains: Any = None) -> dict[str, Any]:
        """The fields of a ``FitResult`` about the posterior, or ``Chains`` of it; ``nan`` where not known."""
        words = self.verdict.words + marginals.words
        if chains is not None:
            words = f"{chains.verdict} Of the guide itself: {words}"
        by_weights = ("log_evidence", "log_evidence_se", "khat", "khat_se", "ess")
        return {
            "elbo": self.elbo,
            "elbo_se": self.elbo_se,
            "num_samples": self.num_samples,
            **{name: getattr(self.weights, name, math.nan) for name in by_weights},
            "trusted": self.verdict.trusted,
            "verdict": words,
            "chains": chains,
            "draws": None if chains is None else chains.draws,
            "importance": None if self.is_noisy else self.weights,
            "elements": self.elements,
            "marginals": marginals.found,
            "marginals_trusted": marginals.trusted,
        }


def evaluate(
    subject: ModelAndGuide,
    status: FitStatus,
    config: FitConfig,
    max_more_draws: int = 0,
    has_draws: bool = False,
    of_few: MeanLogJoint | None = None,
) -> Evaluation:
    """Evaluates a posterior where the density is of all data, or the model draws mini-batches itself.

    :param has_draws: whether an ensemble gives the draws of the posterior: then fewer ones of the guide tell
        of the guide, and no modes are searched for, since superchains were in all that starts lead to.
    :param of_few: the density of a few mini-batches, in which modes are searched for.
    """
    log_joint, is_noisy = subject.log_joint, subject.log_joint.is_random
    strategy = log_joint.strategy
    if has_draws:
        few = min(config.evaluation.num_samples, _NUM_BESIDE_DRAWS)
        config = replace(config, evaluation=replace(config.evaluation, num_samples=few))
    with within(0.5):
        log_weights, latents = draw(subject, config.evaluation, max_more_draws)
    found = Importance.from_log_weights(log_weights)
    missed, is_point, coarse = NOT_SEARCHED, False, list[str]()
    if latents is not None:
        is_point = bool((latents == latents[:1]).all(0).any())
        if not is_point:
            coarse = log_joint.latents.coarse_sites(log_joint.to_unconstrained(latents)[0])
        if not (is_point or is_noisy or has_draws):
            say("verdict: the search for mass elsewhere")
            with cut_off("the search for mass elsewhere"), within(0.7):
                weights = found.log_weights[: len(latents)]
                known = found.log_evidence, found.elbo, weights, of_few
                missed = find_missed_modes(log_joint, config, latents, *known)
    status = status._replace(
        is_point=is_point,
        is_random=is_noisy,
        mixes_draws=subject.log_joint.strategy != strategy,
        coarse=coarse,
        left_out=left_out(),
    )
    return Evaluation(
        elbo=found.elbo,
        elbo_se=found.elbo_se,
        num_samples=found.num_samples,
        weights=found,
        is_noisy=is_noisy,
        verdict=judge(status, found, missed),
        missed=missed,
        latents=latents,
    )


def evaluate_minibatches(
    subject: ModelAndGuide,
    found: PassEstimate,
    status: FitStatus,
    by_element: ElementWeights | str,
) -> Evaluation:
    """Evaluates a posterior by passes over a loader, without a search for modes.

    It is trusted by the weights of its elements, where each mini-batch has latents of its own.

    :param by_element: these weights, or why they are not known.
    """
    weights, elements, count = None, None, found.num_draws
    values = next(subject.weighted_draws(8)).values  # a few tell whether they are all the same
    is_point = has_point({name: values[name] for name in subject.log_joint.latents.sites})
    is_of_all = subject.log_joint.structure(subject.args, subject.kwargs).is_scaled
    status = status._replace(is_point=is_point)
    if isinstance(by_element, str):
        verdict = judge(status, about_others=about_minibatches(found, is_of_all, by_element))
    else:
        elements, weights = by_element.elements, by_element.shared
        count = count if weights is None else weights.num_samples
        objection, praise = (
            about_elements(by_element, status.remedy),
            about_good_elements(by_element),
        )
        verdict = judge(status, about_others=objection, praise=praise)
    return Evaluation(
        elbo=found.elbo,
        elbo_se=found.elbo_se,
        num_samples=count,
        weights=weights,
        verdict=verdict,
        is_of_minibatches=True,
        elements=elements,
    )


def judge_marginals(
    subject: ModelAndGuide, evaluation: Evaluation, config: EvaluationConfig
) -> MarginalVerdict:
    """Checks single latents by weights where these know them; else by chains."""
    is_trusted, found = evaluation.verdict.trusted, MarginalVerdict()
    weights, latents = evaluation.weights, evaluation.latents
    obstacle = _obstacle(subject, evaluation)
    if not is_trusted:
        if obstacle:
            return _not_checked(obstacle)
        # they tell more only where weights are known, and say that the joint posterior is not the guide
        if (
            weights is None
            or weights.num_nonfinite == weights.num_samples
            or (weights.trusted and weights.is_close)
        ):
            return found
    if weights is not None and latents is not None:
        log_joint, to_latent = subject.log_joint, None if obstacle else transform_of(subject)
        if to_latent is None:
            unconstrained, _ = log_joint.to_unconstrained(latents)
            log_weights = weights.log_weights[: len(latents)]
            sample = MixtureDraws.of_guide_alone(unconstrained, log_weights)
        else:
            say("verdict: single latents by weights")
            count = min(config.num_samples, max(_MOST_VALUES // latents.shape[1], 1000))
            sample = mixture_draws(log_joint, to_latent, latents, count)
        by_weights = marginals_by_weights(sample, log_joint)
        if by_weights.trusted:
            return _in_words(evaluation, by_weights)
        if is_trusted:
            found = _in_words(evaluation, by_weights)
    by_chains = found if obstacle else _judge_by_chains(subject, evaluation, config)
    # where the joint posterior is trusted, it does not matter that chains cannot be run
    return found if is_trusted and by_chains.found is None else by_chains


def _obstacle(subject: ModelAndGuide, evaluation: Evaluation) -> str:
    """Why no more draws than those of the guide are taken to check single latents, if so."""
    log_joint = subject.log_joint
    if log_joint.is_random:
        return "the model sub-samples its data, or is random otherwise"
    if evaluation.is_of_minibatches:
        return "it was trained on mini-batches, and chains need a model of all data"
    if isinstance(log_joint, MeanLogJoint):
        return "each step of chains is a pass over the loader; fit with draws= runs them"
    if log_joint.strategy == "loop":
        return "the model runs for one draw after the other; diagnostics.marginals checks them"
    return "there was no time" if is_out_of_time() else ""


def _judge_by_chains(
    subject: ModelAndGuide, evaluation: Evaluation, config: EvaluationConfig
) -> MarginalVerdict:
    say("verdict: single latents by chains")
    try:
        chains = ensemble_of(subject)
        convergence = chains.run(config.num_by_chains, most=config.max_by_chains)
        if is_out_of_time() and not float(convergence.rhat.max()) <= GOOD_RHAT:
            return _not_checked("there was no time")
        unconstrained, _ = subject.log_joint.to_unconstrained(cast(Tensor, evaluation.latents))
        found = marginals_by_chains(chains, unconstrained, subject.log_joint)
    # a model without a gradient, or a guide that is a point
    except (RuntimeError, ValueError) as error:
        return MarginalVerdict(words=f" Single latents could not be checked: {error}.")
    return _in_words(evaluation, found)


def _in_words(evaluation: Evaluation, found: Marginals) -> MarginalVerdict:
    """What is known of single latents, as the verdict on all of them together goes on."""
    if evaluation.verdict.trusted:
        words = f"Of single latents, as far as the guide draws: {found.words}"
        if found.num_chains:
            words = f"Of single latents, by chains: {found.words}"
    elif not found.trusted:
        words = f"Nor can single latents be trusted: {found.words}"
    elif evaluation.missed.lost_mass > GOOD_LOST_MASS:
        words = "Single latents are right as long as one stays in the modes that the guide has"
        return MarginalVerdict(found, False, f" {words}: {found.words}.")
    else:
        words = (
            f"Single latents can be trusted: {found.words}. The guide is no proposal for importance "
            "sampling: do not use its weights and its evidence"
        )
        if evaluation.missed.searched_by == "none":
            words += ". Mass elsewhere was not searched for"
    return MarginalVerdict(found, found.trusted, f" {words}.")
