# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import random

import numpy as np
import torch

from pyro_artransform.inference.seeding import seeded


def drawn():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_repeatable_and_without_trace():
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    with seeded(3):
        first = drawn()
    with seeded(3):
        assert drawn() == first
    assert drawn() == expected
    with seeded(None):
        assert drawn() not in (first, expected)
