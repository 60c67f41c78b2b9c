# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Fits that are quick, for tests of what a fit does and not of how well it does it."""

from functools import partial

import pytest

from pyro_artransform import fit
from pyro_artransform.inference.config import (
    EvaluationConfig,
    FitConfig,
    InitializationConfig,
    MinibatchConfig,
    OptimizationConfig,
)

#: Fewer draws, and points of searches, so that a fit takes a fraction of a second.
QUICK = FitConfig(
    initialization=InitializationConfig(
        num_draws=100, num_for_start=50, num_compared=256, max_trajectories=48
    ),
    optimization=OptimizationConfig(num_compared=128),
    minibatch=MinibatchConfig(num_draws=100),
    evaluation=EvaluationConfig(num_samples=500, num_noisy_samples=50),
)

quick_fit = partial(fit, config=QUICK)


@pytest.fixture
def quick() -> FitConfig:
    """The settings of a fit that is quick."""
    return QUICK
