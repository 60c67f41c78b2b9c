# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""The Gaussian of a posterior from few passes over mini-batches, by natural-gradient steps.

The best Gaussian of mean m and precision P satisfies

.. math::

    \\mathbb{E}_q[\\nabla \\log p(z)] = 0, \\qquad P = -\\mathbb{E}_q[\\nabla^2 \\log p(z)]

so that each pass estimates both at draws of the current Gaussian and takes a step. Unlike at a mode, scales
of latents are right: the variance of a latent counts in the expectation of its square. Draws come in pairs
on opposite sides of the mean, so that a quadratic density is fitted exactly.

**References**

1. The Variational Gaussian Approximation Revisited (Opper, Archambeau, 2009)
2. Conjugate-Computation Variational Inference (Khan, Lin, 2017), https://arxiv.org/abs/1703.04265
"""

import math
from typing import cast

import torch
from torch import Tensor

from ..._base.time_limit import until_deadline
from ...model.elements import ElementTerms
from ...model.expectations import expectation
from ...model.full_data_density import FullDataDensity
from ...model.graphs.element_precision import ElementGaussian

_NUM_PAIRS = 4  # of draws on opposite sides of the mean
_MOST_PASSES, _NUM_FOR_ELEMENTS = 30, 2  # in all, and those in which elements move alone
_FIRST_SD = 0.1  # the sds of the first draws, in units of the prior at most 1
_STEP = 0.5  # of differences, in conditional sds
_MOST_MOVED = 1.0  # the longest step of a shared latent, in units of its prior
# changes of means in sds: steps end below the first, and elements move alone if theirs is above the second
_SMALL, _FAR = 0.05, 3.0
_MOST_LOST, _MOST_HALVED = 1.0, 2  # nats of the ELBO that a step may lose, and halvings of a step


@torch.no_grad()
def fit_gaussian(density: FullDataDensity, terms: ElementTerms) -> ElementGaussian:
    """The Gaussian of the log joint density of all data, in unconstrained coordinates.

    A step that lowers the ELBO is halved; ELBOs can be compared since passes use the same noise. The first
    ones, until steps are small, use two of the draws. At the end of a phase it is the Gaussian so far.
    """
    start = density.start
    unit = density.prior_scales(start).double().clamp_max(1.0)
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(_NUM_PAIRS, len(start), generator=generator, dtype=unit.dtype, device="cpu")
    half, count = half.to(start.device), 1
    sd, draws = _FIRST_SD * unit, start + _FIRST_SD * unit * torch.cat([half[:1], -half[:1]])
    gaussian, loc, step = None, start.double(), torch.zeros_like(unit)
    elbo, num_halved = -math.inf, 0
    for index in until_deadline(range(_MOST_PASSES), at_least=2):
        found = expectation(density, terms, draws, _STEP * sd)
        new_elbo = -math.inf if gaussian is None else found.value + gaussian.entropy
        if gaussian is not None and num_halved < _MOST_HALVED and not new_elbo > elbo - _MOST_LOST:
            step, num_halved = 0.5 * step, num_halved + 1
            gaussian.loc = loc + step
        else:  # if halving does not help, the new precision is what lowers the ELBO
            loc, elbo, num_halved = loc + step, new_elbo, 0
            gaussian = ElementGaussian(loc, found.precision)
            sd = gaussian.conditional_sd
            # draws do not have the sds of elements until the third pass
            most = _MOST_MOVED * unit * (index >= _NUM_FOR_ELEMENTS)
            step = _limited(gaussian, found.gradient, most)
            gaussian.loc = loc + step
            moved = (step / sd).square()
            largest = torch.cat([moved.mean()[None], moved[terms.groups.shared]]).max().sqrt()
            if count == _NUM_PAIRS and largest < _SMALL:
                break
            if (
                count == 1 and largest < 1 and index > _NUM_FOR_ELEMENTS
            ):  # more draws, with another ELBO
                count, elbo = _NUM_PAIRS, -math.inf
        draws = gaussian.sample(torch.cat([half[:count], -half[:count]]))
    return cast(ElementGaussian, gaussian)


def _limited(gaussian: ElementGaussian, gradient: Tensor, most: Tensor) -> Tensor:
    """A natural-gradient step, of elements alone if they are far from their best values.

    Shared latents move at most by ``most``, and elements to their best values given these.
    """
    shared, step = gaussian.precision.groups.shared, gaussian.solve(gradient)
    given = gaussian.precision.solve(gradient[:, None])[:, 0]
    excess = float((step[shared].abs() / most[shared]).max()) if len(shared) else 0.0
    if excess == math.inf or (given / gaussian.conditional_sd).square().mean() > _FAR**2:
        return given
    if excess > 1:
        step = given + (step - given) / excess
    return step
