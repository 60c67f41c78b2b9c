# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A fit that is repeatable, and leaves the generators as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
from pyro.util import get_rng_state, set_rng_state


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds the generators of Python, NumPy and torch, and then puts them back to where they were.

    :param seed: the seed; ``None`` does nothing.
    """
    if seed is None:
        yield
        return
    state = get_rng_state()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)
