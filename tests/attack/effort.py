# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How hard the attack tries, and counts of what was tried."""

import functools
import os
from collections import Counter

import pyro
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

TIMES = int(os.environ.get("ATTACK_TIMES", "1"))
SEED = int(os.environ.get("ATTACK_SEED", "0"))

#: (kind, property) -> examples that were tried; shrinking counts too
TRIED: Counter[tuple[str, str]] = Counter()
#: what happened in examples, in words, and how often
NOTED: Counter[str] = Counter()

_COMMON = {
    "database": None,
    "deadline": None,
    "print_blob": False,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
}


def attack(kind, /, few=5, **strategies):
    """Makes a property of given strategies a test, marked slow.

    :param kind: what is attacked, for the counts.
    :param few: examples, of which ``ATTACK_TIMES`` makes a multiple.
    """

    def decorate(prop):
        @functools.wraps(prop)
        def counted(**values):
            TRIED[kind, prop.__name__] += 1
            fresh_start()
            prop(**values)

        run = settings(max_examples=few * TIMES, derandomize=SEED == 0, **_COMMON)(
            given(**strategies)(counted)
        )

        @pytest.mark.slow
        def test():
            (seed(SEED)(run) if SEED else run)()

        test.__name__, test.__doc__, test.__module__ = prop.__name__, prop.__doc__, prop.__module__
        return test

    return decorate


def note(words):
    """Counts what happened, so that a run shows whether a property was put to the test."""
    NOTED[words] += 1


def fresh_start():
    """Each example starts alike, whatever the one before it left."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(True)
