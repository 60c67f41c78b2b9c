# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The priors of latents in traced runs: their scales, and which depend on other latents."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..run_once import run_once
from ..sites import SUPPORT_DEPENDS, Latents, same_support
from ..traces import subsampled_plates
from .families import PriorScale, is_identity_or_exp


@torch.no_grad()
def find_mapped(
    run: Callable[[], object],
    latents: Latents,
    points: Tensor,
) -> dict[str, bool]:
    """The latents that may have coordinates from the prior, and whether it depends on other latents.

    :param points: two points, shape ``(2, latent_dim)``, between which priors are compared.
    :raises ValueError: if the support of a latent depends on other latents.
    """
    state, (start, other) = torch.get_rng_state(), map(latents.constrain, points)
    second = run_once(run, at=other)
    is_random = bool(subsampled_plates(second)) or not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)  # the same discrete latents and parts of data in both runs
    first = run_once(run, at=start)
    for name in latents.sites:
        fns: list[Any] = [t.nodes[name]["fn"] for t in (first, second) if name in t.nodes]
        both = [fn.support for fn in fns]
        if len(both) == 2 and not same_support(*both):
            raise ValueError(SUPPORT_DEPENDS.format(name=name, expected=both[0], got=both[1]))
    one, two = (priors_of(t.nodes, latents) for t in (first, second))
    if is_random:
        nodes: Iterable[tuple[str, Any]] = second.nodes.items()
        indices = {
            k: n["value"] for k, n in nodes if n["type"] == "sample" and site_is_subsample(n)
        }
        again = run_once(run, at={**other, **indices})
        torch.set_rng_state(state)
        # a prior that depends on a hidden discrete latent is not a function of the latents
        random = depend_on_latents(two, priors_of(again.nodes, latents))
        one = {k: prior for k, prior in one.items() if k not in random}
    dependent = depend_on_latents(one, two)
    return {k: k in dependent for k, prior in one.items() if prior.shape or k in dependent}


def scales_of(nodes: Mapping[str, Any], latents: Latents, like: Tensor) -> Tensor:
    """The scales of priors in a run as a vector ``(latent_dim,)``; 1 where a latent has none."""
    found, priors = torch.ones_like(like), priors_of(nodes, latents)
    for name, part in latents.views(found).items():
        if name in priors:
            part.copy_(priors[name].diagonal)
    return torch.where(found.isfinite() & (found > 0), found, 1.0)


def priors_of(nodes: Mapping[str, Any], latents: Latents) -> dict[str, PriorScale]:
    """The proper location-scale priors among the nodes of a traced run."""
    priors = dict[str, PriorScale]()
    for name, site in latents.sites.items():
        node: Any = nodes.get(name, {"mask": False})
        prior = None if node["mask"] is False else PriorScale.of(node["fn"])
        # enumerated discrete latents add dimensions
        if prior is None or prior.loc.dim() > node["value"].dim():
            continue
        # only with these bijections does a log density of u give that of the value
        if prior.log_prob is None or is_identity_or_exp(site.bijection):
            priors[name] = prior
    return priors


def depend_on_latents(
    one: Mapping[str, PriorScale | None], other: Mapping[str, PriorScale | None]
) -> list[str]:
    """The latents whose prior location or scale differs between two runs."""
    both = ((k, prior, other.get(k)) for k, prior in one.items())
    return [k for k, a, b in both if a and b and not all(map(torch.equal, a[:2], b[:2]))]
