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

from ...model.elements import ElementTerms
from ...model.expectations import expectation
from ...model.full_data_density import FullDataDensity
from ...model.graphs.element_precision import ElementGaussian

_NUM_PAIRS = 4  # of draws on opposite sides of the mean
_MOST_PASSES = 20
_FIRST_SD = 0.1  # the sds of the first draws, in units of the prior at most 1
_STEP = 0.5  # of differences, in conditional sds
_MOST_MOVED = 1.0  # the longest step of a shared latent, in units of its prior
# changes of means in sds: steps end below the first, and elements move alone if theirs is above the second
_SMALL, _FAR = 0.05, 3.0
_MOST_LOST = 1.0  # nats of the ELBO that a step may lose


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
