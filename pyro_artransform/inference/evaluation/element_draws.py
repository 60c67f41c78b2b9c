# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a guide of the elements of mini-batches, with their log weights, given what all elements share."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from ...joint import LogJoint
from ...joint.enumeration import ScaleError
from ...joint.handlers import SiteLogProbs, hidden_sites
from ...joint.traces import (
    latent_nodes,
    plate_nesting,
    subsampled_plates,
    subsampling_scale,
    unwrapped,
)
from ...joint.vectorization import (
    DRAWS,
    DrawPlate,
    Draws,
    GuideSampler,
    ModelFailures,
    Terms,
    evaluate_many,
)
from ..loader import Batch
from ..optimization.objective import PyroObjective

_AT_ONCE = 256  # draws that are evaluated at a time
_TOLERANCE = 1e-2  # in which densities of the same draw, by two batches, may differ


Frames = Mapping[str, tuple[CondIndepStackFrame, ...]]


def sum_by_element(
    draws: DrawPlate, frame: CondIndepStackFrame, terms: Draws, frames: Frames, like: Tensor
) -> Terms:
    """The sums of terms of sites, of their batch shapes, by element of a plate, and of the rest.

    :param frames: those of the plates around each site.
    :param like: of the dtype and the device of the sums.
    :return: "elements", shape ``(n, size)``, and "rest", shape ``(n,)``, without n of a single draw.
    """
    batch = () if draws.size is None else (draws.size,)
    elements, rest = like.new_zeros((*batch, frame.size)), like.new_zeros(batch)
    for name, term in terms.items():
        if frame not in frames[name]:
            rest = draws.total({name: term}, rest)
            continue
        if batch and term.dim() != 1 + draws.num_plates:
            raise ValueError(f"expected {1 + draws.num_plates} batch dimensions, got {term.dim()}")
        rows = term.movedim(frame.dim or -1, len(batch))
        elements = elements + rows.reshape((*batch, frame.size, -1)).sum(-1)
    return {"elements": elements, "rest": rest}


def score_by_element(
    run: Callable[[], object],
    draws: DrawPlate,
    values: Mapping[str, Tensor],
    frame: CondIndepStackFrame,
    like: Tensor,
    is_enumerated: bool = False,
) -> Terms:
    """The log-density of one run of a model by element of a plate, without the factor of its sub-sampling.

    :param values: of latents, placed in the plate of draws.
    :param is_enumerated: whether the model has discrete latents, which are summed out.
    :return: as of :func:`sum_by_element`.
    :raises ValueError: if it has.
    """
    if is_enumerated:
        raise ScaleError(
            "expected a model without discrete latents that are summed out, whose density by element of a "
            "plate is not known"
        )
    with hidden_sites(), SiteLogProbs(values) as scored:
        draws.run(run)
    found = sum_by_element(draws, frame, scored.log_probs, scored.frames, like)
    return {**found, "elements": found["elements"] / subsampling_scale(frame)}


def unknown_terms(frame: CondIndepStackFrame, like: Tensor, draws: Draws) -> Terms:
    """What :func:`score_by_element` returns, NaN for a draw at which the model fails."""
    nan = like.new_full((), torch.nan)
    return {"elements": nan.expand(frame.size), "rest": nan}


class UnknownWeightsError(Exception):
    """Weights of elements are not known, for the reason that it gives."""


def _plate_of_elements(model: poutine.Trace) -> str:
    """The plate whose elements are those of mini-batches."""
    latents = [node["cond_indep_stack"] for node in latent_nodes(model)]
    names = list(dict.fromkeys(frame.name for frame in subsampled_plates(model)))
    if not names:  # as of an autoencoder: each latent is of an element of the batch
        common = set.intersection(*({frame.name for frame in frames} for frames in latents))
        names = [frame.name for frame in latents[0] if frame.name in common][:1]
    if len(names) != 1:
        got = f"those of {names}" if names else "none"
        raise UnknownWeightsError(
            f"mini-batches are not known to be the elements of one plate, but {got}"
        )
    found = [frame for frames in latents for frame in frames if frame.name == names[0]]
    if not found:
        raise UnknownWeightsError(f"there are no latents in plate '{names[0]}'")
    if any(frame.dim is None for frame in found):
        raise UnknownWeightsError(f"plate '{names[0]}' is a loop")
    return names[0]


class _Drawn(NamedTuple):
    """Draws of a guide for a batch."""

    size: int
    values: Mapping[str, Tensor]  #: of each of its sites, placed in a plate of draws
    latents: dict[str, Tensor]  #: of the model, each ``(size,) + site shape``
    indices: Mapping[str, Tensor]  #: of the elements of the batch, by plate
    frames: Frames  #: those of the plates around each site
    frame: CondIndepStackFrame  #: that of the plate whose elements the batch has
    log_q: Terms  #: their log densities by element


class ElementDraws:
    """Draws of a guide and their weights by element, batch after batch, with the same shared draws.

    :param batch: one by which the structure of model and guide is found.
    :param counts: of shared draws, and of draws of elements given each.
    """

    def __init__(
        self, objective: PyroObjective, log_joint: LogJoint, batch: Batch, counts: tuple[int, int]
    ) -> None:
        self._guide, self._log_joint, self._counts = objective.guide, log_joint, counts
        run = partial(objective.guide, *batch.args, **batch.kwargs)
        with poutine.block():
            model = poutine.trace(objective.model).get_trace(*batch.args, **batch.kwargs)
            guide = poutine.trace(run).get_trace()
        #: that whose elements a batch has
        self.plate, self._num_plates = _plate_of_elements(model), plate_nesting(model, guide)
        if not GuideSampler(run, self._num_plates).is_vectorized:
            raise UnknownWeightsError("the guide does not draw many elements at once in a plate")
        values = [self._run_guide(batch, {}, len(rows)).values for rows in self._parts()]
        #: draws of the guide's sites outside of it, placed in a plate of draws
        self.shared = {
            node["name"]: torch.cat([part[node["name"]] for part in values])
            for node in latent_nodes(guide)
            if all(frame.name != self.plate for frame in node["cond_indep_stack"])
            # a Delta follows from the others
            and not isinstance(unwrapped(node["fn"]), Delta)
        }
        #: the log density of the model less that of the guide of these, known after a batch
        self.log_ratio_of_shared: Tensor | None = None
        self._check_independence(batch)

    def _parts(self) -> Sequence[Tensor]:
        """The numbers of the shared draws, as many at a time as fit into memory with draws of elements."""
        at_once = min(_AT_ONCE, self._log_joint.chunk_size) // self._counts[1]
        return torch.arange(self._counts[0], device="cpu").split(max(at_once, 1))

    def _check_independence(self, batch: Batch) -> None:
        """Refuses a model in which an element depends on others: it does not go with them to another draw."""
        drawn = self._run_guide(batch, {k: v[[0, 0]] for k, v in self.shared.items()}, 2)
        is_odd = torch.arange(drawn.frame.size, device="cpu") % 2 == 1
        mixed = dict(drawn.latents)
        for name, value in mixed.items():
            dims = {frame.name: frame.dim or -1 for frame in drawn.frames[name]}
            if self.plate in dims:
                inner = -1 - dims[self.plate] + self._log_joint.latents.event_dims[name]
                is_other = is_odd.to(value.device).reshape(-1, *[1] * inner)
                mixed[name] = torch.where(is_other, value.flip(0), value)
        one, other = (
            self._run_model(batch, drawn, each)["elements"].to("cpu")
            for each in (drawn.latents, mixed)
        )
        if _differ(other, torch.where(is_odd, one.flip(0), one)):
            raise UnknownWeightsError(f"elements of plate '{self.plate}' depend on each other")

    def log_ratios(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """The log ratios of model and guide, ``(shared draws, draws, elements)``, in float64.

        :return: these; the log densities of the data at as many draws of the elements' prior; and the
            indices of the elements, if the guide has them.
        """
        inner, parts = self._counts[1], list[list[Tensor]]()
        for rows in self._parts():
            repeated = rows.repeat_interleave(inner)
            given = {name: value[repeated] for name, value in self.shared.items()}
            drawn = self._run_guide(batch, given, len(repeated))
            of_model, log_q = self._run_model(batch, drawn, drawn.latents), drawn.log_q
            found = [of_model[k].double() - log_q[k].double() for k in ("elements", "rest")]
            found.append(self._run_prior(batch, drawn).double())
            finite = [each.nan_to_num(-torch.inf, torch.inf, -torch.inf) for each in found]
            parts.append([each.to("cpu").unflatten(0, (len(rows), inner)) for each in finite])
        elements, of_shared, by_prior = map(torch.cat, zip(*parts))
        if self.log_ratio_of_shared is None:
            self.log_ratio_of_shared = of_shared.amax(1)
        if _differ(of_shared, self.log_ratio_of_shared[:, None]):
            raise UnknownWeightsError(
                f"densities outside of plate '{self.plate}' depend on the mini-batch, or on its elements"
            )
        is_known = isinstance(self._guide, AutoGuide) and self._guide.create_plates is not None
        indices = drawn.values[self.plate].flatten().to("cpu") if is_known else None
        return elements, by_prior, indices

    def _run_guide(self, batch: Batch, given: Draws, n: int) -> _Drawn:
        draws, scored = DrawPlate(n, self._num_plates), SiteLogProbs(given)
        with poutine.block(), scored:
            draws.run(partial(self._guide, *batch.args, **batch.kwargs))
        values, stacks = scored.values, scored.frames.values()
        frame = next((f for frames in stacks for f in frames if f.name == self.plate), None)
        if frame is None:
            raise UnknownWeightsError(f"the guide has no sites in plate '{self.plate}'")
        like = values[next(iter(scored.log_probs))]
        log_q = sum_by_element(draws, frame, scored.log_probs, scored.frames, like)
        log_q["elements"] = log_q["elements"] / subsampling_scale(frame)
        shapes = self._log_joint.structure(*batch).shapes
        latents = {k: values[k].reshape((n, *shape)) for k, shape in shapes.items()}
        indices = {k: values[k] for k in values.keys() - {*scored.log_probs, DRAWS}}
        return _Drawn(n, values, latents, indices, scored.frames, frame, log_q)

    def _run_model(self, batch: Batch, drawn: _Drawn, values: Draws) -> Terms:
        """The log densities of the model at values, by element."""
        log_joint, frame = self._log_joint.bound_to(*batch), drawn.frame
        like = next(iter(values.values()))

        def evaluate(draws: Draws, size: int | None) -> Terms:
            plate = DrawPlate(size, self._num_plates)
            placed = {**plate.place(draws, log_joint.latents.event_dims), **drawn.indices}
            is_enumerated = log_joint.is_enumerated
            return score_by_element(log_joint.run, plate, placed, frame, like, is_enumerated)

        failed = partial(unknown_terms, frame, like)
        return evaluate_many(evaluate, values, log_joint.strategy, failed)

    def _run_prior(self, batch: Batch, drawn: _Drawn) -> Tensor:
        """The log densities of the data by element at draws of its prior, zero where it has no such draws."""
        log_joint, frames = self._log_joint.bound_to(*batch), drawn.frames
        own = {n for n in log_joint.latents.sites if self.plate in (f.name for f in frames[n])}
        shared = {name: drawn.values[name] for name in log_joint.latents.sites.keys() - own}
        draws = DrawPlate(drawn.size, self._num_plates)
        scored = SiteLogProbs({**shared, **drawn.indices})
        nothing = torch.full_like(drawn.log_q["elements"], -torch.inf)
        if log_joint.strategy != "plate" or log_joint.is_enumerated:
            return nothing
        try:
            with hidden_sites(), scored:
                draws.run(log_joint.run)
        except (NotImplementedError, *ModelFailures):  # an improper prior, or a draw that is none
            return nothing
        of_data = {name: term for name, term in scored.log_probs.items() if name not in own}
        found = sum_by_element(draws, drawn.frame, of_data, scored.frames, nothing)["elements"]
        return found / subsampling_scale(drawn.frame)


def _differ(found: Tensor, expected: Tensor) -> bool:
    """Whether densities are others, but for round-off and where the model fails."""
    slack = _TOLERANCE * (1 + _TOLERANCE * expected.abs())
    return bool(((found - expected).abs() > slack).any())
