# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How flow guides fail elsewhere, one case each, written against any package (see cases.py)."""
