# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Autoregressive transforms, compositions and inverses, with the names of Zuko for some of them."""

from ..univariate import MonotonicAffineTransform, MonotonicRQSTransform
from .autoregressive import AutoregressiveTransform, ConditionalAutoregressiveTransform
from .composition import (
    ComposedTransform,
    ConditionalComposedTransform,
    PartitionTransform,
    PermutationTransform,
    chain,
)
from .conditioned import AutoregressiveMeta, ConditionedUnivariate
from .flow_distribution import FlowDistribution
from .flow_module import FlowModule, InverseTransformModule
from .scales_and_tails import CompressedTails, LocationScale

__all__ = [
    "AutoregressiveMeta",
    "AutoregressiveTransform",
    "ComposedTransform",
    "CompressedTails",
    "ConditionalAutoregressiveTransform",
    "ConditionalComposedTransform",
    "ConditionedUnivariate",
    "FlowDistribution",
    "FlowModule",
    "InverseTransformModule",
    "LocationScale",
    "MonotonicAffineTransform",
    "MonotonicRQSTransform",
    "PartitionTransform",
    "PermutationTransform",
    "chain",
]
