# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Expectations of a log density of all data, of its gradient and of its second derivatives, in one pass.

Second derivatives are differences of gradients where all elements of a group of plates move at once, which
separates them, and differences of the terms that two elements share.
"""

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .density import LogJoint
from .elements import ElementTerms, Links, term_log_probs
from .full_data_density import FullDataDensity
from .graphs.dependencies import value_and_gradient
from .graphs.element_precision import ElementPrecision


class Expectation(NamedTuple):
    """The mean of a log density, its gradient ``(D,)``, and its precision, over draws."""

    value: float
    gradient: Tensor
    precision: ElementPrecision


class _Moves(NamedTuple):
    """The steps of a pass, each of all elements of a group, or of a shared latent.

    :param slots: the groups and the coordinates of their elements.
    :param single: no step, those of slots and those of shared latents, shape ``(1 + S + G, D)``.
    :param pairs: for each pair of slots, the index of its links and of both slots.
    :param for_terms: no step, those of slots and those of pairs, ``(1 + S + P, D)``.
    """

    slots: list[tuple[int, int]]
    single: Tensor
    pairs: list[tuple[int, int, int]]
    for_terms: Tensor

    @classmethod
    def of(cls, terms: ElementTerms, steps: Tensor) -> "_Moves":
        members = terms.groups.members
        slots = [(k, s) for k, own in enumerate(members) for s in range(own.shape[1])]
        by_slot = [_only(steps, members[k][:, s]) for k, s in slots]
        none = torch.zeros_like(steps)
        single = torch.stack([none, *by_slot, *(_only(steps, k) for k in terms.groups.shared)])
        pairs = [
            (n, slots.index((link.later, t)), slots.index((link.earlier, s)))
            for n, link in enumerate(terms.links)
            for t, s in product(*map(range, _widths(terms, link)))
        ]
        both = [by_slot[i] + by_slot[j] for _, i, j in pairs]
        return cls(slots, single, pairs, torch.stack([none, *by_slot, *both]))


@torch.no_grad()
def expectation(
    density: FullDataDensity, terms: ElementTerms, draws: Tensor, steps: Tensor
) -> Expectation | None:
    """The expectation over draws ``(M, D)`` in one pass, by differences with steps ``(D,)``.

    ``None`` if it is not finite.
    """
    groups, moves = terms.groups, _Moves.of(terms, steps)
    total = density.total(_of_batch, terms, draws, steps).to(steps)
    if not bool(total.isfinite().all()):
        return None
    shapes = [(len(link.elements), *_widths(terms, link)) for link in terms.links]
    sizes = [1, moves.single.numel(), *map(math.prod, shapes)]
    value, flat, *parts = total.split(sizes)
    linked = [part.reshape(shape) for part, shape in zip(parts, shapes)]
    for link, part in zip(terms.links, linked):
        late, early = (steps[x] for x in link.coordinates(groups))
        part /= -late * early
    gradient, count = flat.reshape(moves.single.shape), len(moves.slots)
    change = gradient[:1] - gradient[1:]
    blocks = []
    for k, own in enumerate(groups.members):
        rows = change[[i for i, slot in enumerate(moves.slots) if slot[0] == k]]
        block = rows[:, own].permute(1, 2, 0) / steps[own][:, None]
        blocks.append(0.5 * (block + block.mT))
    shared = change[count:] / steps[groups.shared][:, None]
    among = shared[:, groups.shared]
    shared[:, groups.shared] = 0.5 * (among + among.T)
    precision = ElementPrecision(groups, terms.links, shared, blocks, linked)
    return Expectation(float(value), gradient[0], precision)


@torch.no_grad()
def _of_batch(
    part: LogJoint, number: int, terms: ElementTerms, draws: Tensor, steps: Tensor
) -> Tensor:
    """The share of a mini-batch in an :func:`expectation`, flat: value, gradients, and terms by link."""
    draws, steps = draws.to(part.start.device), steps.to(part.start.device)
    moves, count = _Moves.of(terms, steps), len(draws)
    points = (moves.single[:, None] + draws).flatten(0, 1).to(part.start)
    values, gradients = value_and_gradient(part, points)
    gradient = gradients.double().unflatten(0, (-1, count)).mean(1)
    linked = [steps.new_zeros(len(link.elements), *_widths(terms, link)) for link in terms.links]
    if moves.pairs:
        points = (moves.for_terms[:, None] + draws).flatten(0, 1).to(part.start)
        of_terms = term_log_probs(part, points).double().unflatten(0, (-1, count)).mean(1)
        base, one, two = of_terms[0], of_terms[1:], of_terms[1 + len(moves.slots) :]
        for (n, i, j), moved in zip(moves.pairs, two):
            own, position = terms.places[n][number]
            (_, t), (_, s) = moves.slots[i], moves.slots[j]
            linked[n][:, t, s].index_add_(0, position, (moved - one[i] - one[j] + base)[own])
    value = values[:count].double().mean()[None]
    return torch.cat([value, gradient.flatten(), *map(torch.flatten, linked)])


def _only(steps: Tensor, coordinates: Tensor) -> Tensor:
    """The steps of some coordinates, else zero."""
    found = torch.zeros_like(steps)
    found[coordinates] = steps[coordinates]
    return found


def _widths(terms: ElementTerms, link: Links) -> tuple[int, int]:
    """The numbers of coordinates of an element of the later and of the earlier group."""
    late, early = terms.groups.members[link.later], terms.groups.members[link.earlier]
    return late.shape[1], early.shape[1]
