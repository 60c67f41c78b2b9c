# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Flow guides of Pyro models."""

from .amortized import AutoAmortized
from .base import AutoAutoregressive
from .presets import AutoIAF, AutoMAF

__all__ = ["AutoAmortized", "AutoAutoregressive", "AutoIAF", "AutoMAF"]
