# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""The Gaussian of a posterior from few passes over mini-batches, by natural-gradient steps.

The best Gaussian of mean m and precision P satisfies

.. math::

    \\mathbb{E}_q[\\nabla \\log p(z)] = 0, \\qquad P = -\\mathbb{E}_q[\\nabla^2 \\log p(z)]

so that each pass estimates both at draws of the current Gaussian and takes a step. Unlike at a mode, scales
of latents are right: the variance of a latent counts in the expectation of its square. Draws come in pairs
on opposite sides of the mean, so that a quadratic density is fitted exactly. Second derivatives are
differences of gradients where all elements of a group move at once, which separates them, and differences of
the terms that two elements share.

**References**

1. The Variational Gaussian Approximation Revisited (Opper, Archambeau, 2009)
2. Conjugate-Computation Variational Inference (Khan, Lin, 2017), https://arxiv.org/abs/1703.04265
"""

import math
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..._base.time_limit import check_time
from ...model.elements import ElementTerms, Links, term_log_probs
from ...model.full_data_density import FullDataDensity
from ...model.graphs.dependencies import value_and_gradient
from ...model.graphs.element_precision import ElementGaussian, ElementPrecision

_NUM_PAIRS = 4  # of draws on opposite sides of the mean
_MOST_PASSES = 20
_FIRST_SD = 0.1  # the sds of the first draws, in units of the prior at most 1
_STEP = 0.5  # of differences, in conditional sds
_MOST_MOVED = 1.0  # the longest step of a shared latent, in units of its prior
# changes of means in sds: steps end below the first, and elements move alone if theirs is above the second
_SMALL, _FAR = 0.05, 3.0
_MOST_LOST = 1.0  # nats of the ELBO that a step may lose


class Expectation(NamedTuple):
    """The mean of a log density, its gradient ``(D,)``, and its precision, over draws."""

    value: float
    gradient: Tensor
    precision: ElementPrecision


@torch.no_grad()
def fit_gaussian(density: FullDataDensity, terms: ElementTerms) -> ElementGaussian:
    """The Gaussian of the log joint density of all data, in unconstrained coordinates.

    A step that lowers the ELBO is halved. All passes use the same noise, so that ELBOs can be compared.
    """
    start = density.start
    unit = density.prior_scales(start).double().clamp_max(1.0)
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(_NUM_PAIRS, len(start), generator=generator, dtype=unit.dtype, device="cpu")
    noise = torch.cat([half, -half]).to(start.device)
    sd, draws = _FIRST_SD * unit, start + _FIRST_SD * unit * noise
    gaussian, loc, step, elbo = None, start.double(), torch.zeros_like(unit), -math.inf
    for _ in range(_MOST_PASSES):
        found = expectation(density, terms, draws, _STEP * sd)
        new_elbo = -math.inf if gaussian is None else found.value + gaussian.entropy
        if gaussian is not None and not new_elbo > elbo - _MOST_LOST:
            step = 0.5 * step
            gaussian.loc = loc + step
        else:
            loc, elbo = loc + step, new_elbo
            gaussian = ElementGaussian(loc, found.precision)
            sd = gaussian.conditional_sd
            step = _limited(gaussian, found.gradient, _MOST_MOVED * unit)
            gaussian.loc = loc + step
            moved = (step / sd).square()
            if moved.mean() < _SMALL**2 and (moved[terms.groups.shared] < _SMALL**2).all():
                break
        draws = gaussian.sample(noise)
    return cast(ElementGaussian, gaussian)


def _limited(gaussian: ElementGaussian, gradient: Tensor, most: Tensor) -> Tensor:
    """A natural-gradient step, of elements alone if they are far from their best values.

    Shared latents move at most by ``most``, and elements to their best values given these.
    """
    shared, step = gaussian.precision.groups.shared, gaussian.solve(gradient)
    given = gaussian.precision.solve(gradient[:, None])[:, 0]
    excess = float((step[shared].abs() / most[shared]).max()) if len(shared) else 0.0
    if (given / gaussian.conditional_sd).square().mean() > _FAR**2:
        return given
    if excess > 1:
        step = given + (step - given) / excess
    return step


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
