# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The activation of a guide's networks where none is given."""

from torch import nn

from ..conditioners import TiltedSiLU

# beyond it narrower networks end as near with a smaller linear part (benchmarks/flows.md)
_MOST_OF_SILU = 64


def default_activation(dim: int) -> nn.Module:
    """SiLU, or beyond 64 coordinates :class:`~pyro_artransform.conditioners.TiltedSiLU`."""
    return nn.SiLU() if dim <= _MOST_OF_SILU else TiltedSiLU()
