# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contracts of transforms, conditioners and families as assertions, also for classes of third parties."""

from .contracts import check_conditioner, check_transform, check_univariate, redraw

__all__ = ["check_conditioner", "check_transform", "check_univariate", "redraw"]
