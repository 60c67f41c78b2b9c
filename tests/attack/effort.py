# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How hard the attack tries."""

import functools
import os

import pyro
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, seed, settings

TIMES = int(os.environ.get("ATTACK_TIMES", "1"))
SEED = int(os.environ.get("ATTACK_SEED", "0"))

_COMMON = {
    "database": None,
    "deadline": None,
    "print_blob": False,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
}

#: says what happened in an example: ``--hypothesis-show-statistics`` shows how often
note = event


def attack(few=5, **strategies):
    """Makes a property of given strategies a test, marked slow.

    :param few: examples, of which ``ATTACK_TIMES`` makes a multiple.
    """

    def decorate(prop):
        @functools.wraps(prop)
        def afresh(**values):
            """Each example starts alike, whatever the one before it left."""
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(True)
            prop(**values)

        run = settings(max_examples=few * TIMES, derandomize=SEED == 0, **_COMMON)(
            given(**strategies)(afresh)
        )
        return pytest.mark.slow(seed(SEED)(run) if SEED else run)

    return decorate
