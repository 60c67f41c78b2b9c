# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The evaluation of a posterior: the numbers of a verdict, from all data or from mini-batches."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...diagnostics import Importance
from ...diagnostics.weights import Weighted, weighted_draws
from ...joint import LogJoint
from ..config import EvaluationConfig
from ..initialization.gaussians import Modes
from ..objectives.minibatch_elbo import MinibatchObjective
from .missed_modes import MissedModeSearch
from .verdict import FitStatus, Verdict, about_minibatches, judge

# enough to see that all draws of a site are the same
_NUM_POINT_DRAWS = 8


class ModelAndGuide(NamedTuple):
    """What is evaluated: a model, a guide, and the arguments of both."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    log_joint: LogJoint

    def weighted_draws(self, count: int) -> Iterator[Weighted]:
        """Draws of the guide with their weights, by chunks."""
        return weighted_draws(self.model, self.guide, count, self.args, self.kwargs, self.log_joint)


class Evaluation(NamedTuple):
    """What is known of a posterior after a fit.

    :param elbo: the ELBO, in nats.
    :param elbo_se: its standard error.
    :param num_samples: the number of draws behind both.
    :param weights: the importance weights; ``None`` where mini-batches make them unknown.
    :param is_noisy: whether these weights are the noise of mini-batches that the model draws.
    :param verdict: whether it can be trusted.
    """

    elbo: float
    elbo_se: float
    num_samples: int
    weights: Importance | None
    is_noisy: bool
    verdict: Verdict

    def result_fields(self) -> dict[str, Any]:
        """The fields of a ``FitResult`` that are about the posterior, ``nan`` where not known."""
        fields = {"elbo": self.elbo, "elbo_se": self.elbo_se, "num_samples": self.num_samples}
        known = {} if self.weights is None else vars(self.weights)
        for name in ("log_evidence", "log_evidence_se", "khat", "khat_se", "ess"):
            fields[name] = known.get(name, math.nan)
        importance = None if self.is_noisy else self.weights
        trusted, words = self.verdict
        return {**fields, "trusted": trusted, "verdict": words, "importance": importance}


def evaluate(
    subject: ModelAndGuide, modes: Modes | None, status: FitStatus, config: EvaluationConfig
) -> Evaluation:
    """Evaluates a posterior where the model sees all data, or draws mini-batches itself.

    :param subject: model and guide.
    :param modes: the modes that the search for an initial guide has found.
    :param status: how the fit ended.
    :param config: the draws to spend, and the bounds of trust.
    """
    log_joint = subject.log_joint
    # the weights of mini-batches are noise, and draws for them come one at a time
    count = config.num_noisy_samples if log_joint.is_subsampled else config.num_samples
    draws, found = _weigh(subject, count)
    is_point = draws is not None and bool((draws == draws[:1]).all(0).any())
    status = status._replace(is_point=is_point, is_subsampled=log_joint.is_subsampled)
    missed = None
    if draws is not None and not (is_point or log_joint.is_subsampled):
        search = MissedModeSearch(log_joint, config)
        missed = search.find(draws, found.log_evidence, modes)
    verdict = judge(found, missed, status, config)
    return Evaluation(
        found.elbo, found.elbo_se, found.num_samples, found, log_joint.is_subsampled, verdict
    )


def evaluate_minibatches(
    subject: ModelAndGuide,
    objective: MinibatchObjective,
    status: FitStatus,
    config: EvaluationConfig,
) -> Evaluation:
    """Evaluates a posterior by one pass over a loader.

    :param subject: model and guide, with the arguments of a batch.
    :param objective: the ELBO by batches.
    :param status: how the fit ended.
    :param config: the bounds of trust.
    """
    found, weights = objective.over_a_pass(), None
    if found.log_weights is not None:
        weights = Importance.from_log_weights(found.log_weights)
    values = next(subject.weighted_draws(_NUM_POINT_DRAWS)).values.values()
    is_point = any(
        value.is_floating_point() and bool((value == value[:1]).all()) for value in values
    )
    is_of_all = subject.log_joint.structure(subject.args, subject.kwargs).is_scaled
    about = about_minibatches(found, weights, is_of_all)
    verdict = judge(weights, None, status._replace(is_point=is_point), config, about)
    return Evaluation(found.elbo, found.elbo_se, found.num_draws, weights, False, verdict)


def _weigh(subject: ModelAndGuide, count: int) -> tuple[Tensor | None, Importance]:
    """Draws of the guide on the unconstrained space, where it has them, and their weights."""
    latents, log_weights = [], []
    for chunk in subject.weighted_draws(count):
        log_weights.append(chunk.log_weights)
        if chunk.latent is not None:
            latents.append(chunk.latent)
    found = Importance.from_log_weights(torch.cat(log_weights))
    return (torch.cat(latents) if latents else None), found
