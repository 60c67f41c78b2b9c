# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How flow guides fail elsewhere (docs/failures.md): a test for each failure, whose number stays."""
