# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Conditioners: networks that map x to the parameters of each coordinate's univariate transform."""

from . import masks
from .base import Blocks, Conditioner, Evaluation
from .masked_input import MaskedInput
from .masked_mlp import MaskedLinear, MaskedMLP, Unconditional
from .parents_mlp import ParentsMLP
from .tilted_silu import TiltedSiLU

__all__ = [
    "Blocks",
    "Conditioner",
    "Evaluation",
    "MaskedInput",
    "MaskedLinear",
    "MaskedMLP",
    "ParentsMLP",
    "TiltedSiLU",
    "Unconditional",
    "masks",
]
