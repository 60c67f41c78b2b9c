# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a posterior, with predictions and likelihoods, as an ArviZ data set."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from ..arguments import check_integer
from ..joint.protocols import PosteriorGuide
from .log_likelihood import Likelihood

Values = dict[str, Tensor]


@torch.no_grad()
def to_inference_data(
    model: Callable[..., object],
    guide: Callable[..., object],
    num_samples: int = 1000,
    *args: object,
    **kwargs: object,
) -> Any:
    """Draws of a posterior as an ArviZ data set, of one chain of independent draws.

    The groups are ``posterior`` (with deterministic sites), ``posterior_predictive`` (by Pyro's
    ``Predictive``), ``log_likelihood`` (unless the model has discrete latents that are summed out)
    and ``observed_data``.

    :param model: a Pyro model.
    :param guide: a guide of it.
    :param num_samples: how many draws.
    :param args: the arguments of both.
    :param kwargs: their keyword arguments.
    :return: an ``arviz.InferenceData``, from version 1 of ArviZ on an ``xarray.DataTree``.
    :raises ImportError: if ArviZ is missing.
    :raises ValueError: if ``num_samples`` is no positive integer.
    """
    check_integer("num_samples", num_samples)
    from_dict = _arviz().from_dict
    likelihood = Likelihood(model, args, kwargs)
    draws = posterior_draws(guide, likelihood.latents, num_samples, args, kwargs)
    predicted = _predictions(likelihood, model, draws, args, kwargs)
    groups = {
        "posterior": {**draws, **{name: predicted[name] for name in likelihood.deterministic}},
        "posterior_predictive": {name: predicted[name] for name in likelihood.observed},
    }
    if not likelihood.undrawn(draws):
        groups["log_likelihood"] = likelihood(draws)
    chains = {k: {s: _numbers(v)[None] for s, v in group.items()} for k, group in groups.items()}
    chains["observed_data"] = {k: _numbers(v) for k, v in likelihood.observed.items()}
    chains = {name: group for name, group in chains.items() if group}
    if "posterior" in inspect.signature(from_dict).parameters:
        return from_dict(**chains)
    return from_dict(chains)


def posterior_draws(
    guide: Any,
    latents: Mapping[str, Tensor],
    num_samples: int,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> Values:
    """Draws of any guide: by its ``sample_posterior``, or else by Pyro's ``Predictive``.

    :param latents: a value of each latent site, for its shape.
    :return: for each site of the guide a tensor of shape ``(num_samples,) + site shape``.
    """
    if isinstance(guide, PosteriorGuide):
        drawn = guide.sample_posterior(num_samples, *args, **kwargs)
    else:
        drawn = Predictive(guide, num_samples=num_samples)(*args, **kwargs)
    return _of_shapes(drawn, latents, num_samples)


def _predictions(
    likelihood: Likelihood,
    model: Callable[..., object],
    draws: Values,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> Values:
    """New values of data and deterministic sites at each draw."""
    sites = {**likelihood.observed, **likelihood.deterministic}
    if not sites:
        return {}
    # a deterministic site takes the draws in a plate for a dimension of its own
    parallel = not likelihood.deterministic and likelihood.strategy(draws) == "plate"
    predictive = Predictive(
        poutine.uncondition(model),
        posterior_samples=likelihood.in_plate(draws) if parallel else draws,
        return_sites=list(sites),
        parallel=parallel,
    )
    return _of_shapes(predictive(*args, **kwargs), sites, len(next(iter(draws.values()))))


def _of_shapes(found: Mapping[str, Tensor], sites: Mapping[str, Tensor], n: int) -> Values:
    # Predictive puts a dimension in place of each plate that a site is not in
    return {k: found[k].reshape((n, *v.shape)) for k, v in sites.items() if k in found}


def _numbers(value: Tensor) -> Any:
    return value.detach().to("cpu").numpy()


def _arviz() -> Any:
    try:
        import arviz
    except ImportError as error:
        raise ImportError(
            "to_inference_data needs ArviZ: pip install pyro_artransform[arviz]"
        ) from error
    return arviz
