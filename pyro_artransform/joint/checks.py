# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What is wrong with the data and the shapes of a run of a model, in words."""

import math
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor

from .handlers import has_data
from .sites import unwrapped


@torch.no_grad()
def check_data(trace: poutine.Trace) -> None:
    """Checks the data of a run and the shapes of its sites, where Pyro's validation is on.

    Supports that depend on latents, as that of ``Uniform(0, z)``, hold for some values of these only,
    and are not checked; nor are masked elements.

    :raises ValueError: if data are no tensor or outside of their support, if they and their distribution
        broadcast against each other, as of shapes ``(n,)`` and ``(n, 1)``, if one datum would count for
        all elements of a sub-sampled plate, or the log-density of a site has other dimensions than
        its plates.
    """
    if not is_validation_enabled():
        return
    node: Any
    for node in trace.nodes.values():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if has_data(node):
            _check_support(node)
        if node["cond_indep_stack"]:  # outside of plates a sum over all dimensions is right
            _check_plates(node)
        if has_data(node):
            _check_shape(node)


def _check_plates(node: Any) -> None:
    """Refuses a log-density with other dimensions than the plates."""
    no_limit: Any = math.inf  # dimensions to the left of the plates count
    try:
        log_prob = node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])
    except (torch.linalg.LinAlgError, ValueError):  # at these values of latents
        return
    site: Any = {**node, "log_prob": log_prob}
    check_site_shape(site, no_limit)


def _check_shape(node: Any) -> None:
    """Refuses data and a distribution that broadcast against each other, and a datum that a batch repeats."""
    value, event_dim = node["value"], node["fn"].event_dim
    sizes = dict(zip(range(-1, -value.dim() - 1, -1), reversed(value.shape)))
    for frame in node["cond_indep_stack"]:
        is_part = frame.dim is not None and frame.full_size not in (None, frame.size)
        # a scalar is meant for all elements, a row of a batch is not
        if is_part and frame.size > 1 and sizes.get(frame.dim - event_dim) == 1:
            raise ValueError(
                f"site '{node['name']}': expected data of {frame.size} elements of the sub-sampled plate "
                f"'{frame.name}', got one, which would count {frame.size} times. Make the subsample_size "
                "the length of the data, as in subsample_size=len(y)"
            )
    shape = torch.Size((*node["fn"].batch_shape, *node["fn"].event_shape))
    with suppress(RuntimeError):  # shapes that do not broadcast have an error of their own
        both = torch.broadcast_shapes(shape, value.shape)
        if both.numel() > max(shape.numel(), value.numel()):
            raise ValueError(
                f"site '{node['name']}': expected data of the shape of their distribution, got data of shape "
                f"{tuple(value.shape)} and a distribution of shape {tuple(shape)}, which broadcast to "
                f"{both.numel()} terms. Give both the same shape, as with x.squeeze(-1)"
            )


def _check_support(node: Any) -> None:
    if not isinstance(node["value"], Tensor):
        raise ValueError(
            f"site '{node['name']}': expected data as a tensor, got {type(node['value']).__name__}: "
            "torch.as_tensor makes one"
        )
    fn = unwrapped(node["fn"])
    # a property depends on parameters: those of discrete distributions are rarely latents
    if isinstance(getattr(type(fn), "support", None), property) and not fn.support.is_discrete:
        return
    mask = True if node["mask"] is None else node["mask"]
    inside = node["fn"].support.check(node["value"]) | ~torch.as_tensor(mask)
    if not bool(inside.all()):
        raise ValueError(
            f"site '{node['name']}': expected data within the support of {type(fn).__name__} "
            f"({fn.support}), got {int((~inside).sum())} of {inside.numel()} outside of it, at which the "
            "density means nothing. Check the data: NaN, labels that begin at 1 in place of 0, or counts "
            "that are no whole numbers"
        )
