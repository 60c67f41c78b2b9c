# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Fits that are quick, for tests of what a fit does and not of how well it does it."""

import importlib
import signal

import pytest

FEWER = {
    "evaluation.evaluate": {"_NUM_SAMPLES": 500},
    "objectives.minibatch_elbo": {"_NUM_DRAWS": 100, "_SHARE_OF_DRAWS": 1},
    "initialization.search": {
        "_NUM_POINTS": 4,
        "_NUM_POINTS_BY_LOOP": 3,
        "_NUM_MEAN_FIELDS": 1,
        "_FINE": 128,
    },
    "initialization.mean_field": {"_NUM_STEPS": 20},
    "initialization.newton": {"_MAX_STEPS": 6},
    "optimization.learning_rate": {"_NUM_STEPS": 4, "_NUM_DRAWS": 64},
    "optimization.selection": {"_NUM_DRAWS": 128},
    "evaluation.missed_modes": {
        "_NUM_DRAWS": 500,
        "_NUM_SCREENED": 40,
        "_NUM_CLIMBS": 2,
        "_NUM_CLIMBS_BY_LOOP": 2,
    },
}


@pytest.fixture
def quick(monkeypatch):
    """Fewer draws, points and trials, so that a fit takes a fraction of a second."""
    for name, constants in FEWER.items():
        module = importlib.import_module(f"pyro_artransform.inference.{name}")
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as Python has it, which a shell takes away from what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
