# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The log-density of a model with its discrete latents summed out, by Pyro's variable elimination."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from pyro import poutine
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.util import site_is_subsample
from torch import Tensor


def summed_out(run: Callable[[], Any], first_available_dim: int, draws: str | None) -> Tensor:
    """Runs a model with its discrete latents enumerated, and sums over them and over plates.

    :param run: runs the model, its continuous latents in their places.
    :param first_available_dim: a dimension to the left of all plates.
    :param draws: the name of the plate of the draws, which is not summed over; ``None`` if there is
        none.
    :return: shape ``(n,)``, or a scalar without a plate of draws.
    """
    with poutine.enum(first_available_dim=first_available_dim):
        trace = poutine.trace(run).get_trace()
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = trace.plate_to_symbol
    factors: Any = OrderedDict()
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            frames = (frame for frame in site["cond_indep_stack"] if frame.vectorized)
            ordinal = frozenset(symbols[frame.name] for frame in frames)
            factors.setdefault(ordinal, []).append(site["packed"]["log_prob"])
    enumerated = set(trace.symbol_to_dim) - set(symbols.values())
    kept = frozenset() if draws is None else frozenset({symbols[draws]})
    total: Tensor = contract_to_tensor(factors, enumerated, target_ordinal=kept)
    return total
