# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The plates of a run of a model or a guide: their nesting, sub-sampling and scale."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample

from .sites import is_enumerated

_LONGEST_SEQUENCE = 16


class ModelStructure(NamedTuple):
    """The sites of a run of a model, without their values.

    :param shapes: the shape of each continuous latent.
    :param global_latents: the names of those that are in no plate.
    :param subsampled_latents: the names of those in a plate that holds a part of its elements only.
    :param scale: the largest factor of the log-density of data, relative to that of the global
        latents: in a plate of 100 elements, 20 of them present, it is 5.
    """

    shapes: dict[str, torch.Size]
    global_latents: list[str]
    subsampled_latents: list[str]
    scale: float

    @classmethod
    def from_trace(cls, trace: poutine.Trace) -> "ModelStructure":
        """The structure of a traced run."""
        nodes: list[Any] = [node for node in trace.nodes.values() if node["type"] == "sample"]
        sites = [node for node in nodes if not site_is_subsample(node)]
        latents = [node for node in sites if not node["is_observed"] and not is_enumerated(node)]
        in_no_plate = [node for node in latents if not node["cond_indep_stack"]]
        data = [node for node in sites if node["is_observed"]] or sites
        return cls(
            shapes={node["name"]: node["value"].shape for node in latents},
            global_latents=[node["name"] for node in in_no_plate],
            subsampled_latents=[
                node["name"] for node in latents if any(map(is_part, node["cond_indep_stack"]))
            ],
            scale=_largest_scale(data) / _largest_scale(in_no_plate),
        )

    @property
    def is_scaled(self) -> bool:
        """Whether the data are scaled, up or down."""
        return not math.isclose(self.scale, 1.0, rel_tol=1e-9)


def _largest_scale(nodes: list[Any]) -> float:
    scales = [node["scale"] for node in nodes]
    return max((float(torch.as_tensor(scale).max()) for scale in scales), default=1.0)


def argument_signature(arguments: Any, *, with_floats: bool = False) -> Any:
    """What the sites and shapes of a run may depend on in the arguments, as a key of a dictionary.

    That is shapes, dtypes, integers, strings and types; of a sequence of more than 16 elements the
    length and the first element.

    :param arguments: tensors, arrays and anything else, nested in tuples, lists and mappings.
    :param with_floats: whether floats count too, as for the scale of data.
    """
    if isinstance(arguments, Mapping):
        arguments = tuple((name, arguments[name]) for name in sorted(arguments, key=str))
    if isinstance(arguments, (tuple, list)):
        few = arguments if len(arguments) <= _LONGEST_SEQUENCE else arguments[:1]
        return len(arguments), *(argument_signature(x, with_floats=with_floats) for x in few)
    plain = (int, str, type(None), float) if with_floats else (int, str, type(None))
    if isinstance(arguments, plain):
        return arguments
    # arrays of any library
    shape, dtype = getattr(arguments, "shape", None), getattr(arguments, "dtype", None)
    return (tuple(shape), dtype) if isinstance(shape, tuple) else type(arguments)


def frames(*traces: poutine.Trace) -> Iterator[CondIndepStackFrame]:
    """The frames of the plates around each site of traces, as often as they occur."""
    for trace in traces:
        for node in trace.nodes.values():
            yield from node.get("cond_indep_stack", ())


def plate_nesting(*traces: poutine.Trace) -> int:
    """How many dimensions the plates of traces take, counted from the right."""
    nesting = 0
    for frame in frames(*traces):
        nesting = max(nesting, -(frame.dim or 0))
    return nesting


def is_subsampled(trace: poutine.Trace) -> bool:
    """Whether any plate of a trace holds a part of its elements only."""
    return any(map(is_part, frames(trace)))


def is_part(frame: CondIndepStackFrame) -> bool:
    """Whether a plate holds a part of its elements only."""
    return frame.full_size not in (None, frame.size)
