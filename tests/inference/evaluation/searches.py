# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Targets and draws for searches of missed modes."""

import math

import pyro
import torch
from pyro import distributions as dist

from pyro_artransform.inference.config import EvaluationConfig, InitializationConfig
from pyro_artransform.inference.evaluation.missed_modes import MissedModeSearch
from pyro_artransform.joint import LogJoint

DEFAULTS = EvaluationConfig()
STARTS = InitializationConfig()


def missed(model, draws, log_evidence=0.0, modes=None, config=DEFAULTS, starts=STARTS, **found):
    search = MissedModeSearch(LogJoint(model), model, config, starts)
    return search.find(draws, log_evidence, modes, **found)


def one_mode(dim, n=2000):
    return torch.randn(n, dim)


def mixture(locs, weights):
    """Unit Gaussians under a flat prior; of log evidence 0 where the weights sum to 1."""
    locs, logits = torch.as_tensor(locs), torch.as_tensor(weights).log()

    def model():
        space = dist.ImproperUniform(dist.constraints.real_vector, (), locs.shape[1:])
        z = pyro.sample("z", space)
        parts = dist.Normal(locs, 1.0).to_event(1).log_prob(z.unsqueeze(-2))
        pyro.factor("target", (parts + logits).logsumexp(-1))

    return model


def half_lost(dim, apart):
    """What is found where a guide has one of two modes that differ in one coordinate."""
    locs = torch.zeros(2, dim)
    locs[1, 0] = apart
    return missed(mixture(locs, [0.5, 0.5]), one_mode(dim, 5000), math.log(0.5))
