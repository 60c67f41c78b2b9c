# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Plots of results: each function draws into matplotlib's Axes and returns them."""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install matplotlib") from error

from .panels import plot_elbo, plot_graph, plot_khat, plot_marginals

__all__ = ["plot_elbo", "plot_graph", "plot_khat", "plot_marginals"]
