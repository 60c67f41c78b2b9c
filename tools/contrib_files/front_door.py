# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""
Autoregressive transforms with an exact inverse, and an autoguide made of them.

:class:`AutoIAF` is an autoguide whose flow starts as the identity, so that a new guide
is ``Normal(init_loc, init_scale)`` on the unconstrained space.
"""
