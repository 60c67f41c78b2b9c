# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contracts of this package as assertions, for its own tests and those of third parties."""

from .comparison import redraw
from .conditioner import check_conditioner
from .guide import check_guide
from .transform import check_transform
from .univariate import check_univariate

__all__ = ["check_conditioner", "check_guide", "check_transform", "check_univariate", "redraw"]
