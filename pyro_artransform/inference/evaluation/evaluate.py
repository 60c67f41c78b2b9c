# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The numbers that a verdict rests on, and the verdict: from all data, or from mini-batches."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...diagnostics import Importance
from ...diagnostics.weights import weighted_draws
from ...joint import LogJoint
from ..initialization.newton import Modes
from ..objectives.minibatch_elbo import MinibatchObjective
from .missed_modes import second_opinion
from .verdict import Facts, judge, judge_minibatches

_NUM_SAMPLES = 10_000
_NUM_NOISY_SAMPLES = 500
_FEW = 8


class Subject(NamedTuple):
    """What a verdict is on: a model, a guide, and the arguments of both."""

    model: Callable[..., Any]
    guide: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    log_joint: LogJoint

    def weighted_draws(self, count: int) -> Any:
        """Draws of the guide with their weights, by chunks."""
        return weighted_draws(self.model, self.guide, count, self.args, self.kwargs, self.log_joint)


class Findings(NamedTuple):
    """Those fields of a result that are about the posterior."""

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    khat: float
    khat_se: float
    ess: float
    num_samples: int
    trusted: bool
    verdict: str
    importance: Importance | None


def from_all_data(subject: Subject, modes: Modes | None, facts: Facts) -> Findings:
    """What draws of a guide say where the model sees all data, or takes mini-batches itself.

    :param subject: model and guide.
    :param modes: the modes that the search for a start has found.
    :param facts: what else is known of the fit.
    """
    log_joint = subject.log_joint
    # the weights of minibatches are noise, and draws for them come one at a time
    count = _NUM_NOISY_SAMPLES if log_joint.is_subsampled else _NUM_SAMPLES
    draws, found = _weighed(subject, count)
    is_point = draws is not None and bool((draws == draws[:1]).all(0).any())
    facts = facts._replace(is_point=is_point, is_subsampled=log_joint.is_subsampled)
    second = None
    if draws is not None and not (facts.is_point or facts.is_subsampled):
        second = second_opinion(log_joint, draws, found.log_evidence, modes)
    trusted, verdict = judge(found, second, facts)
    return Findings(
        elbo=found.elbo,
        elbo_se=found.elbo_se,
        **_by_weights(found),
        num_samples=found.num_samples,
        trusted=trusted,
        verdict=verdict,
        importance=None if facts.is_subsampled else found,
    )


def from_minibatches(subject: Subject, objective: MinibatchObjective, facts: Facts) -> Findings:
    """What one pass over a loader says.

    :param subject: model and guide, with the arguments of a batch.
    :param objective: the ELBO by batches.
    :param facts: what else is known of the fit.
    """
    found = objective.over_a_pass()
    weights = None
    if found.log_weights is not None:
        weights = Importance.from_log_weights(found.log_weights)
    values = next(subject.weighted_draws(_FEW)).values.values()
    is_point = any(
        value.is_floating_point() and bool((value == value[:1]).all()) for value in values
    )
    is_of_all = subject.log_joint.structure(subject.args, subject.kwargs).is_scaled
    facts = facts._replace(is_point=is_point)
    trusted, verdict = judge_minibatches(found, weights, is_of_all, facts)
    return Findings(
        elbo=found.elbo,
        elbo_se=found.elbo_se,
        **_by_weights(weights),
        num_samples=found.num_draws,
        trusted=trusted,
        verdict=verdict,
        importance=weights,
    )


def _by_weights(weights: Importance | None) -> dict[str, float]:
    """The numbers that only weights of all data tell, by name: not a number where there are none."""
    names = ("log_evidence", "log_evidence_se", "khat", "khat_se", "ess")
    return {name: math.nan if weights is None else getattr(weights, name) for name in names}


def _weighed(subject: Subject, count: int) -> tuple[Tensor | None, Importance]:
    """Draws of the guide on the unconstrained space, where it has them, and their weights."""
    chunks = list(subject.weighted_draws(count))
    found = Importance.from_log_weights(torch.cat([chunk.log_weights for chunk in chunks]))
    latents = [chunk.latent for chunk in chunks if chunk.latent is not None]
    return (torch.cat(latents) if latents else None), found
