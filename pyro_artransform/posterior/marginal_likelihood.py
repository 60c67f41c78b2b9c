# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The pointwise log likelihood with the discrete latents of a model summed out."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger

from ..model.draw_plate import DRAWS, DrawPlate
from ..model.enumeration import marginal_log_prob
from ..model.traces import is_enumerated
from ..model.vectorization import Draws, Terms
from .pointwise import Likelihood


class _Marginal(NamedTuple):
    """An observed site and the discrete latents that its data depend on."""

    sites: frozenset[str]
    plates: list[str]  #: plates of the observed site, from left to right
    scale: float
    shape: torch.Size  #: batch shape of the observed site


class MarginalLikelihood(Likelihood):
    """The pointwise log likelihood of sites whose data do not share discrete latents.

    It is undefined if several data depend on the same discrete latents, as in a hidden Markov model, or if
    continuous latents do, since their draws carry information on these. ``left_out`` names such sites.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        super().__init__(run)
        with poutine.block(), EnumMessenger(-1 - self._num_plates):
            trace = poutine.trace(run).get_trace()
        trace.compute_log_prob()
        trace.pack_tensors()
        plates = set(trace.plate_to_symbol.values())
        terms: dict[str, Any] = {
            name: site["packed"]["log_prob"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and "packed" in site and "log_prob" in site["packed"]
        }
        dims = {name: set(term._pyro_dims) - plates for name, term in terms.items()}
        own = {
            name: {name, *(f for f, site in self._site_of.items() if site == name)}
            for name in self.observed
        }
        marginals = {name: _marginal(trace, name, own[name], dims) for name in own}
        self._marginals = {name: marginal for name, marginal in marginals.items() if marginal}
        self.left_out = sorted(marginals.keys() - self._marginals.keys())
        self._needed -= self.enumerated

    def _evaluate(self, draws: Draws, size: int | None) -> Terms:
        if size == 1:  # Pyro's variable elimination has no dimension for a plate of one
            single = self._evaluate({name: value[0] for name, value in draws.items()}, None)
            return {name: value[None] for name, value in single.items()}
        plate = DrawPlate(size, self._num_plates)
        given: Any = poutine.condition(self.run, plate.place(draws, self._event_dims))
        batch, kept = ((), []) if size is None else ((size,), [DRAWS])
        first_dim, log_probs = -1 - self._num_plates - len(batch), Terms()
        for name, marginal in self._marginals.items():
            run = poutine.block(partial(plate.run, given), expose=[*marginal.sites])
            log_prob = marginal_log_prob(run, first_dim, (*kept, *marginal.plates))
            log_probs[name] = (log_prob / marginal.scale).reshape(batch + marginal.shape)
        return log_probs


def _marginal(trace: Any, name: str, own: set[str], dims: dict[str, set[str]]) -> _Marginal | None:
    """The sites that the data of a site are summed over; ``None`` if that is undefined for each datum.

    :param own: the site and its factors.
    """
    sites, before = own, set[str]()
    while sites != before:
        before, summed = sites, set[str]().union(*(dims[other] for other in sites))
        sites = sites | {other for other, own in dims.items() if own & summed}
    frames = [f for f in trace.nodes[name]["cond_indep_stack"] if f.vectorized]
    plates = {frame.name for frame in frames}
    for other in sites - own:
        node = trace.nodes[other]
        around = {frame.name for frame in node["cond_indep_stack"] if frame.vectorized}
        if not (is_enumerated(node) and plates <= around) or node["is_observed"]:
            return None
    node = trace.nodes[name]
    scales = [torch.as_tensor(trace.nodes[each]["scale"]) for each in own]
    value, event_dim = node["value"], node["fn"].event_dim
    shape = value.shape[: value.dim() - event_dim]
    is_complete = shape.numel() == torch.Size(frame.size for frame in frames).numel()
    if any(s.dim() for s in scales) or len({*map(float, scales)}) > 1 or not is_complete:
        return None
    ordered = [frame.name for frame in sorted(frames, key=lambda frame: frame.dim)]
    return _Marginal(frozenset(sites), ordered, float(scales[0]), shape)
