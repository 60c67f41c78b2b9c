# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Whether each latent can be trusted by itself."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...diagnostics import Marginals
from ...diagnostics.importance import GOOD_KHAT
from ...diagnostics.marginals import marginals_by_weights, marginals_of
from ..config import EvaluationConfig
from .verdict import Evaluation
from .weighted_draws import Drawn, ModelAndGuide


class MarginalLook(NamedTuple):
    """What is known of single latents after a fit.

    :param found: the errors of their means and sds; ``None`` where nobody has looked.
    :param trusted: whether they are all small; ``None`` where nobody has looked.
    :param words: what the verdict says of it, with a space before; empty where it says nothing.
    """

    found: Marginals | None = None
    trusted: bool | None = None
    words: str = ""

    def result_fields(self, evaluation: Evaluation) -> dict[str, Any]:
        """The fields of a ``FitResult`` that are about the posterior, with this in the verdict."""
        fields = evaluation.result_fields()
        fields["verdict"] += self.words
        return {**fields, "marginals": self.found, "marginals_trusted": self.trusted}


def look_at_marginals(
    subject: ModelAndGuide, evaluation: Evaluation, config: EvaluationConfig
) -> MarginalLook:
    """Looks at single latents by weights that are trusted; where these leave it open, by chains.

    Chains cost as much as some 300 steps of a fit with 64 draws, and are for many latents.
    """
    is_trusted, look = evaluation.verdict.trusted, MarginalLook()
    if is_trusted:
        look = _look_by_weights(subject, evaluation.drawn, config)
    if look.trusted or subject.log_joint.latents.latent_dim < config.min_for_chains:
        return look
    by_chains = _look_by_chains(subject, evaluation, config)
    # where the joint is trusted, chains that cannot be run are no news
    return look if is_trusted and by_chains.found is None else by_chains


def _look_by_chains(
    subject: ModelAndGuide, evaluation: Evaluation, config: EvaluationConfig
) -> MarginalLook:
    for reason in _reasons_against(subject, evaluation):
        return MarginalLook(words=f" Single latents were not looked at: {reason}.")
    is_trusted = evaluation.verdict.trusted
    if not (is_trusted or _is_off(evaluation, config)):
        return MarginalLook()
    model, guide, args, kwargs, log_joint = subject
    chains = config.num_chains, config.num_chain_steps
    try:
        found = marginals_of(model, guide, args, kwargs, log_joint, *chains)
    except (
        RuntimeError,
        ValueError,
    ) as error:  # a model without a gradient, a guide that is a point
        return MarginalLook(words=f" Single latents could not be looked at: {error}.")
    if is_trusted:
        words = f" Of single latents, by short chains: {found.words}."
        return MarginalLook(found, found.trusted, words)
    if not found.trusted:
        return MarginalLook(found, False, f" Nor can single latents be trusted: {found.words}.")
    if evaluation.lost_mass > config.max_lost:
        words = " Single latents are right as long as one stays in the modes that the guide has"
        return MarginalLook(found, False, f"{words}: {found.words}.")
    words = f" Single latents can be trusted: {found.words}"
    words += ". The guide is no proposal for importance sampling: leave its weights and its evidence alone"
    return MarginalLook(found, True, f"{words}.")


def _look_by_weights(
    subject: ModelAndGuide, drawn: Drawn | None, config: EvaluationConfig
) -> MarginalLook:
    """What weights that are trusted say of single latents; nothing where draws are replayed.

    Where they do not say that errors of a few latents are small, those of more draws may.
    """
    if drawn is None or drawn.latents is None:
        return MarginalLook()
    latents, latent = subject.log_joint.latents, drawn.latents
    log_weights = drawn.log_weights[: len(latent)]
    found = marginals_by_weights(latent, log_weights, latents)
    more = config.num_for_few - len(latent)
    is_fast = latents.latent_dim < config.min_for_chains and subject.log_joint.strategy != "loop"
    if not found.trusted and more > 0 and is_fast:
        parts = [*subject.weighted_draws(more)]
        latent = torch.cat([latent, *(part.latent for part in parts if part.latent is not None)])
        log_weights = torch.cat([log_weights, *(part.log_weights for part in parts)])
        found = marginals_by_weights(latent, log_weights, latents)
    words = f" Of single latents, as far as the guide draws: {found.words}."
    return MarginalLook(found, found.trusted, words)


def _reasons_against(subject: ModelAndGuide, evaluation: Evaluation) -> Iterator[str]:
    """Why chains cannot be run, or would take too long."""
    if evaluation.is_noisy or subject.log_joint.is_random:
        yield "the model sub-samples its data, or is random otherwise"
    if evaluation.is_of_minibatches:
        yield "it was trained on mini-batches, and chains need a model of all data"
    if subject.log_joint.strategy == "loop":
        yield (
            "the model runs for one draw after the other, so that it takes long; diagnostics.marginals "
            "does"
        )


def _is_off(evaluation: Evaluation, config: EvaluationConfig) -> bool:
    """Whether weights are known, and say that the joint posterior is not the guide."""
    weights = evaluation.weights
    if weights is None or weights.num_nonfinite == weights.num_samples:
        return False
    gap = weights.log_evidence - weights.elbo
    is_uncertain = weights.elbo_se > config.max_se
    return weights.khat > GOOD_KHAT or gap > config.max_gap or is_uncertain
