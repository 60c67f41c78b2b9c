# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contracts of transforms, conditioners and families as assertions, also for classes of third parties."""

from .comparison import redraw
from .conditioner import check_conditioner
from .transform import check_transform
from .univariate import check_univariate

__all__ = ["check_conditioner", "check_transform", "check_univariate", "redraw"]
