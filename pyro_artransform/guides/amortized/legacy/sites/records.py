# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a guide knows of its model: the latent sites, and which models it cannot be a guide of."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

# of a longer sequence the length and the first element have to do
_FEW = 16

Site = Any  # a message of Pyro, as a trace holds it


class SiteShape(dist.TorchDistribution):
    """The shapes and the support of a latent site's distribution, and nothing else of it.

    A guide keeps this in place of the distribution itself, which may hold the data, graphs, and
    functions that no copy or file can take.

    :param batch_shape: the batch shape.
    :param event_shape: the event shape.
    :param support: the support.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self, batch_shape: torch.Size, event_shape: torch.Size, support: constraints.Constraint
    ) -> None:
        self._support = support
        super().__init__(batch_shape, event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support."""
        return self._support


def latent_site(
    name: str,
    value: Tensor,
    event_dim: int,
    support: constraints.Constraint,
    cond_indep_stack: tuple[Any, ...],
) -> Site:
    """The entry of a latent site in a guide's prototype trace.

    :param name: its name.
    :param value: a value; its shape, dtype and device are what counts.
    :param event_dim: the number of event dimensions.
    :param support: the support.
    :param cond_indep_stack: the frames of the plates around it.
    """
    cut = value.dim() - event_dim
    return {
        "type": "sample",
        "name": name,
        "fn": SiteShape(value.shape[:cut], value.shape[cut:], support),
        "value": value,
        "is_observed": False,
        "infer": {},
        "args": (),
        "kwargs": {},
        "cond_indep_stack": cond_indep_stack,
    }


def latent_sites(trace: poutine.Trace) -> dict[str, Site]:
    """The latent sites of a trace by name.

    :param trace: a trace.
    """
    return dict(trace.iter_stochastic_nodes())


def slim_trace(trace: poutine.Trace, change: Callable[[Tensor], Tensor]) -> poutine.Trace:
    """The latent sites of a trace, each with no more than a guide needs.

    :param trace: a trace.
    :param change: applied to every tensor in it.
    """
    slim = poutine.Trace()
    for name, site in latent_sites(trace).items():
        support = change_tensors(site["fn"].support, change)
        value = change(site["value"])
        stack = site["cond_indep_stack"]
        slim.add_node(name, **latent_site(name, value, site["fn"].event_dim, support, stack))
    return slim


def change_tensors(
    support: constraints.Constraint, change: Callable[[Tensor], Tensor]
) -> constraints.Constraint:
    """A copy of a support whose bounds are changed.

    :param support: a support.
    :param change: applied to each tensor in it.
    """
    changed = copy.copy(support)
    for key, value in vars(support).items():
        if isinstance(value, Tensor):
            setattr(changed, key, change(value))
        elif isinstance(value, constraints.Constraint):
            setattr(changed, key, change_tensors(value, change))
    return changed


def is_enumerated(site: Site) -> bool:
    """Whether a site is discrete and marked for enumeration: then it is not the guide's affair."""
    return site["infer"].get("enumerate") is not None


def is_hidden(site: Site) -> bool:
    """Whether a site is none that a guide covers."""
    return prototype_hide_fn(site) or is_enumerated(site)


def refuse_discrete(site: Site) -> None:
    """Refuses a discrete latent site.

    :raises ValueError: if the site is one.
    """
    if not site["fn"].support.is_discrete:
        return
    raise ValueError(
        f"site '{site['name']}' is discrete, and a flow guide covers continuous latents only: "
        "expected it to be enumerated, hidden or summed out. Give the guide and TraceEnum_ELBO the "
        "model pyro.infer.config_enumerate(model); or hide the site from the guide by "
        f"poutine.block(model, hide=['{site['name']}']) and guide it by another one of an "
        "AutoGuideList; or write the model without it, as a mixture"
    )


def refuse_subsampling(trace: poutine.Trace) -> None:
    """Refuses a latent site in a sub-sampled plate.

    Each minibatch has other latents, and a guide of a fixed number of them would give those of one
    minibatch to the next.

    :param trace: a trace of the model.
    :raises ValueError: if there is one.
    """
    for name, site in latent_sites(trace).items():
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.size != frame.full_size:
                raise ValueError(
                    f"site '{name}' is in the sub-sampled plate '{frame.name}' ({frame.size} of "
                    f"{frame.full_size}): this guide has one latent for each of a fixed set of "
                    "elements and cannot follow a minibatch. Use AutoAmortized(model, encoder), whose "
                    "encoder reads the data of the minibatch, or AutoAmortized(model), which has "
                    "parameters for each element; or do not sub-sample the plate"
                )


def shapes_of(arguments: Any) -> Any:
    """The shapes in a model's arguments, nested as they are: what the shapes of latents hang on.

    :param arguments: tensors, arrays and whatever else, in tuples, lists and dicts.
    """
    if isinstance(arguments, dict):
        return {key: shapes_of(value) for key, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        few = arguments if len(arguments) <= _FEW else arguments[:1]
        return (len(arguments), *map(shapes_of, few))
    shape = getattr(arguments, "shape", None)
    return None if shape is None else tuple(shape)


def refuse_other_shapes(prototype: poutine.Trace, rerun: Callable[[], Any]) -> None:
    """Refuses arguments for which the latents of a guide have other shapes than it was set up for.

    Where broadcasting hides it, as for a batch of one, the loss would be wrong with no other sign.

    :param prototype: the guide's prototype trace.
    :param rerun: runs the model.
    :raises ValueError: if a latent has another shape, or is in a plate that is sub-sampled now.
    """
    with torch.random.fork_rng(devices=[]), poutine.block(), torch.no_grad():
        trace = poutine.trace(poutine.block(rerun, is_hidden)).get_trace()
    sites = latent_sites(trace)
    # sites that are latent only now, as what Predictive predicts, are no concern of the guide
    for name in set(sites) - set(latent_sites(prototype)):
        trace.remove_node(name)
    refuse_subsampling(trace)
    for name, site in latent_sites(prototype).items():
        now: Site = sites.get(name, site)
        expected, got = site["fn"].shape(), now["fn"].shape()
        if expected != got:
            raise ValueError(
                f"site '{name}': the guide was set up for the shape {tuple(expected)}, and for "
                f"these arguments of the model it is {tuple(got)}. A guide has one latent for each "
                "of a fixed set of elements; make a new guide for data of another size"
            )


class ShiftedLatents(Messenger):
    """Moves each latent site a little away from where it was in a trace.

    :param trace: a trace of the model.
    """

    def __init__(self, trace: poutine.Trace) -> None:
        super().__init__()
        self._latents = {
            name: biject_to(site["fn"].support).inv(site["value"])
            for name, site in latent_sites(trace).items()
        }

    def _pyro_sample(self, message: Site) -> None:
        latent = self._latents.get(message["name"])
        if latent is not None and not message["is_observed"]:
            shifted = latent + 0.01 * (1 + latent.abs())
            message["value"] = biject_to(message["fn"].support)(shifted)


def refuse_moving_structure(
    first: poutine.Trace, rerun: Callable[[], Any], rng_state: Tensor
) -> list[str]:
    """Refuses a model whose sites or supports depend on the values of its latents.

    The model is run again with other latents and the same random numbers; everything else, the
    data too, is then as it was, so what differs depends on the latents.

    :param first: the trace of the first run.
    :param rerun: runs the model.
    :param rng_state: the state of the generator before the first run.
    :return: the names of the sites that have data.
    :raises ValueError: if a site comes, goes, or changes its shape or support.
    """
    with torch.random.fork_rng(devices=[]), poutine.block(), ShiftedLatents(first):
        torch.set_rng_state(rng_state)
        second = poutine.trace(rerun).get_trace()
    latents = {k: site for k, site in latent_sites(second).items() if not is_hidden(site)}
    nodes = (latent_sites(first), latents)
    for name in sorted(nodes[0].keys() ^ nodes[1].keys()):
        raise ValueError(
            f"site '{name}' is there for some values of the other latents only: expected the same "
            "latents in each run. Draw it always, and use its value where it is wanted"
        )
    for name, site in nodes[0].items():
        _compare(name, site, nodes[1][name])
    return list(second.observation_nodes)


def _compare(name: str, site: Site, other: Site) -> None:
    shapes = tuple(site["fn"].shape()), tuple(other["fn"].shape())
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the shape of site '{name}' depends on other latents: expected one shape, got "
            f"{shapes[0]} and {shapes[1]}"
        )
    supports = (site["fn"].support, other["fn"].support)
    if not same_support(*supports):
        raise ValueError(
            f"the support of site '{name}' depends on other latents: expected one support, got "
            f"{describe_support(supports[0])} and {describe_support(supports[1])} for slightly "
            "different values of the latents. Draw it on a fixed scale and transform it: in place "
            "of x ~ Uniform(0, a), u ~ Uniform(0, 1) and pyro.deterministic('x', a * u)"
        )


def same_support(a: constraints.Constraint, b: constraints.Constraint) -> bool:
    """Whether two supports are of one kind and have equal bounds."""
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    return all(_same(value, vars(b)[key]) for key, value in vars(a).items())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, constraints.Constraint):
        return same_support(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    same = a == b
    return bool(same.all() if isinstance(same, Tensor) else same)


def describe_support(support: constraints.Constraint) -> str:
    """A support in words, with its bounds."""
    bounds = (f"{key}={_brief(value)}" for key, value in vars(support).items())
    return f"{type(support).__name__.lstrip('_')}({', '.join(bounds)})"


def _brief(value: Any) -> str:
    if isinstance(value, constraints.Constraint):
        return describe_support(value)
    if isinstance(value, Tensor):
        return str(value.tolist())
    return str(value)
