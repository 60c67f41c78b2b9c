# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Pyro handlers that run a model for its log-density, and what a run says of its plates."""

import math
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta, validation_enabled
from pyro.distributions.util import scale_and_mask
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.distributions import biject_to

from .sites import is_enumerated, latent_nodes, unwrapped

_LONGEST_SEQUENCE = 16
# of entries that are counted for a signature: of more, a run of a model says as much in the same time
_MOST_COUNTED = 2**18


def hidden_sites() -> BlockMessenger:
    """Hides the sites of a run from handlers around it, but not its parameters: they are trained."""
    return BlockMessenger(hide_types=["sample", "observe"])


def traced_parameters(run: Callable[[], object]) -> dict[str, Tensor]:
    """The unconstrained parameters that a run of a model or a guide asks Pyro for, by name."""
    with poutine.trace(param_only=True) as capture:
        run()
    found: dict[int, tuple[str, Tensor]] = {}
    for name in capture.trace.param_nodes:
        value: Any = capture.trace.nodes[name]["value"]
        # Pyro attaches this function; a parameter without it is its own unconstrained value
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        # a module's parameter may come by several names
        found.setdefault(id(leaf), (name, leaf))
    return dict(found.values())


class UnmaskedLatents(Messenger):
    """Gives the masked elements of continuous latents their prior density.

    A mask, such as that of ``obs_mask``, leaves elements of latents without a density, so that a
    guide of them would widen without bound, and its ELBO grow. With the prior their posterior is
    the prior, and that of the other elements stays the same. The number ``False`` as a mask is
    left alone: it is how an improper prior is written.

    :param improper: sites whose masks are left alone as well, as :func:`improper_sites` finds them.
    """

    def __init__(self, improper: Container[str] = ()) -> None:
        super().__init__()
        self._improper = improper

    def _pyro_sample(self, message: Message) -> None:
        is_latent = not (message["is_observed"] or site_is_subsample(message))
        is_improper = message["mask"] is False or message["name"] in self._improper
        if is_latent and not is_enumerated(message) and not is_improper:
            message["mask"] = None


@torch.no_grad()
def improper_sites(run: Callable[[], object], trace: poutine.Trace) -> set[str]:
    """The latents with masked elements that the rest of the density depends on.

    These have no prior, as in Pyro: to give them one would change the posterior.

    :param trace: a run of the model, for the values of its latents and their masks.
    """
    latents = latent_nodes(trace)
    values = {node["name"]: node["value"] for node in latents}
    masked = [n for n in latents if isinstance(n["mask"], Tensor) and not is_enumerated(n)]
    if not masked:
        return set()
    state, found = torch.get_rng_state(), set()

    def total(given: Mapping[str, Any]) -> Tensor:
        torch.set_rng_state(state)  # the same random numbers of a model for all
        conditioned = poutine.condition(run, dict(given))
        return torch.as_tensor(poutine.trace(conditioned).get_trace().log_prob_sum())

    with torch.random.fork_rng(devices=[]), hidden_sites(), validation_enabled(False):
        before = total(values)
        for node in masked:
            name, value, bijection = node["name"], node["value"], biject_to(node["fn"].support)
            moved = bijection(bijection.inv(value) + 0.1)
            is_counted = node["mask"][(..., *(None,) * node["fn"].event_dim)]
            after = total({**values, name: torch.where(is_counted, value, moved)})
            if not torch.allclose(before, after, rtol=0.0, atol=0.0, equal_nan=True):
                found.add(name)
    return found


class SimulatedData(UnconditionMessenger):
    """Draws data anew; deterministic sites follow from the draws, and factors stay."""

    def _pyro_sample(self, message: Message) -> None:
        if has_data(message):
            super()._pyro_sample(message)


class SiteLogProbs(Messenger):
    """Sets sites to given values, and collects the log-density of each sample site.

    It gives what a trace of the conditioned model gives, for a fraction of the time.

    :param given: the values of some sites.
    :param data_only: whether only sites with data count, their scale left out.
    """

    def __init__(self, given: Mapping[str, Tensor], *, data_only: bool = False) -> None:
        super().__init__()
        self._given, self._data_only = given, data_only
        #: the value of each site, indices of plates included
        self.values: dict[str, Tensor] = {}
        #: the log-density of each site, of its batch shape
        self.log_probs: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self._given and not message["is_observed"]:
            message["value"] = self._given[message["name"]]

    def _pyro_post_sample(self, message: Any) -> None:
        name, value = message["name"], message["value"]
        self.values[name] = value
        if site_is_subsample(message) or (self._data_only and not has_data(message)):
            return
        log_prob = _log_prob(message)
        scale = 1.0 if self._data_only else message["scale"]
        self.log_probs[name] = scale_and_mask(log_prob, scale, message["mask"])


def _log_prob(site: Any) -> Tensor:
    """The log-density of a site before its mask, with data that count in the place of those that it hides.

    What is hidden may be NaN, or a zero that has no logarithm: a mask takes it out of the density, but not
    out of the gradient, where it makes 0 times infinity.
    """
    fn, value, mask = site["fn"], site["value"], site["mask"]
    if isinstance(mask, Tensor) and has_data(site) and not is_functorch_wrapped_tensor(mask):
        event_dim = fn.event_dim
        event = value.shape[value.dim() - event_dim :]
        batch = torch.broadcast_shapes(mask.shape, value.shape[: value.dim() - event_dim])
        if not mask.any():
            shape, dtype = torch.broadcast_shapes(batch, fn.batch_shape), torch.get_default_dtype()
            return torch.zeros(shape, dtype=dtype, device=mask.device)
        is_counted, value = mask.expand(batch), value.expand(batch + event)
        counted = value.reshape(-1, *event)[is_counted.flatten().int().argmax()]
        value = torch.where(is_counted[(..., *(None,) * event_dim)], value, counted)
    log_prob: Tensor = fn.log_prob(value, *site["args"], **site["kwargs"])
    return log_prob


def runs_model(trace: poutine.Trace) -> bool:
    """Whether a guide with this trace runs its model, as Pyro's messenger guides do.

    Its trace has the data, which are no part of its density, and with each latent the model's prior.
    """
    return any("prior" in node["infer"] for node in latent_nodes(trace))


def has_data(site: Any) -> bool:
    """Whether a site is observed, and is neither a factor, a deterministic value nor a subsample."""
    if site["type"] != "sample" or not site["is_observed"]:
        return False
    return not (site_is_subsample(site) or site_is_factor(site) or is_deterministic(site))


def observed_nodes(trace: poutine.Trace) -> list[Any]:
    """The nodes of a trace that are given, without the indices of plates, which a model may be given too."""
    nodes = [trace.nodes[name] for name in trace.observation_nodes]
    return [node for node in nodes if not site_is_subsample(node)]


def is_deterministic(site: Any) -> bool:
    """Whether a site's value is computed: one of ``pyro.deterministic``, or what a reparametrizer leaves.

    A reparametrizer observes a value at a ``Delta`` of the same tensor, which plates expand. Data come
    in a tensor of their own, also where their distribution is a ``Delta``.
    """
    if site["infer"].get("_deterministic"):
        return True
    fn, value = unwrapped(site["fn"]), site["value"]
    is_point = site["is_observed"] and isinstance(fn, Delta) and isinstance(value, Tensor)
    return is_point and _address(fn.v) == _address(value)


def _address(tensor: Tensor) -> int:
    while is_functorch_wrapped_tensor(tensor):  # as under torch.vmap
        tensor = get_unwrapped(tensor)
    return tensor.data_ptr()


class ModelStructure(NamedTuple):
    """The sites of a run of a model, without their values.

    :param shapes: the shape of each continuous latent.
    :param global_latents: the names of those that are in no plate.
    :param subsampled_latents: the names of those in a plate that holds a part of its elements only.
    :param scale: the largest factor of the log-density of data, relative to that of the global
        latents: in a plate of 100 elements, 20 of them present, it is 5.
    :param num_values: how many values or log-densities all sites have, data included.
    """

    shapes: dict[str, tuple[int, ...]]
    global_latents: list[str]
    subsampled_latents: list[str]
    scale: float
    num_values: int

    @classmethod
    def from_trace(cls, trace: poutine.Trace) -> "ModelStructure":
        """The structure of a traced run."""
        nodes = latent_nodes(trace)
        latents = [node for node in nodes if not is_enumerated(node)]
        in_no_plate = [node for node in latents if not node["cond_indep_stack"]]
        data = [node for node in observed_nodes(trace) if not is_deterministic(node)] or nodes
        parts = set(subsampled_plates(trace))
        return cls(
            shapes={node["name"]: tuple(node["value"].shape) for node in latents},
            global_latents=[node["name"] for node in in_no_plate],
            subsampled_latents=[
                node["name"] for node in latents if parts.intersection(node["cond_indep_stack"])
            ],
            scale=_largest_scale(data) / _largest_scale(in_no_plate),
            num_values=count_values(trace),
        )

    @property
    def is_scaled(self) -> bool:
        """Whether the data are scaled, up or down."""
        return not math.isclose(self.scale, 1.0, rel_tol=1e-9)


def count_values(trace: poutine.Trace) -> int:
    """How many values or log-densities the sites of a trace have, data included."""
    count = 0
    for node in (*latent_nodes(trace), *observed_nodes(trace)):
        count += max(torch.as_tensor(node["value"]).numel(), math.prod(node["fn"].batch_shape))
    return count


def _largest_scale(nodes: list[Any]) -> float:
    return max((float(torch.as_tensor(node["scale"]).max()) for node in nodes), default=1.0)


def argument_signature(arguments: Any, *, with_values: bool = False) -> Any:
    """What the sites and shapes of a run may depend on in the arguments, as a key of a dictionary.

    That is shapes, dtypes, integers, strings and types; of a sequence of more than 16 elements the
    length and the first element.

    :param arguments: tensors, arrays and anything else, nested in tuples, lists and mappings.
    :param with_values: whether what the scale of data may follow from counts, too: floats, all elements
        of sequences, the value of a tensor of one element, the values of one of booleans or integers,
        as masks and lengths are, and how many floats of one are zero or NaN, as where they pad. A large
        tensor, and what is neither a tensor nor plain data nor callable, has another key each time.
    """
    if isinstance(arguments, Mapping):
        arguments = tuple((name, arguments[name]) for name in sorted(arguments, key=str))
    if isinstance(arguments, (tuple, list)):
        is_short = with_values or len(arguments) <= _LONGEST_SEQUENCE
        few = arguments if is_short else arguments[:1]
        return len(arguments), *(argument_signature(x, with_values=with_values) for x in few)
    plain = (int, str, float) if with_values else (int, str)
    if arguments is None or isinstance(arguments, plain):
        return arguments
    # arrays of any library
    shape, dtype = getattr(arguments, "shape", None), getattr(arguments, "dtype", None)
    if isinstance(shape, tuple):
        return (tuple(shape), dtype, _content(arguments)) if with_values else (tuple(shape), dtype)
    if with_values:
        return arguments if callable(arguments) else object()
    return type(arguments)


def _content(array: Any) -> Any:
    """What a scale may follow from in a tensor or an array: see :func:`argument_signature`."""
    size = math.prod(array.shape)
    with suppress(Exception):  # of a sparse tensor nothing can be counted so
        if size == 1:
            return array.item()
        if size <= _MOST_COUNTED and any(kind in str(array.dtype) for kind in ("bool", "int")):
            return hash(torch.as_tensor(array, device="cpu").numpy().tobytes())
        if size <= _MOST_COUNTED:
            return (array == 0).sum().item(), (array != array).sum().item()
    return object()


def plate_nesting(*traces: poutine.Trace) -> int:
    """How many dimensions the plates of traces take, counted from the right."""
    nesting = 0
    for trace in traces:
        for node in trace.nodes.values():
            for frame in node.get("cond_indep_stack", ()):
                nesting = max(nesting, -(frame.dim or 0))
    return nesting


def subsampled_plates(trace: poutine.Trace) -> list[CondIndepStackFrame]:
    """The frames of the plates of a trace that hold a part of their elements only, once a site."""
    found = []
    for node in trace.nodes.values():
        for frame in node.get("cond_indep_stack", ()):
            if frame.full_size not in (None, frame.size):
                found.append(frame)
    return found
