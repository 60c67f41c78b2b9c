# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Flow guides of Pyro models."""

from ..flows.transforms.flow_distribution import FlowDistribution
from .amortized.amortized_guide import AutoAmortized
from .autoregressive import AutoAutoregressive
from .mixture import MixtureGuide
from .presets import AutoIAF, AutoMAF
from .structured.structured_guide import AutoStructuredFlow

__all__ = [
    "AutoAmortized",
    "AutoAutoregressive",
    "AutoIAF",
    "AutoMAF",
    "AutoStructuredFlow",
    "FlowDistribution",
    "MixtureGuide",
]
