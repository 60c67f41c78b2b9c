# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What benchmarks have in common: files of runs, pages with tables, clocks, and peers."""
