# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The draws of a guide that a verdict rests on, with their weights."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics import Importance
from ...diagnostics.importance import GOOD_KHAT
from ...diagnostics.importance_weights import Weighted, weighted_draws
from ...joint import LogJoint
from ..config import EvaluationConfig
from ..parallel import ALONE, Processes


class ModelAndGuide(NamedTuple):
    """What is evaluated: a model, a guide, and the arguments of both."""

    model: Callable[..., object]
    guide: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    log_joint: LogJoint

    def weighted_draws(self, count: int) -> Iterator[Weighted]:
        """Draws of the guide with their weights, by chunks."""
        return weighted_draws(self.model, self.guide, count, self.args, self.kwargs, self.log_joint)


class Drawn(NamedTuple):
    """Weighted draws of a guide.

    :param log_weights: shape ``(n,)``.
    :param latents: on the unconstrained space, of the first ones at least, shape ``(m, latent_dim)``;
        ``None`` where draws have none.
    :param mixes_draws: whether the model turned out to mix draws at once.
    """

    log_weights: Tensor
    latents: Tensor | None
    mixes_draws: bool


def draw(
    subject: ModelAndGuide,
    config: EvaluationConfig,
    processes: Processes = ALONE,
    max_more_draws: int = 0,
) -> Drawn:
    """The draws that a verdict rests on, of which each process takes its share.

    There are more of them where k-hat alone decides, and is above its limit or too near to tell.

    :param max_more_draws: how many more, at most.
    """
    # the weights of mini-batches are noise, and draws for them come one at a time
    is_noisy = subject.log_joint.is_random
    count = config.num_noisy_samples if is_noisy else config.num_samples
    max_kept = config.max_kept // subject.log_joint.latents.latent_dim
    drawn = _draw(subject, count, max(processes.share(max_kept), 2), processes)
    more = min(config.num_more_samples, max_more_draws)
    if is_noisy or more < count or not _is_unclear(drawn.log_weights, config):
        return drawn
    others = _draw(subject, more, 0, processes)
    log_weights = torch.cat([drawn.log_weights, others.log_weights])
    return Drawn(log_weights, drawn.latents, drawn.mixes_draws or others.mixes_draws)


def _is_unclear(log_weights: Tensor, config: EvaluationConfig) -> bool:
    found = Importance.from_log_weights(log_weights)
    may_be_large = found.khat + config.unclear_khat_in_se * found.khat_se >= GOOD_KHAT
    is_close = found.log_evidence - found.elbo <= config.max_gap
    return may_be_large and is_close and found.elbo_se <= config.max_se


def _draw(subject: ModelAndGuide, count: int, max_kept: int, processes: Processes) -> Drawn:
    """So many draws of all processes, of which each keeps the latents of the first ones."""
    latents, parts, strategy = [], [], subject.log_joint.strategy
    for chunk in subject.weighted_draws(processes.share(count)):
        parts.append(chunk.log_weights)
        if chunk.latent is not None and max_kept > 0:
            max_kept -= len(kept := chunk.latent[:max_kept])
            latents.append(kept.clone())
    (mixes_draws,) = processes.any(subject.log_joint.strategy != strategy)
    log_weights = torch.cat(parts)
    if not latents:
        return Drawn(processes.gather(log_weights), None, mixes_draws)
    own = torch.cat(latents)
    # those that are kept first, of all processes
    weights = log_weights[: len(own)], log_weights[len(own) :]
    gathered = torch.cat([*map(processes.gather, weights)])
    return Drawn(gathered, processes.gather(own), mixes_draws)
