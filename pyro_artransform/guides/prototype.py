# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Runs of a guide's model: initial values, the prototype trace, and checks that reject models."""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from .._base.arguments import shown
from ..model.coordinates.centering import depend_on_latents
from ..model.coordinates.families import PriorScale
from ..model.run_once import run_once
from ..model.sites import (
    SUPPORT_DEPENDS,
    Latents,
    Site,
    check_continuous,
    initial_value,
    same_support,
)
from ..model.traces import is_enumerated, support_of_latent


def starting_value(
    init_loc_fn: Callable[[Any], Tensor], sites: Collection[str] | None, site: Any
) -> Tensor:
    """The initial value of a latent; once the guide's sites are known, other sites are predictions."""
    if (sites is not None and site["name"] not in sites) or is_enumerated(site):
        return site["fn"].sample()
    if site["fn"].support.is_discrete:
        raise ValueError(
            f"site '{site['name']}' is a discrete latent; if it is data, pass it as obs=, and if it is to be "
            "predicted, call the guide with the data first. Else pass pyro.infer.config_enumerate(model) "
            f"to the guide and to TraceEnum_ELBO, or poutine.block(model, hide=['{site['name']}'])"
        )
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized:
            raise ValueError(
                f"site '{site['name']}' is in the sequential plate '{frame.name}': expected a vectorized "
                f"one, with pyro.plate(...), or range({frame.size}) where each latent has its own site"
            )
    return initial_value(init_loc_fn, site)


class StartMessenger(InitMessenger):
    """Sets latents to initial values, and rejects those without a density on the reals."""

    def __init__(self, init_loc_fn: Callable[[Any], Tensor], sites: Collection[str] | None) -> None:
        super().__init__(partial(starting_value, init_loc_fn, sites))
        self._sites = sites

    def _pyro_post_sample(self, site: Any) -> None:
        # after the model's own handlers: poutine.reparam may have replaced the site
        is_own = self._sites is None or site["name"] in self._sites
        if is_own and not site["is_observed"] and not is_hidden(site):
            check_continuous(site)


def prototype_trace(latents: Latents, z: Tensor) -> poutine.Trace:
    """A trace of latents at z ``(latent_dim,)``, as Pyro and ``NeuTraReparam`` expect it."""
    trace, values = poutine.Trace(), latents.constrain(z)
    rest = {"type": "sample", "is_observed": False, "args": (), "kwargs": {}}
    for name, site in latents.sites.items():
        # has the shapes and support of the site's distribution, without its data and graphs
        event_shape = site.shape[len(site.batch_shape) :]
        fn = dist.ImproperUniform(site.support, site.batch_shape, event_shape)
        node = {"fn": fn, "value": values[name], "infer": {}, "cond_indep_stack": site.plates}
        trace.add_node(name, name=name, **node, **rest)
    return trace


def is_hidden(msg: Any) -> bool:
    """Whether a guide ignores a trace node: data, plates and enumerated sites."""
    return prototype_hide_fn(msg) or is_enumerated(msg)


def sites_by_name(trace: poutine.Trace) -> dict[str, Site]:
    """The latent sites of a trace, by name."""
    nodes = trace.iter_stochastic_nodes()
    return {name: Site.from_node(node) for name, node in nodes if not is_hidden(node)}


def one_more_run(run: Callable[[], object]) -> Any:
    """The trace of a run that is hidden from outer handlers and preserves the random state."""
    with torch.random.fork_rng(devices=[]):
        return run_once(run)


def refuse_subsampling(sites: Iterable[Site]) -> None:
    """Rejects latents in subsampled plates, which differ between mini-batches."""
    for site in sites:
        for frame in site.plates:
            if frame.full_size is not None and frame.size != frame.full_size:
                raise ValueError(
                    f"site '{site.name}' is in the subsampled plate '{frame.name}' ({frame.size} of "
                    f"{frame.full_size}): use AutoAmortized(model, encoder), or do not subsample the plate"
                )


def refuse_moving_structure(
    first: poutine.Trace, run: Callable[[], object], rng_state: Tensor
) -> list[str]:
    """Rejects a model whose sites or supports depend on the values of its latents.

    Runs the model again with other latents and the same random numbers.

    :return: latents whose prior location or scale differs.
    """
    with torch.random.fork_rng(devices=[]), poutine.block(), ShiftedLatents(first):
        torch.set_rng_state(rng_state)
        second = poutine.trace(run).get_trace()
    expected, got = sites_by_name(first), sites_by_name(second)
    for name in sorted(expected.keys() ^ got.keys()):
        raise ValueError(
            f"site '{name}' exists only for some values of the other latents: expected the same latents in "
            "each run. Always draw it, and use its value where needed"
        )
    for name, site in expected.items():
        one, other = tuple(site.shape), tuple(got[name].shape)
        if one != other:
            raise ValueError(
                f"the shape of site '{name}' depends on other latents: expected one shape, got {one} "
                f"and {other}"
            )
        if not same_support(site.support, got[name].support):
            both = {"expected": site.support, "got": got[name].support}
            raise ValueError(SUPPORT_DEPENDS.format(name=name, **both))
    scales = (
        {name: PriorScale.of(ran.nodes[name]["fn"]) for name in got} for ran in (first, second)
    )
    return depend_on_latents(*scales)


def refuse_other_latents(
    sites: Mapping[str, Site], mapped: Iterable[str], run: Callable[[], object]
) -> None:
    """Rejects arguments for which latents have other shapes, or a mapped latent is missing."""
    try:
        trace = one_more_run(run)
    except Exception:  # the model may need the guide's draws; if not, its own run raises this again
        return
    # new latent sites are predictions, and sites with data now are conditioned on
    now = {name: site for name, site in sites_by_name(trace).items() if name in sites}
    refuse_subsampling(now.values())
    expected, got = ({k: tuple(s.shape) for k, s in found.items()} for found in (sites, now))
    others = [name for name in got if got[name] != expected[name]]
    if others or not set(mapped) <= trace.nodes.keys():
        left_out = f", without those of {others}" if others else ""
        raise ValueError(
            f"with these arguments the model has the latents {got}, the guide has {expected}: expected the "
            "same. Make a new guide for other data. For predictions, draws = guide.sample_posterior(n, *data "
            f"of the fit){left_out}, then Predictive(model, posterior_samples=draws)(*these arguments)"
        )


def refuse_missing(expected: Collection[str], got: Collection[str]) -> None:
    """Rejects a model without some latents of the guide."""
    for name in sorted({*expected} - {*got}):
        raise ValueError(
            f"site '{name}': the model has no such latent: expected the sites of the guide, "
            f"{sorted(expected)}, got {sorted({*expected} & {*got})}. The guide was made for another model, "
            "or for other data"
        )


class ShiftedLatents(Messenger):
    """Shifts each latent site a little from its value in a trace."""

    def __init__(self, trace: poutine.Trace) -> None:
        super().__init__()
        self._latents: dict[str, Tensor] = {}
        nodes: Iterable[tuple[str, Any]] = trace.iter_stochastic_nodes()
        for name, node in nodes:
            bijection = biject_to(support_of_latent(node["fn"]))
            latent = bijection.inv(node["value"])
            if not latent.isfinite().all():
                wanted = "starting values" if node["cond_indep_stack"] else "a starting value"
                got = f"inside its support, got {shown(node['value'].tolist())}"
                raise ValueError(f"site '{name}': expected {wanted} {got}")
            if not bijection(latent).isfinite().all():
                wanted = "a support onto which the real numbers can be mapped"
                raise ValueError(f"site '{name}': expected {wanted}, got {node['fn'].support}")
            self._latents[name] = latent

    def _pyro_sample(self, message: Any) -> None:
        latent = self._latents.get(message["name"])
        if latent is not None and not message["is_observed"]:
            shifted = biject_to(support_of_latent(message["fn"]))(
                latent + 0.01 * (1 + latent.abs())
            )
            # a site of another shape is left alone, and rejected later
            given = message["value"]
            if (message["fn"].shape() if given is None else given.shape) == shifted.shape:
                message["value"] = shifted
