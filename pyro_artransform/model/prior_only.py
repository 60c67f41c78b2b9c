# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Detects a model whose data tell nothing about its latents, so that its posterior is the prior."""

from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from typing import Any

import pyro
import torch
from torch import Tensor

from .._base.arguments import warn_user
from . import LogJoint
from .run_once import run_once
from .traces import is_deterministic, observed_nodes
from .vectorization import ModelFailures

#: the remedy
GIVE_DATA = (
    "pass the data to the model, as in fit(model, x, y), and to a site that depends on the latents, by obs= "
    "or pyro.factor"
)
_NO_DATA = (
    "The model has no observed site (no obs= and no pyro.factor), so the posterior is the prior."
)
# distances from the start and the origin, on the unconstrained space, at which densities of the data are
# compared, and the number of draws at each distance and from the prior
_DISTANCES, _NUM_DRAWS = (0.1, 3.0), 3


def warn_of_prior(log_joint: LogJoint, others: Iterable[LogJoint] = ()) -> str:
    """Warns if the posterior of a model is its prior; returns a sentence on the reason, else empty.

    :param others: the log joint densities of the model for further mini-batches.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        reason = why_prior(log_joint)
        if not reason or not all(map(why_prior, others)):
            return ""
    warn_user(f"{reason} Please {GIVE_DATA}", UserWarning)
    return reason


@torch.no_grad()
def why_prior(log_joint: LogJoint) -> str:
    """The reason why the posterior is the prior; empty if the density of the data depends on latents.

    Compares this density at several draws; two are enough if it depends on latents.
    """
    first: dict[str, Tensor] | None = None
    for terms in _terms_of_runs(log_joint):
        if not terms:
            return _NO_DATA
        first = first or terms
        same = (torch.equal(term, first.get(k, ~term.bool())) for k, term in terms.items())
        if terms.keys() != first.keys() or not all(same):
            return ""
    # data that are impossible at all of these draws say nothing
    if first is None or not all(bool(term.isfinite().all()) for term in first.values()):
        return ""
    names = ", ".join(first)
    return (
        f"The observed sites of the model ({names}) do not depend on any latent, so the posterior is the "
        "prior."
    )


def _terms_of_runs(log_joint: LogJoint) -> Iterator[dict[str, Tensor]]:
    """The terms of the data in runs at draws of the latents.

    Enumerated latents are drawn anew in each run, while other random numbers of the model stay the same.
    """
    is_enumerated, latents = log_joint.is_enumerated, log_joint.latents.sites
    for values in _draws(log_joint):
        terms = None
        with suppress(*ModelFailures), torch.random.fork_rng([], enabled=not is_enumerated):
            terms = _data_terms(run_once(log_joint.run, at=values), latents)
        if terms is not None:  # the model does not fail at this draw
            yield terms


def _draws(log_joint: LogJoint) -> Iterator[dict[str, Tensor]]:
    """Values of all continuous latents around the start and the origin, and from the prior."""
    start = log_joint.with_coordinates(None).start
    for distance in _DISTANCES * _NUM_DRAWS:
        yield log_joint.latents.constrain(start + distance * torch.randn_like(start))
        # a vague prior is far from where data depend on latents
        yield log_joint.latents.constrain(distance * torch.randn_like(start))
    for _ in range(_NUM_DRAWS):
        with suppress(Exception):  # an improper prior fails, for one
            nodes = run_once(log_joint.run).nodes
            yield {name: nodes[name]["value"] for name in log_joint.latents.sites}


def _data_terms(trace: Any, latents: Container[str]) -> dict[str, Tensor]:
    """The log densities of the observed sites and factors of a run."""
    observed = (site for site in observed_nodes(trace) if not is_deterministic(site))
    names = [site["name"] for site in observed if site["name"] not in latents]
    with pyro.validation_enabled(False):
        trace.compute_log_prob(site_filter=lambda name, _: name in names)
    return {name: torch.as_tensor(trace.nodes[name]["log_prob"]) for name in names}
