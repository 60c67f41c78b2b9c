# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Discrete latents that are summed out of a log-density, by Pyro's variable elimination."""

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.ops.contract import contract_to_tensor
from pyro.ops.packed import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .sites import is_enumerated

Factors = OrderedDict[frozenset[str], list[Tensor]]  #: log-densities by the plates that they are in


class ScaleError(ValueError):
    """A model whose discrete latents cannot be summed out, whatever the draw."""


def sum_out_discrete(trace: poutine.Trace, kept_plates: Collection[str] = ()) -> Tensor:
    """The log-density of a trace with its discrete latents summed out.

    As in Pyro's ``TraceEnum_ELBO``, masks are inside of the sums and the scale is outside: that of a
    mini-batch multiplies the log of the sum over the states of an element, not the terms of that sum.

    :param trace: of a model, under ``poutine.enum``.
    :param kept_plates: the plates whose dimensions the result has.
    :raises ScaleError: if sites that share a sum have different scales.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = trace.plate_to_symbol
    kept = frozenset(symbols[name] for name in kept_plates)
    summed = set(trace.symbol_to_dim) - set(symbols.values())
    inside: Factors = OrderedDict()
    outside: Factors = OrderedDict()
    scales = []
    for site, plates in _sample_sites(trace):
        if summed.isdisjoint(site["packed"]["log_prob"]._pyro_dims):
            outside.setdefault(plates, []).append(site["packed"]["log_prob"])
        else:
            inside.setdefault(plates, []).append(_without_scale(site))
            scales.append(site["scale"])
    total: Tensor = contract_to_tensor(inside, summed, target_ordinal=kept)
    total = _common(scales) * total
    if outside:
        total = total + contract_to_tensor(outside, set(), target_ordinal=kept)
    return total


def _sample_sites(trace: poutine.Trace) -> Iterator[tuple[Any, frozenset[str]]]:
    """The sample sites of a trace, each with the symbols of its plates."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            frames = (frame for frame in site["cond_indep_stack"] if frame.vectorized)
            yield site, frozenset(trace.plate_to_symbol[frame.name] for frame in frames)


def _without_scale(site: Any) -> Tensor:
    packed = site["packed"]
    # a masked discrete latent is still one of its values
    mask = None if is_enumerated(site) else packed["mask"]
    log_prob: Tensor = scale_and_mask(packed["unscaled_log_prob"], mask=mask)
    return log_prob


def _common(scales: Sequence[float | Tensor]) -> float | Tensor:
    """The scale of all sites that share a sum, which is the scale of its logarithm."""
    different = set()
    for scale in scales:
        different.add(float(scale) if torch.as_tensor(scale).dim() == 0 else math.nan)
    if len(different) > 1 or math.nan in different:
        raise ScaleError(
            "expected one scale of all sites that depend on discrete latents, as of those in one plate, "
            f"got {sorted(different)}: sites of different scales, such as a discrete latent outside of a "
            "sub-sampled plate, cannot be summed out"
        )
    return scales[0] if scales else 1.0
