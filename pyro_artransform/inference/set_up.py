# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The set-up of a fit: one run of model and guide, and the objective of a batch."""

from collections.abc import Callable
from typing import cast

import torch

from ..diagnostics.importance_weights import log_joint_of
from ..joint.protocols import FlowGuide, StoredGuide
from .config import FitConfig
from .evaluation.evaluate import ModelAndGuide
from .loader import Batch, BatchStream, check_use
from .optimization.objective import BatchObjective, PathObjective, PyroObjective

Function = Callable[..., object]


def run_once(
    model: Function, guide: Function, batch: Batch, stream: BatchStream | None
) -> ModelAndGuide:
    """Runs model and guide, so that what cannot be fitted is an error now."""
    (args, kwargs), given = batch, cast(object, guide)
    if isinstance(given, StoredGuide):  # a new guide is to be new, whatever was fitted before
        given.drop_orphans()
    log_joint = log_joint_of(model, guide, args, kwargs)
    if stream is not None:
        check_use(stream, guide, log_joint, batch)
    subject = ModelAndGuide(model, guide, args, kwargs, log_joint)
    next(subject.weighted_draws(1))  # an error if the guide lacks a latent
    return subject


def objective_of_batch(
    subject: ModelAndGuide, config: FitConfig, is_minibatch: bool
) -> BatchObjective:
    """The objective for a batch: by the path gradient, if the guide has all latents of the model."""
    model, _, args, kwargs, log_joint = subject
    guide: object = subject.guide
    if isinstance(guide, FlowGuide):
        with torch.no_grad():
            latent, _ = guide.rsample_and_log_prob(1)
        if latent.shape[-1] == log_joint.latents.latent_dim:
            return PathObjective(log_joint, guide, config.optimization)
    num = (config.minibatch if is_minibatch else config.optimization).num_estimates
    return PyroObjective(model, subject.guide, Batch(args, kwargs), log_joint, num)
