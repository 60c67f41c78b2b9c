# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The models of the benchmarks, each once, by kind, with what is known of their posteriors."""
