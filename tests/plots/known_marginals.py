# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Errors of means and sds that are given, for pictures of them."""

import torch

from pyro_artransform.diagnostics import Marginals


def known_marginals(size=40):
    """Errors of a scalar ``m`` and of ``z`` of so many coordinates, of which the last are off by most."""
    shift = {"m": torch.tensor(0.02), "z": torch.linspace(-0.1, 0.5, size)}
    ratio = {"m": torch.tensor(0.99), "z": torch.linspace(1.05, 0.6, size)}
    small = {name: torch.full_like(value, 0.02) for name, value in shift.items()}
    return Marginals(
        mean_shift=shift,
        mean_shift_se=small,
        sd_ratio=ratio,
        sd_ratio_se=small,
        memory=small,
        mean_bound=0.55,
        sd_bound=0.45,
        acceptance=0.8,
        num_chains=128,
        num_gradients=20_000,
        trusted=False,
        words="some are off",
    )
