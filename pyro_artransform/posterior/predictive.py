# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Predictions of a model at posterior draws."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._base.arguments import first_of
from ..model.density import Args, Kwargs
from ..model.run_once import run_once
from ..model.traces import is_deterministic, latent_nodes
from ..model.vectorization import stack
from .pointwise import Likelihood


@torch.no_grad()
def predict(
    model: Callable[..., object], draws: Mapping[str, Tensor], *args: object, **kwargs: object
) -> dict[str, Tensor]:
    """Draws data, and any latents without draws, once for each draw of the other latents.

    The model runs once per draw, with latents in exactly the shapes of its sites, so that any model works,
    including ones with ``X @ b``. Pyro's ``Predictive`` adds the dimensions of all plates to latents.

    :param draws: for each latent site a tensor of shape ``(n,) + site shape``, such as ``result.draws``;
        other sites are ignored. Latents without draws, such as those of new groups and discrete latents that
        were summed out, are drawn from their priors given the others. For the posterior of the latter use
        ``pyro.infer.infer_discrete``.
    :param args: the arguments of the model: new ones to predict, those of the fit for predictive checks.
    :return: for each site with data, each latent without draws and each deterministic site a tensor of
        shape ``(n,) + site shape``.
    :raises ValueError: if there are no draws, they have wrong shapes, or a site exists at some draws only.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_artransform.posterior import predict
        >>> def model(x, y=None):
        ...     b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)
        >>> predict(model, {"b": torch.zeros(100, 2)}, torch.ones(3, 2))["y"].shape
        torch.Size([100, 3])
    """
    likelihood = Likelihood(partial(model, *args, **kwargs), is_of_all_data=False)
    chosen = likelihood.given(draws)
    if not any(map(len, chosen.values())):
        raise ValueError(
            f"draws: expected some of the model's latents, {first_of([*likelihood.latents])}, got none; for "
            "draws of the prior use pyro.infer.Predictive(model, num_samples=n)"
        )
    wanted = (likelihood.observed.keys() | likelihood.latents.keys()) - chosen.keys()

    def is_wanted(node: Any) -> bool:
        return node["name"] in wanted or is_deterministic(node)

    return likelihood.sites(chosen, is_wanted, observed=False)


@torch.no_grad()
def draws_of_guide(guide: Any, n: int, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
    """Draws all sites of a guide, ``(n,) + site shape``, with its ``sample_posterior`` or one by one."""
    if hasattr(guide, "sample_posterior"):
        return dict(guide.sample_posterior(n, *args, **kwargs))
    rows = []
    for _ in range(n):
        trace = run_once(guide, args, kwargs, validated=True)
        nodes = [each for each in latent_nodes(trace) if not each["infer"].get("is_auxiliary")]
        rows.append({node["name"]: node["value"] for node in nodes})
    return stack(rows)
