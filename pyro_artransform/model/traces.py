# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Sites, plates and data of a traced model, and checks of them."""

import math
import sys
from collections.abc import Hashable, Mapping
from contextlib import suppress
from functools import partial
from itertools import filterfalse
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import (
    Delta,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    SineBivariateVonMises,
    SineSkewed,
    VonMises,
)
from pyro.distributions.util import broadcast_shape, scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_factor, site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.distributions import constraints

# maximum number of entries read for a signature: with more, a run of the model takes no longer
_MOST_COUNTED = 2**18


def latent_nodes(trace: poutine.Trace) -> list[Any]:
    """The latent sample sites of a trace, without plate indices."""
    return [*filterfalse(site_is_subsample, map(trace.nodes.__getitem__, trace.stochastic_nodes))]


def observed_nodes(trace: poutine.Trace) -> list[Any]:
    """The observed sites of a trace, without plate indices."""
    return [*filterfalse(site_is_subsample, map(trace.nodes.__getitem__, trace.observation_nodes))]


def unwrapped(fn: Any) -> Any:
    """Strips wrappers that expand, mask or reinterpret a distribution."""
    while isinstance(fn, (Independent, ExpandedDistribution, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def support_of(fn: Any) -> Any:
    """The support of a distribution of data; all real numbers if it has none, which Pyro accepts."""
    try:
        return fn.support
    except NotImplementedError:
        return constraints.independent(constraints.real, fn.event_dim)


def support_of_latent(fn: Any) -> Any:
    """The support of the distribution of a latent: for angles the turn in which their samples are.

    Pyro's is the real line, on which their density repeats each turn, so that posteriors are improper.
    """
    if not isinstance(unwrapped(fn), (VonMises, SineBivariateVonMises, SineSkewed)):
        return fn.support
    turn = constraints.interval(-math.pi, math.pi)
    return constraints.independent(turn, fn.event_dim) if fn.event_dim else turn


def is_enumerated(site: Any) -> bool:
    """Whether a site is discrete and marked for enumeration."""
    return site["infer"].get("enumerate") is not None


def has_data(site: Any) -> bool:
    """Whether a site is observed and not a factor, deterministic or a subsample."""
    if site["type"] != "sample" or not site["is_observed"]:
        return False
    return not (site_is_subsample(site) or site_is_factor(site) or is_deterministic(site))


def is_deterministic(site: Any) -> bool:
    """Whether a site's value is computed, by ``pyro.deterministic`` or a reparametrizer.

    A reparametrized site is observed at a ``Delta`` of the same tensor, which plates expand; data are not.
    """
    if site["infer"].get("_deterministic"):
        return True
    fn, value = unwrapped(site["fn"]), site["value"]
    is_point = site["is_observed"] and type(fn) is Delta and isinstance(value, Tensor)
    return is_point and _address(fn.v) == _address(value)


def _address(tensor: Tensor) -> int:
    while is_functorch_wrapped_tensor(tensor):  # under torch.vmap
        tensor = get_unwrapped(tensor)
    return tensor.data_ptr()


def runs_model(trace: poutine.Trace) -> bool:
    """Whether a traced guide runs its model, data included, like Pyro's messenger guides."""
    return any("prior" in node["infer"] for node in latent_nodes(trace))


class ModelStructure(NamedTuple):
    """The sites of a model run, without values."""

    shapes: dict[str, tuple[int, ...]]  #: by continuous latent
    #: latents in no plate, and latents in a subsampled plate
    global_latents: list[str]
    subsampled_latents: list[str]
    #: the largest scale of data relative to global latents: 5 in a plate of 20 of 100 elements
    scale: float
    is_evenly_scaled: bool  #: whether all data have this scale or scale 1
    num_values: int  #: number of values or log densities of all sites, data included

    @classmethod
    def from_trace(cls, trace: poutine.Trace) -> "ModelStructure":
        """Reads the structure from a trace."""
        nodes, parts = latent_nodes(trace), set(subsampled_plates(trace))
        latents = [node for node in nodes if not is_enumerated(node)]
        in_no_plate = [node for node in latents if not node["cond_indep_stack"]]
        in_part = [node for node in latents if parts.intersection(node["cond_indep_stack"])]
        observed = [node for node in observed_nodes(trace) if not is_deterministic(node)]
        scales = torch.cat([_scales(node) for node in observed or nodes])
        largest = max((float(_scales(node).max()) for node in in_no_plate), default=1.0)
        return cls(
            shapes={node["name"]: tuple(node["value"].shape) for node in latents},
            global_latents=[node["name"] for node in in_no_plate],
            subsampled_latents=[node["name"] for node in in_part],
            scale=float(scales.max()) / largest,
            is_evenly_scaled=bool(((scales == scales.max()) | (scales == 1)).all()),
            num_values=count_values(trace),
        )

    @property
    def is_scaled(self) -> bool:
        """Whether the data are scaled, up or down."""
        return not math.isclose(self.scale, 1.0)


def count_values(trace: poutine.Trace) -> int:
    """The number of values or log densities of all sites of a trace, data included."""
    return sum(
        max(torch.as_tensor(node["value"]).numel(), math.prod(node["fn"].batch_shape))
        for node in (*latent_nodes(trace), *observed_nodes(trace))
    )


def _scales(node: Any) -> Tensor:
    return torch.as_tensor(node["scale"]).double().flatten()


def plate_nesting(*traces: poutine.Trace) -> int:
    """The maximum plate nesting of traces: the number of batch dimensions that plates take."""
    return max((-(f.dim or 0) for trace in traces for f in _all_frames(trace)), default=0)


def _all_frames(trace: poutine.Trace) -> list[CondIndepStackFrame]:
    """The frames of the plates around each site, concatenated."""
    stacks = (node.get("cond_indep_stack", ()) for node in trace.nodes.values())
    return [frame for frames in stacks for frame in frames]


def subsampled_plates(trace: poutine.Trace) -> list[CondIndepStackFrame]:
    """The frames of subsampled plates in a trace, once per site."""
    return [f for f in _all_frames(trace) if f.full_size not in (None, f.size)]


def plate_of_elements(trace: poutine.Trace) -> str:
    """The name of the plate whose elements form mini-batches.

    :raises ValueError: unless there is exactly one such plate, vectorized and with latents.
    """
    stacks = [node["cond_indep_stack"] for node in latent_nodes(trace)]
    names = list(dict.fromkeys(frame.name for frame in subsampled_plates(trace)))
    if not names:  # as in an autoencoder: each latent belongs to an element of the batch
        common = set.intersection(*({frame.name for frame in frames} for frames in stacks))
        names = [frame.name for frame in stacks[0] if frame.name in common][:1]
    dims = [frame.dim for frames in stacks for frame in frames if frame.name in names]
    if len(names) != 1 or not dims or None in dims:
        got = f"those of {names}, {len(dims)} with latents" if names else "none"
        raise ValueError(
            f"expected mini-batches that are the elements of one vectorized plate with latents, got {got}"
        )
    return names[0]


def argument_signature(arguments: Any, *, with_values: bool = False) -> Any:
    """A dictionary key with all properties of arguments that sites and shapes of a run may depend on.

    These are shapes, dtypes, integers, strings and types, nested in tuples, lists and mappings. A sequence of
    more than 16 elements counts by its length and first element.

    :param with_values: whether to include values that may determine the scale of data: floats, all elements
        of sequences, values of tensors of one element, booleans or integers, and the counts of zeros and NaN,
        as in padding. A large tensor, and an object that is neither tensor, plain data nor callable, gets a
        new key in each call.
    """
    if isinstance(arguments, Mapping):
        names = sorted(arguments, key=str)
        arguments = tuple(zip(names, map(arguments.__getitem__, names)))
    if isinstance(arguments, (tuple, list)):
        is_short = with_values or len(arguments) <= 16
        few = arguments if is_short else arguments[:1]
        return len(arguments), *map(partial(argument_signature, with_values=with_values), few)
    plain = (int, str, float) if with_values else (int, str)
    if arguments is None or isinstance(arguments, plain):
        return arguments
    # arrays of any library
    shape, dtype = getattr(arguments, "shape", None), getattr(arguments, "dtype", None)
    if isinstance(shape, tuple):
        return (tuple(shape), dtype, _content(arguments)) if with_values else (tuple(shape), dtype)
    if with_values:
        is_key = callable(arguments) and isinstance(arguments, Hashable)
        return arguments if is_key else object()
    return type(arguments)


def _content(array: Any) -> Any:
    """Values of an array that may determine a scale: see :func:`argument_signature`."""
    size = math.prod(array.shape)
    with suppress(Exception):  # sparse tensors do not support this
        if size == 1:
            return array.item()
        if size <= _MOST_COUNTED and any(kind in str(array.dtype) for kind in ("bool", "int")):
            return hash(torch.as_tensor(array, device="cpu").numpy().tobytes())
        if size <= _MOST_COUNTED:
            return (array == 0).sum().item(), (array != array).sum().item()
    return object()


@torch.no_grad()
def check_data(trace: poutine.Trace, *, all_shapes: bool = True) -> None:
    """Checks the data of a run and the shapes of its sites, if Pyro's validation is on.

    Skips supports that may depend on latents, such as that of ``Uniform(0, z)``, and masked elements.

    :param all_shapes: whether to reject batch dimensions of sites in no plate, like Pyro's ``SVI``.
    """
    if not is_validation_enabled():
        return
    node: Any
    for node in trace.nodes.values():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        try:
            if has_data(node):
                _check_support(node)
            if all_shapes or node["cond_indep_stack"]:
                _check_plates(node)
        except RuntimeError as error:  # what PyTorch says of other shapes or dtypes
            fn, value = node["fn"], node["value"]
            raise ValueError(
                f"site '{node['name']}': {type(unwrapped(fn)).__name__} of shape {tuple(fn.shape())} has no "
                f"log density of data of shape {tuple(value.shape)} and {value.dtype} (or give y.float())"
            ) from error
        if has_data(node):
            _check_shape(node)


def _check_plates(node: Any) -> None:
    """Rejects a log density whose dimensions are not those of the plates, like Pyro's ``Trace_ELBO``."""
    site, no_limit = node.copy(), sys.maxsize  # dimensions left of the plates count, too
    try:
        log_prob = node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])
        site["log_prob"] = scale_and_mask(log_prob, node["scale"], node["mask"])
    except (torch.linalg.LinAlgError, ValueError):  # fails at these values of latents
        return
    check_site_shape(site, no_limit)


def _check_shape(node: Any) -> None:
    """Rejects data that broadcast with their distribution, and one datum for a whole mini-batch."""
    value, event_dim = node["value"], node["fn"].event_dim
    sizes = dict(zip(range(-1, -value.dim() - 1, -1), reversed(value.shape)))
    for frame in node["cond_indep_stack"]:
        is_part = frame.dim is not None and frame.full_size not in (None, frame.size)
        # a scalar is meant for all elements, a batch of one row is not
        if is_part and frame.size > 1 and sizes.get(frame.dim - event_dim) == 1:
            raise ValueError(
                f"site '{node['name']}': expected data of {frame.size} elements of the subsampled plate "
                f"'{frame.name}', got one: give the plate subsample_size=len(y)"
            )
    shape = torch.Size((*node["fn"].batch_shape, *node["fn"].event_shape))
    both = shape
    with suppress(ValueError):  # shapes that do not broadcast raise elsewhere
        both = torch.Size(broadcast_shape(shape, value.shape))  # PyTorch's version imports SymPy
    if both.numel() > max(shape.numel(), value.numel()):
        raise ValueError(
            f"site '{node['name']}': expected data of the shape of their distribution, got data of shape "
            f"{tuple(value.shape)} and a distribution of shape {tuple(shape)}: {both.numel()} terms"
        )


def _check_support(node: Any) -> None:
    if not isinstance(node["value"], Tensor):
        got = type(node["value"]).__name__
        raise ValueError(
            f"site '{node['name']}': expected data as a tensor, got {got}: use torch.as_tensor"
        )
    fn = unwrapped(node["fn"])
    # a support that is a property depends on parameters, which are rarely latents in discrete distributions
    support = support_of(node["fn"])
    if isinstance(getattr(type(fn), "support", None), property) and not support.is_discrete:
        return
    mask = True if node["mask"] is None else node["mask"]
    inside = support.check(node["value"]) | ~torch.as_tensor(mask)
    if not bool(inside.all()):
        raise ValueError(
            f"site '{node['name']}': expected data within the support of {type(fn).__name__} ({fn.support}), "
            f"got {int((~inside).sum())} of {inside.numel()} outside it: NaN, labels that begin at 1 instead "
            "of 0, or counts that are not integers or do not add up to total_count"
        )
