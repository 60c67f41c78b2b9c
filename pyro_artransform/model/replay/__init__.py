# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Operations that are recorded once and replayed: ``capture.Captured`` is what other rooms call."""
