# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a model must be to have a guide: the same latents in each run, and those of its guide."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.conditional import ConditionalTransform
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to

from ..joint.sites import Latents, Site, describe_support, is_enumerated, same_support

Sites = Mapping[str, Site]

_DEPENDS_ON_LATENTS = {
    "names": "site '{name}' is there for some values of the other latents only: expected the same "
    "latents in each run. Draw it always, and use its value where it is wanted",
    "shape": "the shape of site '{name}' depends on other latents: expected one shape, got {expected} "
    "and {got}",
    "support": "the support of site '{name}' depends on other latents: expected one support, got "
    "{expected} and {got} for slightly different values of the latents. Draw it on a fixed scale and "
    "transform it: in place of x ~ Uniform(0, a), u ~ Uniform(0, 1) and "
    "pyro.deterministic('x', a * u)",
}
_DEPENDS_ON_ARGUMENTS = {
    "shape": "site '{name}': the guide was set up for the shape {expected}, and for these arguments "
    "of the model it is {got}. A guide has one latent for each of a fixed set of elements; make a new "
    "guide for data of another size",
}
_OF_ANOTHER_MODEL = {
    "names": "site '{name}': {where}: expected the sites of the guide, {expected}, got {got}. The "
    "guide is of another model",
    "shape": "site '{name}': the guide was set up for the shape {expected}, and in this model, for "
    "these arguments, it is {got}: expected {expected}, got {got}",
    "support": "site '{name}': expected the support {expected}, for which the guide was set up, got "
    "{got}. The guide is of another model",
}


def check_model(model: Any) -> None:
    """Refuses what cannot be a model, and a transform in place of one.

    :raises TypeError: if it is such.
    """
    if not callable(model):
        raise TypeError(f"model: expected a callable, got {type(model).__name__}")
    if isinstance(model, (Transform, ConditionalTransform)):
        raise TypeError(
            "model: expected a Pyro model, a callable with sample statements, got the transform "
            f"{type(model).__name__}; a flow goes into AutoAutoregressive(model, flow=...), as a "
            "callable that takes the latent dimension and returns it"
        )


def is_hidden(node: Any) -> bool:
    """Whether a guide leaves a node of a trace alone: data, plates, and what is enumerated."""
    return prototype_hide_fn(node) or is_enumerated(node)


def latents_of(run: Callable[[], Any]) -> dict[str, Site]:
    """The latent sites of one more run of a model, which leaves no trace and no random state.

    :param run: runs the model.
    """
    with torch.random.fork_rng(devices=[]), poutine.block(), torch.no_grad():
        trace = poutine.trace(poutine.block(run, is_hidden)).get_trace()
    return sites_by_name(trace)


def sites_by_name(trace: poutine.Trace) -> dict[str, Site]:
    """The latent sites of a trace, by their names."""
    sites = {}
    for name, node in trace.iter_stochastic_nodes():
        if not is_hidden(node):
            sites[name] = Site.from_node(node)
    return sites


def check_start(latents: Latents, start: Tensor, values: Mapping[str, Tensor]) -> None:
    """Refuses a starting point that is not inside the supports.

    :param latents: the latents.
    :param start: their starting point, shape ``(latent_dim,)``.
    :param values: the value of each site there.
    :raises ValueError: if the starting value of a site is not inside its support.
    """
    for name, z in latents.split(start).items():
        if not z.isfinite().all():
            raise ValueError(
                f"site '{name}': expected a starting value inside its support, got "
                f"{values[name].tolist()}"
            )


def refuse_subsampling(sites: Iterable[Site]) -> None:
    """Refuses a latent site in a sub-sampled plate.

    Each mini-batch has other latents, and a guide of a fixed number of them would give those of one
    mini-batch to the next.

    :raises ValueError: if there is one.
    """
    for site in sites:
        for frame in site.plates:
            if frame.full_size is not None and frame.size != frame.full_size:
                raise ValueError(
                    f"site '{site.name}' is in the sub-sampled plate '{frame.name}' ({frame.size} of "
                    f"{frame.full_size}): this guide has one latent for each of a fixed set of "
                    "elements and cannot follow a minibatch. Use AutoAmortized(model, encoder), whose "
                    "encoder reads the data of the minibatch, or AutoAmortized(model), which has "
                    "parameters for each element; or do not sub-sample the plate"
                )


def refuse_moving_structure(
    first: poutine.Trace, run: Callable[[], Any], rng_state: Tensor
) -> tuple[str, ...]:
    """Refuses a model whose sites or supports depend on the values of its latents.

    The model is run again with other latents and the same random numbers; everything else, the
    data too, is then as it was, so what differs depends on the latents.

    :param first: the trace of the latents of the first run.
    :param run: runs the model.
    :param rng_state: the state of the generator before the first run.
    :return: the names of the sites that have data.
    :raises ValueError: if a site comes, goes, or changes its shape or support.
    """
    with torch.random.fork_rng(devices=[]), poutine.block(), ShiftedLatents(first):
        torch.set_rng_state(rng_state)
        second = poutine.trace(run).get_trace()
    _compare(sites_by_name(first), sites_by_name(second), _DEPENDS_ON_LATENTS)
    return tuple(second.observation_nodes)


def refuse_other_shapes(sites: Sites, run: Callable[[], Any]) -> None:
    """Refuses arguments for which the latents of a guide have other shapes than it was set up for.

    Where broadcasting hides it, as for a batch of one, the loss would be wrong with no other sign.

    :param sites: the guide's sites.
    :param run: runs the model.
    :raises ValueError: if a latent has another shape, or is in a plate that is sub-sampled now.
    """
    now = latents_of(run)
    # sites that are latent only now are predicted, and those that have data now are conditioned on
    common = {name: site for name, site in sites.items() if name in now}
    now = {name: now[name] for name in common}
    refuse_subsampling(now.values())
    _compare(common, now, _DEPENDS_ON_ARGUMENTS)


def refuse_other_model(
    sites: Sites, observed: Collection[str] | None, run: Callable[[], Any]
) -> None:
    """Refuses a model whose latents are not those of the guide.

    :param sites: the guide's sites.
    :param observed: the sites that had data when the guide was set up; without data they are
        predicted. None if it is not known which.
    :param run: runs the model.
    :raises ValueError: if a site is missing, or one too many, or its shape or support is another;
        or if it is in a plate that is sub-sampled.
    """
    now = latents_of(run)
    for name in now.keys() - sites.keys():
        if observed is None or name in observed:
            del now[name]
    compare_names(sites, now)
    refuse_subsampling(now.values())
    _compare(_to_single(sites), _to_single(now), _OF_ANOTHER_MODEL)


def compare_names(
    expected: Collection[str], got: Collection[str], message: str = _OF_ANOTHER_MODEL["names"]
) -> None:
    """Refuses a model with other latents than the guide.

    :param expected: the names of the guide's sites.
    :param got: the names of the model's latents.
    :param message: what to say, with fields for the name of a site and what is wrong with it.
    :raises ValueError: if they differ.
    """
    for name in sorted(set(expected) ^ set(got)):
        where = "the model has no such latent" if name in expected else "the guide has no such site"
        sites = {"expected": sorted(expected), "got": sorted(got)}
        raise ValueError(message.format(name=name, where=where, **sites))


def _compare(expected: Sites, got: Sites, messages: Mapping[str, str]) -> None:
    """Refuses sites that differ, in the words of a situation; what has no words may differ."""
    compare_names(expected, got, messages.get("names", ""))
    for name, site in expected.items():
        if site.shape != got[name].shape:
            shapes = {"expected": tuple(site.shape), "got": tuple(got[name].shape)}
            raise ValueError(messages["shape"].format(name=name, **shapes))
        supports = site.support, got[name].support
        if "support" in messages and not same_support(*supports):
            one, other = map(describe_support, supports)
            raise ValueError(messages["support"].format(name=name, expected=one, got=other))


def _to_single(sites: Sites) -> dict[str, Site]:
    """Sites whose bounds can be compared: in one place, and equally exact."""
    return {
        name: site.to(lambda bound: bound.to(device="cpu", dtype=torch.float32))
        for name, site in sites.items()
    }


class ShiftedLatents(Messenger):
    """Moves each latent site a little away from where it was in a trace.

    :param trace: a trace of the model.
    """

    def __init__(self, trace: poutine.Trace) -> None:
        super().__init__()
        self._latents: dict[str, Tensor] = {}
        nodes: Iterable[tuple[str, Any]] = trace.iter_stochastic_nodes()
        for name, node in nodes:
            self._latents[name] = biject_to(node["fn"].support).inv(node["value"])

    def _pyro_sample(self, message: Any) -> None:
        latent = self._latents.get(message["name"])
        if latent is None or message["is_observed"]:
            return
        shifted = biject_to(message["fn"].support)(latent + 0.01 * (1 + latent.abs()))
        # a site of another shape now keeps it, to be refused for it
        if message["value"] is None or message["value"].shape == shifted.shape:
            message["value"] = shifted
