# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What every room uses: arguments, differentiation, levels of graphs, files, time limits."""
