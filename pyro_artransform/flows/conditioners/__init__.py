# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Conditioners: networks that map x to the parameters of each coordinate's univariate transform."""

from . import masks
from .base import Blocks, Conditioner, Linearization
from .masked_input import MaskedInput
from .masked_mlp import MaskedLinear, MaskedMLP, TiltedSiLU, Unconditional, default_activation

__all__ = [
    "Blocks",
    "Conditioner",
    "Linearization",
    "MaskedInput",
    "MaskedLinear",
    "MaskedMLP",
    "TiltedSiLU",
    "Unconditional",
    "default_activation",
    "masks",
]
