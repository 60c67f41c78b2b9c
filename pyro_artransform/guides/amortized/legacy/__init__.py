# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The earlier base of AutoAmortized, until it is built from a GuideSpec."""
