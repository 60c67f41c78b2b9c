# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a guide of the elements of mini-batches, with their log weights, given what all elements share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from ...joint import LogJoint
from ...joint.handlers import SiteLogProbs, hidden_sites
from ...joint.posteriors import Frames, score_by_element, sum_by_element, unknown_terms
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

# draws that are evaluated at a time
_AT_ONCE = 256
# in which densities of the same draw, by two batches, may differ
_TOLERANCE = 1e-2


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
    if not any(frame.name == names[0] for frames in latents for frame in frames):
        raise UnknownWeightsError(f"there are no latents in plate '{names[0]}'")
    if any(frame.name == names[0] and frame.dim is None for frames in latents for frame in frames):
        raise UnknownWeightsError(f"plate '{names[0]}' is a loop")
    return names[0]


class _Drawn(NamedTuple):
    """Draws of a guide for a batch.

    :param values: of each of its sites, placed in a plate of draws.
    :param indices: of the elements of the batch, by plate.
    :param frames: those of the plates around each site.
    :param frame: that of the plate whose elements the batch has.
    :param log_q: their log densities by element.
    """

    size: int
    values: Mapping[str, Tensor]
    indices: Mapping[str, Tensor]
    frames: Frames
    frame: CondIndepStackFrame
    log_q: Terms


@dataclass
class ElementDraws:
    """Draws of a guide and their weights by element, batch after batch, with the same shared draws.

    :param counts: of shared draws, and of draws of elements given each.
    :param plate: the plate whose elements a batch has.
    :param shared: draws of the guide's sites outside of it, placed in a plate of draws.
    :param log_ratio_of_shared: the log density of the model less that of the guide of these.
    """

    log_joint: LogJoint
    guide: Callable[..., object]
    counts: tuple[int, int]
    plate: str
    num_plates: int
    shared: dict[str, Tensor]
    log_ratio_of_shared: Tensor

    @classmethod
    def of(
        cls, objective: PyroObjective, log_joint: LogJoint, batch: Batch, counts: tuple[int, int]
    ) -> "ElementDraws":
        """With draws of what is shared."""
        args, kwargs = batch
        run = partial(objective.guide, *args, **kwargs)
        with poutine.block():
            traces = (
                poutine.trace(objective.model).get_trace(*args, **kwargs),
                poutine.trace(run).get_trace(),
            )
        plate, num_plates = _plate_of_elements(traces[0]), plate_nesting(*traces)
        if not GuideSampler(run, num_plates).is_vectorized:
            raise UnknownWeightsError("the guide does not draw many elements at once in a plate")
        found = cls(
            log_joint,
            objective.guide,
            counts,
            plate,
            num_plates,
            {},
            log_joint.start.new_tensor(torch.nan),
        )
        values = [found._run_guide(batch, {}, len(rows)).values for rows in found._parts()]
        for node in latent_nodes(traces[1]):
            is_shared = all(frame.name != plate for frame in node["cond_indep_stack"])
            # a Delta follows from the others
            if is_shared and not isinstance(unwrapped(node["fn"]), Delta):
                name = node["name"]
                found.shared[name] = torch.cat([part[name] for part in values])
        found._check_independence(batch)
        return found

    def _parts(self) -> Sequence[Tensor]:
        """The numbers of the shared draws, as many at a time as fit into memory with draws of elements."""
        at_once = min(_AT_ONCE, self.log_joint.chunk_size) // self.counts[1]
        return torch.arange(self.counts[0], device="cpu").split(max(at_once, 1))

    def _given(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: value[rows.to(value.device)] for name, value in self.shared.items()}

    def _check_independence(self, batch: Batch) -> None:
        """Refuses a model in which an element depends on others: it does not go with them to another draw."""
        drawn = self._run_guide(
            batch, self._given(torch.zeros(2, dtype=torch.long, device="cpu")), 2
        )
        values, is_odd = (
            self._values_of(batch, drawn),
            torch.arange(drawn.frame.size, device="cpu") % 2 == 1,
        )
        mixed = dict(values)
        for name, value in values.items():
            dims = {frame.name: frame.dim or -1 for frame in drawn.frames[name]}
            if self.plate in dims:
                inner = -1 - dims[self.plate] + self.log_joint.latents.event_dims[name]
                is_other = is_odd.to(value.device).reshape(-1, *[1] * inner)
                mixed[name] = torch.where(is_other, value.flip(0), value)
        one, other = (
            self._run_model(batch, drawn, each)["elements"].to("cpu") for each in (values, mixed)
        )
        if _differ(other, torch.where(is_odd, one.flip(0), one)):
            raise UnknownWeightsError(f"elements of plate '{self.plate}' depend on each other")

    def log_ratios(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """The log ratios of model and guide, ``(shared draws, draws, elements)``, in float64.

        :return: these; the log densities of the data at as many draws of the elements' prior; and the
            indices of the elements, if the guide has them.
        """
        elements, by_prior, rest, inner = (
            list[Tensor](),
            list[Tensor](),
            list[Tensor](),
            self.counts[1],
        )
        for rows in self._parts():
            repeated = rows.repeat_interleave(inner)
            drawn = self._run_guide(batch, self._given(repeated), len(repeated))
            of_model = self._run_model(batch, drawn, self._values_of(batch, drawn))
            ratios = {k: of_model[k].double() - drawn.log_q[k].double() for k in of_model}
            likelihoods = self._run_prior(batch, drawn).double()
            for found, part in zip(
                (elements, rest, by_prior), (ratios["elements"], ratios["rest"], likelihoods)
            ):
                finite = part.to("cpu").nan_to_num(-torch.inf, torch.inf, -torch.inf)
                found.append(finite.reshape(len(rows), inner, *part.shape[1:]))
        of_shared = torch.cat(rest)
        if self.log_ratio_of_shared.isnan().all():
            self.log_ratio_of_shared = of_shared.amax(1)
        if _differ(of_shared, self.log_ratio_of_shared[:, None]):
            raise UnknownWeightsError(
                f"densities outside of plate '{self.plate}' depend on the mini-batch, or on its elements"
            )
        is_known = isinstance(self.guide, AutoGuide) and self.guide.create_plates is not None
        indices = drawn.values[self.plate].flatten().to("cpu") if is_known else None
        return torch.cat(elements), torch.cat(by_prior), indices

    def _run_guide(self, batch: Batch, given: Draws, n: int) -> "_Drawn":
        draws, scored = DrawPlate(n, self.num_plates), SiteLogProbs(given)
        with poutine.block(), scored:
            draws.run(partial(self.guide, *batch.args, **batch.kwargs))
        stacks = scored.frames.values()
        frame = next((f for frames in stacks for f in frames if f.name == self.plate), None)
        if frame is None:
            raise UnknownWeightsError(f"the guide has no sites in plate '{self.plate}'")
        like = scored.values[next(iter(scored.log_probs))]
        log_q = sum_by_element(draws, frame, scored.log_probs, scored.frames, like)
        log_q["elements"] = log_q["elements"] / subsampling_scale(frame)
        others = scored.values.keys() - {*scored.log_probs, DRAWS}
        indices = {name: scored.values[name] for name in others}
        return _Drawn(n, scored.values, indices, scored.frames, frame, log_q)

    def _values_of(self, batch: Batch, drawn: "_Drawn") -> dict[str, Tensor]:
        """The latents of the model, each ``(n,) + site shape``."""
        shapes = self.log_joint.structure(*batch).shapes
        return {k: drawn.values[k].reshape((drawn.size, *shape)) for k, shape in shapes.items()}

    def _run_model(self, batch: Batch, drawn: "_Drawn", values: Draws) -> Terms:
        """The log densities of the model at values, by element."""
        log_joint, frame = self.log_joint.bound_to(*batch), drawn.frame
        like = next(iter(values.values()))

        def evaluate(draws: Draws, size: int | None) -> Terms:
            plate = DrawPlate(size, self.num_plates)
            placed = {**plate.place(draws, log_joint.latents.event_dims), **drawn.indices}
            is_enumerated = log_joint.is_enumerated
            return score_by_element(log_joint.run, plate, placed, frame, like, is_enumerated)

        failed = partial(unknown_terms, frame, like)
        return evaluate_many(evaluate, values, log_joint.strategy, failed)

    def _run_prior(self, batch: Batch, drawn: "_Drawn") -> Tensor:
        """The log densities of the data by element at draws of its prior, zero where it has no such draws."""
        log_joint, frames = self.log_joint.bound_to(*batch), drawn.frames
        own = {n for n in log_joint.latents.sites if self.plate in (f.name for f in frames[n])}
        shared = {name: drawn.values[name] for name in log_joint.latents.sites.keys() - own}
        draws = DrawPlate(drawn.size, self.num_plates)
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
