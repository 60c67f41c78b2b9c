# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Posterior draws: summaries, predictions, log likelihoods, and ArviZ data sets."""

from .arviz import to_inference_data
from .pointwise import log_likelihood
from .predictive import predict
from .summaries import Summary, summary

__all__ = ["Summary", "log_likelihood", "predict", "summary", "to_inference_data"]
