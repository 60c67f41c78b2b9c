# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Many posteriors in one: models of many data sets, densities by element of a plate, and their weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..graphs.markov_graph import MarkovGraph
from .coordinates import PriorMap
from .density import LogJoint
from .enumeration import ScaleError
from .handlers import SiteLogProbs, hidden_sites
from .protocols import StructuredGuide
from .traces import is_deterministic, plate_nesting, subsampling_scale
from .vectorization import DrawPlate, Draws, Terms, describe, evaluate_many

# data sets that are compared with single runs, and the tolerance of a log density, relative and in nats
_NUM_DATA_SETS, _TOLERANCE = 3, 1e-3
_NUM_COMPARED = 4  # draws at which what is outside of a plate is compared

Frames = Mapping[str, tuple[CondIndepStackFrame, ...]]


def over_data_sets(
    model: Callable[..., object], data: Mapping[str, Tensor]
) -> Callable[..., object]:
    """The model of many data sets at once: a plate of them, with latents of its own for each.

    The plate is to the left of the model's own plates, so that the model is run once for all data sets. It
    has to be written for that, as for the draws of many guides: reductions over dimensions counted from the
    right, no branches on values, no index to the left of the last plate (``docs/vectorization.md``). The
    first call compares a few data sets with single runs.

    :param model: a Pyro model of one data set.
    :param data: the data by site, each of shape ``(S,) + site shape``; what the arguments of the model have
        for these sites is replaced.
    :return: a model with the arguments of this one. Its latents have the shape ``(S, ...)``, with
        dimensions of size 1 for plates that they are not in.
    :raises ValueError: if sites have different numbers of data sets or there are none; at a call, if the
        model has no such sites, or gives another density for many data sets than for each alone.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform.inference import over_data_sets
        >>> def model(sigma):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("rows", 4):
        ...         pyro.sample("y", dist.Normal(mu, sigma))
        >>> many = over_data_sets(model, {"y": torch.randn(20, 4)})
        >>> pyro.poutine.trace(many).get_trace(2.0).nodes["mu"]["value"].shape
        torch.Size([20, 1])
    """
    sizes = {name: len(value) for name, value in data.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(
            f"data: expected as many data sets of each site, at least one, got {sizes}"
        )
    return _DataSets(model, dict(data))


class _DataSets:
    """See :func:`over_data_sets`."""

    def __init__(self, model: Callable[..., object], data: dict[str, Tensor]) -> None:
        self._model, self._data = model, data
        self._size = len(next(iter(data.values())))
        self._num_plates: int | None = None
        self._placed: Terms = {}

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        run = partial(self._model, *args, **kwargs)
        if self._num_plates is None:
            self._set_up(run)
        return self._run(run)

    def _run(self, run: Callable[[], object]) -> object:
        with pyro.plate("data_sets", self._size, dim=-1 - (self._num_plates or 0)):
            return poutine.condition(run, self._placed)()

    @torch.no_grad()
    def _set_up(self, run: Callable[[], object]) -> None:
        """Places the data to the left of the model's plates, and compares densities."""
        with torch.random.fork_rng(devices=[]), poutine.block():
            single: Any = poutine.trace(run).get_trace()
            sites = {name: node for name, node in single.nodes.items() if node["type"] == "sample"}
            if unknown := sorted(self._data.keys() - sites.keys()):
                raise ValueError(f"data: expected sites of {sorted(sites)}, got {unknown}")
            self._num_plates = plate_nesting(single)
            event_dims = {name: sites[name]["fn"].event_dim for name in self._data}
            self._placed = DrawPlate(self._size, self._num_plates).place(self._data, event_dims)
            try:
                fault = self._fault(run, sites)
            except Exception as error:  # any means that the model does not take many data sets
                fault = describe(error)
        if fault:
            self._num_plates = None
            raise ValueError(
                f"model: expected one that takes data sets in a plate to the left of its own, got {fault}. "
                "Write it with dimensions counted from the right, or with the plate of data sets in it"
            )

    def _fault(self, run: Callable[[], object], sites: Mapping[str, Any]) -> str:
        """The sites of a few data sets whose densities are others than alone, in words."""
        with SiteLogProbs({}) as together:
            self._run(run)
        dim, fault = -1 - (self._num_plates or 0), ""
        for k in range(0, self._size, max(self._size // _NUM_DATA_SETS, 1)):
            given = {}
            for name, site in sites.items():
                if is_deterministic(site) or site_is_subsample(site):
                    continue
                value = together.values[name].select(dim - site["fn"].event_dim, k)
                given[name] = value.reshape(site["value"].shape)
            with SiteLogProbs({}) as alone:
                poutine.condition(run, given)()
            for name in given:
                log_prob = together.log_probs[name].select(dim, k).sum()
                expected = alone.log_probs[name].sum()
                if not torch.allclose(log_prob, expected, _TOLERANCE, _TOLERANCE, equal_nan=True):
                    fault = f"other densities of site '{name}' than for each data set alone"
        return fault


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


@torch.no_grad()
def log_density_by_element(log_joint: LogJoint, z: Tensor, plate: str) -> tuple[Tensor, Tensor]:
    """The log joint density of draws by element of a plate, and that of all sites outside of it.

    That of an element is the sum over the sites in the plate, their Jacobians included, without the factor
    of a sub-sampled plate: where it is not sub-sampled, both add up to the log joint density.

    :param z: draws, shape ``(n, latent_dim)``, in the coordinates of the log joint density.
    :param plate: its name.
    :return: shapes ``(n, elements)`` and ``(n,)``, NaN where the model fails.
    :raises ValueError: if the model has no such plate, it is a loop, or the model has discrete latents
        that are summed out.
    """
    known = {name: frame for name, frame in log_joint.plates.items() if frame.dim is not None}
    if (frame := known.get(plate)) is None:
        raise ValueError(f"plate: expected one of {list(known)}, got '{plate}', a loop or unknown")
    evaluate, size = partial(_evaluate, log_joint, frame), log_joint.chunk_size
    failed = partial(unknown_terms, frame, z)
    with validation_enabled(False):
        found = evaluate_many(evaluate, {"z": z}, log_joint.strategy, failed, size)
    return found["elements"], found["rest"]


def _evaluate(
    log_joint: LogJoint, frame: CondIndepStackFrame, draws: Draws, size: int | None
) -> Terms:
    """One run of the model for many draws "z", or a single one, as ``evaluate_many`` takes it."""
    z, latents = draws["z"], log_joint.latents
    plate, prior = DrawPlate(size, log_joint.num_plates), PriorMap(log_joint.mapped_coordinates)
    values, ladjs = latents.split(z), dict[str, Tensor]()
    for name, site in latents.sites.items():
        if not (name in prior.sites or site.is_unconstrained):
            batch = z.shape[:-1] + site.batch_shape
            values[name], ladjs[name] = site.constrain_with_ladj(values[name], batch)
    placed = prior.take(plate.place(values, latents.event_dims))
    run = prior(log_joint.run) if prior.sites else log_joint.run
    found = [score_by_element(run, plate, placed, frame, z, log_joint.is_enumerated)]
    frames = {name: site.plates for name, site in latents.sites.items()}
    for terms in (plate.place(ladjs, dict.fromkeys(ladjs, 0)), prior.ladjs, prior.bijection_ladjs):
        found.append(sum_by_element(plate, frame, terms, frames, z))
    return {name: sum((t[name] for t in found[1:]), found[0][name]) for name in found[0]}


@dataclass(frozen=True, eq=False)
class Posteriors:
    """A guide of latents all of which are in a plate, and independent of those of its other elements.

    :param plate: its name.
    :param elements: the element of each coordinate, shape ``(latent_dim,)``.
    """

    log_joint: LogJoint
    guide: StructuredGuide
    plate: str
    elements: Tensor

    @classmethod
    def of(cls, log_joint: LogJoint, guide: object) -> "Posteriors | None":
        """Those of the plate with the most elements; None where no graph says that there are some."""
        found = None
        is_known = not (log_joint.is_random or log_joint.is_enumerated)
        if not (isinstance(guide, StructuredGuide) and is_known):
            return None
        for name, frame in log_joint.plates.items():
            elements = log_joint.latents.elements_of(frame).to(log_joint.start.device)
            is_more = found is None or frame.size > found.size
            if frame.size > 1 and is_more and _are_apart(guide.markov_graph(), elements.tolist()):
                candidate = cls(log_joint, guide, name, elements)
                rest = candidate.log_weights(_NUM_COMPARED)[2]
                found = candidate if bool((rest == rest[0]).all()) else found
        return found

    @property
    def size(self) -> int:
        """How many there are."""
        return self.log_joint.plates[self.plate].size

    @torch.no_grad()
    def log_weights(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws ``(n, latent_dim)``, log weights of each posterior ``(n, size)``, and of the rest ``(n,)``.

        A log weight is of the density of an element's latents and data over the guide's density of these
        latents. With what is outside of the plate, a constant, they add up to the log weights of the draws.
        """
        z, log_q = self.guide.sample_and_log_prob_by_coordinate(n)
        log_p, rest = log_density_by_element(self.log_joint, z, self.plate)
        return z, log_p - torch.zeros_like(log_p).index_add_(1, self.elements, log_q), rest


def _are_apart(graph: MarkovGraph, elements: list[int]) -> bool:
    """Whether all coordinates are in elements, and none depends on one of another element."""
    root = graph.elimination.root
    pairs = [*graph.edges, *((root[0], j) for j in root[1:])]
    return min(elements) >= 0 and all(elements[i] == elements[j] for i, j in pairs)
