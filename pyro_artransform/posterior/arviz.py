# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Converts posterior draws, with predictions and likelihoods, to an ArviZ data set."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .._base.arguments import check_integer, warn_user
from ..model.density import Args, Kwargs
from ..model.traces import is_deterministic
from ..model.vectorization import Draws, Terms
from .pointwise import Likelihood
from .predictive import draws_of_guide


@torch.no_grad()
def to_inference_data(
    model: Callable[..., object],
    guide: Callable[..., object],
    num_samples: int = 1000,
    *args: object,
    **kwargs: object,
) -> Any:
    """Converts draws of a guide to an ArviZ data set, as one chain of independent draws.

    The groups are ``posterior`` (including deterministic sites, computed from the draws and the data,
    and sites computed by reparametrizers), ``posterior_predictive`` (the model runs once per draw),
    ``log_likelihood`` (see :func:`~pyro_artransform.posterior.log_likelihood`; left out, with a warning, if
    discrete latents are summed out, or a factor belongs to no datum) and ``observed_data``.

    If the guide has no draws of a site without data, as when the model is called with new predictors
    and ``y=None``, the site is drawn given each draw of the others, in the group ``predictions``. This
    group includes deterministic sites if no other site has data.

    :param num_samples: the number of draws; model and guide both take ``args`` and ``kwargs``.
    :return: an ``arviz.InferenceData``, or an ``xarray.DataTree`` since version 1 of ArviZ.
    :raises ImportError: if ArviZ is missing.
    :raises ValueError: if ``num_samples`` is not a positive integer, or a deterministic site or one
        with data exists at some draws only.
    """
    check_integer("num_samples", num_samples)
    _import_arviz()
    likelihood = Likelihood(partial(model, *args, **kwargs))
    return _data_set(likelihood, draws_of_guide(guide, num_samples, args, kwargs), 1)


@torch.no_grad()
def chains_to_inference_data(
    model: Callable[..., object], by_chain: Draws, args: Args, kwargs: Kwargs
) -> Any:
    """Converts draws of chains, each of shape ``(num_chains, n) + site shape``."""
    num_chains = len(next(iter(by_chain.values())))
    draws = {name: value.flatten(0, 1) for name, value in by_chain.items()}
    return _data_set(Likelihood(partial(model, *args, **kwargs)), draws, num_chains)


def _import_arviz() -> Any:
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_inference_data needs ArviZ: pip install arviz") from error
    return arviz


def _data_set(likelihood: Likelihood, draws: Draws, num_chains: int) -> Any:
    """Builds the data set from draws ``(C n, ...)``, with chains concatenated."""
    from_dict = _import_arviz().from_dict
    draws = likelihood.given(draws)
    predicted, observed = likelihood.predicted(draws), likelihood.observed
    groups = {"posterior": dict(draws)}
    if predicted:
        groups["predictions"] = likelihood.sites(draws, lambda s: s["name"] in predicted)
    if likelihood.has_deterministic:
        known = {**draws, **groups.get("predictions", {})}
        computed = likelihood.sites(known, is_deterministic)
        groups["predictions" if predicted and not observed else "posterior"].update(computed)
    if observed:
        drawn = likelihood.sites(draws, lambda s: s["name"] in observed, observed=False)
        groups["posterior_predictive"] = drawn
        if found := _log_likelihood(likelihood, draws):
            groups["log_likelihood"] = found
    data = {
        name: {k: v.unflatten(0, (num_chains, -1)).numpy(force=True) for k, v in group.items()}
        for name, group in groups.items()
    }
    if observed:
        data["observed_data"] = {k: v.numpy(force=True) for k, v in observed.items()}
    if "posterior" in inspect.signature(from_dict).parameters:
        return from_dict(**data)
    return from_dict(data)


def _log_likelihood(likelihood: Likelihood, draws: Draws) -> Terms:
    """The log likelihood; empty if there are no terms of each datum, and a warning says why."""
    undrawn = likelihood.latents.keys() - draws.keys()
    reason = likelihood.incomplete
    if not reason and undrawn & likelihood.enumerated:
        reason = (
            f"discrete latents that are summed out ({', '.join(sorted(undrawn))}). Draw them by "
            "pyro.infer.infer_discrete, and pass all draws to log_likelihood"
        )
    if reason:
        warn_user(f"log_likelihood is left out because of {reason}", UserWarning)
    return {} if reason or undrawn else likelihood(draws)
