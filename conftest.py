# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What every test and every doctest starts from, whatever the one before it left."""

from collections.abc import Iterator

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_start() -> Iterator[None]:
    """Empties the param store, fixes the seed, turns validation on; puts settings back after."""
    dtype = torch.get_default_dtype()
    with pyro.settings.context(**pyro.settings.get()):
        torch.set_num_threads(1)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pyro.enable_validation(True)
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
