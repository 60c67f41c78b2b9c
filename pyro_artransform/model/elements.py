# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Which elements of plates the terms of a log density read, such as the user and the item of a rating.

A log density is a sum of terms: the log densities of sites, by element of their plates. If each term reads at
most one element of each group of plates, elements of a group are independent given all other latents, and
second derivatives by elements of two groups are sums over the terms that read both. Which elements a term
reads does not depend on how the model is written: they are found by moving latents.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .._base.processes import Processes
from .._base.time_limit import check_time
from .density import LogJoint
from .draw_plate import DrawPlate
from .handlers import SiteLogProbs, hidden_sites
from .sites import Latents
from .vectorization import Draws, Terms, evaluate_many

# a change of a term counts if it exceeds this multiple of round-off; changes are equal within this share
_ROUND_OFF, _EQUAL = 1e3, 1e-2
_ALONE = Processes()
_SPREAD = 0.1  # of the point at which terms are compared
_MOST_SHARED = 200  # shared latents, each of which takes a gradient per pass


class ElementGroups(NamedTuple):
    """Latents by the plates around them.

    :param shared: the coordinates outside of plates, shape ``(G,)``.
    :param members: for each combination of plates, the coordinates ``(n, m)`` of its n elements, the
        combinations with fewer elements first.
    """

    shared: Tensor
    members: tuple[Tensor, ...]

    @classmethod
    def of(cls, latents: Latents) -> "ElementGroups":
        frames = {
            f: None for site in latents.sites.values() for f in site.plates if f.dim is not None
        }
        index = torch.zeros(latents.latent_dim, dtype=torch.long, device="cpu")
        group, size = index.clone(), 1
        for k, frame in enumerate(frames):
            own = latents.elements_of(frame)
            index = torch.where(own < 0, index, index * frame.size + own)
            group = group + (own >= 0) * (1 << k)
            size *= frame.size
        parts = [(group == k).nonzero()[:, 0] for k in group.unique().tolist() if k]
        members = [own[index[own].argsort(stable=True)] for own in parts]
        counts = [len(index[own].unique()) for own in parts]
        grouped = [own.reshape(count, -1) for own, count in zip(members, counts)]
        return cls((group == 0).nonzero()[:, 0], tuple(sorted(grouped, key=len)))

    def sharing(self, groups: set[int]) -> "ElementGroups":
        """The same with the latents of some groups among the shared ones."""
        parts = [self.members[k].flatten() for k in sorted(groups)]
        kept = tuple(own for k, own in enumerate(self.members) if k not in groups)
        return ElementGroups(torch.cat([self.shared, *parts]).sort().values, kept)

    def to(self, device: torch.device) -> "ElementGroups":
        """The same on another device."""
        return ElementGroups(self.shared.to(device), tuple(own.to(device) for own in self.members))


def term_log_probs(log_joint: LogJoint, z: Tensor) -> Tensor:
    """The terms of a log density at unconstrained points ``(n, D)``, without Jacobians, shape ``(n, T)``."""

    def evaluate(draws: Draws, size: int | None) -> Terms:
        plate = DrawPlate(size, log_joint.num_plates)
        values = log_joint.latents.constrain(draws["z"])
        with (
            hidden_sites(),
            SiteLogProbs(plate.place(values, log_joint.latents.event_dims)) as scored,
        ):
            plate.run(log_joint.run)
        start = () if size is None else (size,)
        found = [value.reshape(*start, -1) for value in scored.log_probs.values()]
        return {"terms": torch.cat(found, -1)}

    strategy = log_joint.strategy if len(z) > 1 else "plate"
    return evaluate_many(evaluate, {"z": z}, strategy)["terms"]


@torch.no_grad()
def elements_read(
    log_joint: LogJoint, groups: ElementGroups, point: Tensor
) -> list[Tensor | None] | None:
    """The element of each group that each term reads at a point ``(D,)``, shape ``(T,)``; -1 for none.

    ``None`` for a group if a term reads several of its elements, and for all if a term is not finite.
    """
    if not groups.members:
        return []
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, len(point), generator=generator, dtype=torch.float64, device="cpu")
    noise = noise.to(point)
    point, step = point + _SPREAD * (noise[0] - 0.5), _SPREAD * (0.5 + noise[1])
    moves, counts = list[Tensor](), list[int]()
    for own in groups.members:
        element = torch.full(point.shape, -1, dtype=torch.long, device=point.device)
        element[own] = torch.arange(len(own), device=point.device)[:, None]
        counts.append(1 + max(len(own) - 1, 1).bit_length())
        moves.append(step * (element >= 0))
        moves += [step * ((element >= 0) & (element >> k & 1 == 1)) for k in range(counts[-1] - 1)]
    # a term may have the same value at the end of one step, but not of two
    every = torch.cat([torch.zeros_like(step)[None], torch.stack(moves), -0.7 * torch.stack(moves)])
    values = term_log_probs(log_joint, point + every).double()
    if not values.isfinite().all():
        return None
    least = _ROUND_OFF * log_joint.latents.eps * values.abs().amax(0)
    both = (values[1:] - values[0]).unflatten(0, (2, -1)).split(counts, 1)
    return [_index(changes, least) for changes in both]


def _index(changes: Tensor, least: Tensor) -> Tensor | None:
    """The elements that terms read, by changes ``(2, 1 + bits, T)``; ``None`` if one reads several.

    The first change is that if all elements move, the others if those move that have a bit in their index.
    """
    larger = changes[:, 0].abs().argmax(0)
    all_moved, *bits = changes.gather(0, larger.expand_as(changes[:1])).squeeze(0)
    is_read = all_moved.abs() > least
    ratios = torch.stack(bits) / torch.where(is_read, all_moved, 1.0)
    is_set = ratios > 0.5
    if ((ratios - is_set.double()).abs() > _EQUAL)[:, is_read].any():
        return None
    places = 2 ** torch.arange(len(bits), device=changes.device)
    return torch.where(is_read, (is_set * places[:, None]).sum(0), -1)


class Links(NamedTuple):
    """The pairs of elements of two groups that some term reads together.

    :param elements: the elements of the earlier and of the later group, sorted, shape ``(E, 2)``.
    """

    earlier: int
    later: int
    elements: Tensor

    def to(self, device: torch.device) -> "Links":
        """The same on another device."""
        return self._replace(elements=self.elements.to(device))

    def coordinates(self, groups: ElementGroups) -> Tensor:
        """The coordinates of the later and of the earlier elements, shape ``(2, E, m_later, m_earlier)``."""
        early, late = self.elements.T
        child = groups.members[self.later][late][:, :, None]
        parent = groups.members[self.earlier][early][:, None]
        return torch.stack(torch.broadcast_tensors(child, parent))


class ElementTerms:
    """The elements that the terms of all mini-batches read, and the pairs that they link.

    :param reads: for each mini-batch of this process, the result of ``elements_read``.
    :param processes: those that have other mini-batches; the links are those of all.
    """

    def __init__(
        self,
        groups: ElementGroups,
        reads: Sequence[Sequence[Tensor]],
        processes: Processes = _ALONE,
    ) -> None:
        self.groups, self.links = groups, list[Links]()
        processes.hold(self)
        #: for each pair of groups and mini-batch of the process, linked terms and positions of their pairs
        self.places: list[list[tuple[Tensor, Tensor]]] = []
        for k, later in combinations(range(len(groups.members)), 2):
            count = len(groups.members[later])
            terms, keys = list[Tensor](), list[Tensor]()
            for batch in reads:
                is_linked = (batch[k] >= 0) & (batch[later] >= 0)
                terms.append(is_linked.nonzero()[:, 0])
                keys.append((batch[k] * count + batch[later])[is_linked])
            own = torch.cat(keys)
            parts = processes.gather("linked elements", own.unique().to("cpu"))
            found = torch.cat(parts).unique().to(own.device)
            position = torch.searchsorted(found, own)
            if len(found):
                pairs = torch.stack([found // count, found % count], -1)
                self.links.append(Links(k, later, pairs))
                sizes = [len(part) for part in terms]
                self.places.append([*zip(terms, position.split(sizes))])

    @classmethod
    def of(
        cls,
        log_joint: LogJoint,
        parts: Callable[[], Iterable[tuple[float, LogJoint]]],
        processes: Processes = _ALONE,
    ) -> "ElementTerms | None":
        """The terms of all parts of a log density.

        If a term reads several elements of a group, such as the two teams of a match, the latents of the
        group count as shared. ``None`` if there are many shared latents, or a term is not finite.

        :param parts: returns the parts and their weights, each time the same.
        """
        groups = ElementGroups.of(log_joint.latents).to(log_joint.start.device)
        while len(groups.shared) <= _MOST_SHARED:
            reads, several, are_finite = list[list[Tensor]](), set[int](), True
            for _, part in parts():
                check_time()
                found = elements_read(part, groups, log_joint.start)
                are_finite = found is not None
                several = {k for k, index in enumerate(found or ()) if index is None}
                if several or not are_finite:
                    break
                reads.append(cast(list[Tensor], found))
            are_known = processes.gather("elements of mini-batches", (several, are_finite))
            several = set().union(*(own for own, _ in are_known))
            if not all(finite for _, finite in are_known):
                return None
            if not several:
                return cls(groups, reads, processes)
            groups = groups.sharing(several)
        return None
