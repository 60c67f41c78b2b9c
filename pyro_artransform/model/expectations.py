# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Expectations of a log density of all data, of its gradient and of its second derivatives, in one pass.

Second derivatives are differences of gradients where all elements of a group of plates move at once, which
separates them, and differences of the terms that two elements share.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .._base.time_limit import check_time
from .elements import ElementTerms, Links, term_log_probs
from .full_data_density import FullDataDensity
from .graphs.dependencies import value_and_gradient
from .graphs.element_precision import ElementPrecision


class Expectation(NamedTuple):
    """The mean of a log density, its gradient ``(D,)``, and its precision, over draws."""

    value: float
    gradient: Tensor
    precision: ElementPrecision


@torch.no_grad()
def expectation(
    density: FullDataDensity, terms: ElementTerms, draws: Tensor, steps: Tensor
) -> Expectation:
    """The expectation over draws ``(M, D)`` in one pass, by differences with steps ``(D,)``."""
    groups, dtype, count = terms.groups, density.start.dtype, len(draws)
    slots = [(k, s) for k, own in enumerate(groups.members) for s in range(own.shape[1])]
    by_slot = torch.stack([_only(steps, groups.members[k][:, s]) for k, s in slots])
    of_shared = [_only(steps, coordinate) for coordinate in groups.shared]
    moves = torch.stack([torch.zeros_like(steps), *by_slot, *of_shared])
    points = (moves[:, None] + draws).flatten(0, 1).to(dtype)
    pairs = [
        (n, slots.index((link.later, t)), slots.index((link.earlier, s)))
        for n, link in enumerate(terms.links)
        for t, s in product(
            *(range(groups.members[k].shape[1]) for k in (link.later, link.earlier))
        )
    ]
    both = [by_slot[i] + by_slot[j] for _, i, j in pairs]
    for_terms = torch.stack([*moves[: 1 + len(slots)], *both])[:, None] + draws
    linked = [steps.new_zeros(len(link.elements), *_widths(terms, link)) for link in terms.links]
    value, gradient = 0.0, torch.zeros_like(moves)
    for b, (weight, part) in enumerate(density.parts()):
        check_time()
        values, gradients = value_and_gradient(part, points)
        value += weight * float(values[:count].double().mean())
        gradient += weight * gradients.double().unflatten(0, (-1, count)).mean(1)
        if not pairs:
            continue
        of_terms = term_log_probs(part, for_terms.flatten(0, 1).to(dtype)).double()
        of_terms = of_terms.unflatten(0, (-1, count)).mean(1)
        base, one, two = of_terms[0], of_terms[1 : 1 + len(slots)], of_terms[1 + len(slots) :]
        for (n, i, j), moved in zip(pairs, two):
            own, position = terms.places[n][b]
            second = (moved - one[i] - one[j] + base)[own]
            linked[n][:, slots[i][1], slots[j][1]].index_add_(0, position, weight * second)
    for link, total in zip(terms.links, linked):
        late, early = (steps[x] for x in link.coordinates(groups))
        total /= -late * early
    change = gradient[:1] - gradient[1:]
    blocks = []
    for k, own in enumerate(groups.members):
        rows = change[[i for i, slot in enumerate(slots) if slot[0] == k]]
        block = rows[:, own].permute(1, 2, 0) / steps[own][:, None]
        blocks.append(0.5 * (block + block.mT))
    shared = change[len(slots) :] / steps[groups.shared][:, None]
    among = shared[:, groups.shared]
    shared[:, groups.shared] = 0.5 * (among + among.T)
    precision = ElementPrecision(groups, terms.links, shared, blocks, linked)
    return Expectation(value, gradient[0], precision)


def _only(steps: Tensor, coordinates: Tensor) -> Tensor:
    """The steps of some coordinates, else zero."""
    found = torch.zeros_like(steps)
    found[coordinates] = steps[coordinates]
    return found


def _widths(terms: ElementTerms, link: Links) -> tuple[int, int]:
    """The numbers of coordinates of an element of the later and of the earlier group."""
    late, early = terms.groups.members[link.later], terms.groups.members[link.earlier]
    return late.shape[1], early.shape[1]
