# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Marginalization of discrete latents, also under ``torch.vmap``, where Pyro's contraction fails."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, reduce
from typing import Any

import torch
from pyro import poutine
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .handlers import hidden_sites
from .traces import is_enumerated

Factors = OrderedDict[frozenset[str], list[Any]]


class ScaleError(ValueError):
    """Raised if the discrete latents of a model cannot be summed out at any draw."""


class _LogSumExp(LogRing):
    """Log-space sum-product by variable elimination, with functions that have vmap rules."""

    def sumproduct(self, terms: list[Any], dims: Iterable[str]) -> Tensor:
        factors: list[Any] = [*terms]
        named = tuple((term._pyro_dims, term.shape) for term in terms)
        for name, members in _elimination(named, frozenset(dims)):
            factors.append(_sum_out([factors[i] for i in members], name))
        return factors[-1]


@lru_cache(maxsize=256)
def _elimination(
    named: tuple[tuple[str, torch.Size], ...], summed: frozenset[str]
) -> list[tuple[str, list[int]]]:
    """Elimination steps: the dimension that each sums out and the factors it multiplies; none at last.

    The next dimension is the one whose product has the fewest entries, so that the cost of a chain is linear
    in its length. The result of a step takes the next factor number.
    """
    sizes = {name: size for dims, shape in named for name, size in zip(dims, shape)}
    factors = {i: set(dims) for i, (dims, _) in enumerate(named)}
    joint = {
        name: set[str]().union(*(dims for dims, _ in named if name in dims))
        for name in sorted(summed)
    }
    steps = []
    while joint:
        name = min(joint, key=lambda name: math.prod(map(sizes.__getitem__, joint[name])))
        dims = joint.pop(name)
        for other in dims & joint.keys():
            joint[other] = (joint[other] | dims) - {name}
        members = [i for i, found in factors.items() if name in found]
        steps.append((name, members))
        for i in members:
            del factors[i]
        factors[len(named) + len(steps) - 1] = dims - {name}
    return [*steps, ("", [*factors])]


def _sum_out(factors: list[Any], name: str) -> Any:
    """The product of factors, summed over dimension ``name`` unless that is empty."""
    dims = name + "".join(sorted({*"".join(term._pyro_dims for term in factors)} - {name}))
    total: Any = reduce(torch.add, (_aligned(term, dims) for term in factors))
    if name:
        lowest = torch.finfo(total.dtype).min  # logsumexp of -inf alone has no gradient
        total = total.clamp(min=lowest).logsumexp(0)
        total = total.masked_fill(total == lowest, -torch.inf)
    total._pyro_dims = dims.removeprefix(name)
    return total


def _aligned(term: Any, dims: str) -> Tensor:
    """A factor permuted and padded, with size one, to the dimensions ``dims``."""
    sizes = dict(zip(term._pyro_dims, term.shape))
    present = "".join(name for name in dims if name in sizes)
    permuted = term.permute(*map(term._pyro_dims.index, present)) if present else term
    return permuted.reshape([sizes.get(name, 1) for name in dims])


def marginal_log_prob(
    run: Callable[[], object], first_dim: int, kept_plates: Sequence[str] = ()
) -> Tensor:
    """The log density of a model with its discrete latents summed out by Pyro's variable elimination.

    As in Pyro's ``TraceEnum_ELBO``, masks apply inside of the sums and the scale outside: the scale of a
    mini-batch multiplies the log of the sum over the states of an element, not the terms of that sum.

    :param first_dim: the first dimension left of all plates, a negative number.
    :param kept_plates: the plates whose dimensions the result keeps.
    """
    with hidden_sites(), EnumMessenger(first_dim):
        trace = poutine.trace(run).get_trace()
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = trace.plate_to_symbol
    summed = set(trace.symbol_to_dim) - set(symbols.values())
    # log densities by their plates: inside of the sums, without scale, and outside of them
    inside, outside = Factors(), Factors()
    scales: dict[float, float | Tensor] = {}
    site: Any
    for site in trace.nodes.values():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        plates = frozenset(symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        terms = site["packed"]
        if summed.isdisjoint(terms["log_prob"]._pyro_dims):
            outside.setdefault(plates, []).append(terms["log_prob"])
            continue
        # a masked discrete latent still sums over its values
        mask = None if is_enumerated(site) else terms["mask"]
        log_prob = packed.scale_and_mask(terms["unscaled_log_prob"], mask=mask)
        inside.setdefault(plates, []).append(log_prob)
        scale = site["scale"]
        is_number = torch.as_tensor(scale).dim() == 0
        scales.setdefault(float(scale) if is_number else math.nan, scale)
    if len(scales) > 1 or math.nan in scales:
        raise ScaleError(
            f"expected the same scale for all sites that depend on discrete latents, got {sorted(scales)}: "
            "sites with different scales, such as a discrete latent outside a subsampled plate, cannot be "
            "summed out"
        )
    total: Any = 0.0
    kept = "".join(symbols[name] for name in kept_plates)
    for factors, scale in ((inside, next(iter(scales.values()), 1.0)), (outside, 1.0)):
        if factors:
            part = contract_to_tensor(factors, summed, frozenset(kept), ring=_LogSumExp())
            total = total + scale * _aligned(part, kept)
    return total
