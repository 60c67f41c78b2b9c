# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Masked latents: which of them keep their prior density."""

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .run_once import aside, run_once
from .traces import is_enumerated, latent_nodes, moved_latent

# shifts of latents on the unconstrained space that reveal what depends on them
_DISTANCES = (-1.0, 5.0)
# errors of a model at values that it was not written for
_FAILURES = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


class UnmaskedLatents(Messenger):
    """Restores the prior density of masked continuous latents, so that guides do not widen there.

    Keeps the masks of ``improper`` sites and ``mask=False``, the idiom for an improper prior.
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
    """The latents that keep their masks, so that masked elements have no prior, as in Pyro.

    This holds for masks that depend on latents, and for masked elements that affect the rest of the density,
    or may do so: replacing them by NaN or other numbers changes it.
    """
    nodes, state = {n["name"]: n for n in latent_nodes(trace)}, torch.get_rng_state()
    masked = [n for n in nodes.values() if isinstance(n["mask"], Tensor) and not is_enumerated(n)]
    if not masked:
        return set()

    def traced(given: Mapping[str, Any]) -> Any:
        torch.set_rng_state(state)  # the model draws the same random numbers in each run
        return run_once(run, at=given)

    def is_improper(node: Any, moved: Sequence[Any]) -> bool:
        name, mask, value = node["name"], node["mask"], node["value"]
        if not all(torch.equal(each.nodes[name]["mask"], mask) for each in moved):
            return True
        is_counted = mask[(..., *(None,) * node["fn"].event_dim)]
        others = [torch.full_like(value, torch.nan)]
        others += [_moved({name: node}, distance)[name] for distance in _DISTANCES]
        values = {name: each["value"] for name, each in nodes.items()}
        given = [torch.where(is_counted, value, other) for other in (value, *others)]
        first, *totals = (float(traced({**values, name: g}).log_prob_sum()) for g in given)
        return any(total != first for total in totals)

    found = {node["name"] for node in masked}
    with aside():
        moved = list[Any]()
        for distance in _DISTANCES:
            with suppress(*_FAILURES):  # no density at these values
                moved.append(traced(_moved(nodes, distance)))
        for node in masked:
            with suppress(*_FAILURES):
                if moved and not is_improper(node, moved):
                    found.discard(node["name"])
    return found


def _moved(nodes: Mapping[str, Any], distance: float) -> dict[str, Tensor]:
    """The values of all latents that are not summed out, shifted on the unconstrained space."""
    move = partial(torch.add, other=distance)
    return {k: moved_latent(node, move) for k, node in nodes.items() if not is_enumerated(node)}
