# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""The Gaussian of a posterior from few passes over mini-batches, by natural-gradient steps.

The best Gaussian of mean m and precision P satisfies

.. math::

    \mathbb{E}_q[\nabla \log p(z)] = 0, \qquad P = -\mathbb{E}_q[\nabla^2 \log p(z)]

so that each pass estimates both at draws of the current Gaussian and takes a step. Unlike at a mode, scales
of latents are right: the variance of a latent counts in the expectation of its square. Draws come in pairs
on opposite sides of the mean, so that a quadratic density is fitted exactly.

**References**

1. The Variational Gaussian Approximation Revisited (Opper, Archambeau, 2009)
2. Conjugate-Computation Variational Inference (Khan, Lin, 2017), https://arxiv.org/abs/1703.04265
"""

import copy
import math
from typing import Any, cast

import torch
from torch import Tensor

from ..._base.time_limit import until_deadline
from ...model.elements import ElementTerms
from ...model.expectations import Expectation, expectation
from ...model.full_data_density import FullDataDensity
from ...model.graphs.element_precision import ElementGaussian

_NUM_PAIRS = 4  # of draws on opposite sides of the mean
_FIRST_SD = 0.1  # the sds of the first draws, in units of the prior at most 1
_MOST_LOST = 1.0  # nats of the ELBO that a step may lose


@torch.no_grad()
def fit_gaussian(density: FullDataDensity, terms: ElementTerms) -> list[ElementGaussian]:
    """The Gaussian of the log joint density of all data, in unconstrained coordinates.

    If steps have not converged, or at the end of a phase, there are two: the last one, whose ELBO is not
    known, and the best of those before; there are none if the density is not finite near its start.
    """
    ascent, num_first = _Ascent(density, terms), 2 * bool(terms.groups.members)
    for index in until_deadline(range(30), at_least=2):
        # draws do not have the sds of elements until the third pass
        if ascent.take_step(are_shared_fixed=index < num_first):
            return [cast(ElementGaussian, ascent.gaussian)]
    return [found for found in (ascent.gaussian, ascent.best) if found is not None]


class _Ascent:
    """Natural-gradient steps, taken back if they lower the ELBO: all passes use the same noise.

    Steps are within a radius, in units of the prior, that grows while steps reach it. From a step that was
    taken back, a shorter one is tried, with a precision that is damped as by Levenberg and Marquardt: far
    from the posterior it may have no finite Gaussian. The first passes, until steps are small, use two draws.
    """

    def __init__(self, density: FullDataDensity, terms: ElementTerms) -> None:
        self._density, self._terms, self._shared = density, terms, terms.groups.shared
        start, self._num_pairs = density.start, 1
        self._unit = unit = density.prior_scales(start).double().clamp_max(1.0)
        options: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
        half = torch.randn(_NUM_PAIRS, len(start), dtype=unit.dtype, **options)
        self._half = half.to(start.device)
        self._sd = _FIRST_SD * unit
        self._draws = start + self._sd * self._noise()
        self._loc, self._step = start.double(), torch.zeros_like(unit)
        self._elbo, self._num_back = -math.inf, 0
        self._radius, self._damping, self._most = 1.0, 0.0, unit
        #: the gradient and the precision at the mean
        self._found: Expectation | None = None
        self.gaussian: ElementGaussian | None = None
        #: the best one of known ELBO
        self.best: ElementGaussian | None = None
        self._best_elbo = -math.inf

    def _noise(self) -> Tensor:
        half = self._half[: self._num_pairs]
        return torch.cat([half, -half])

    def take_step(self, *, are_shared_fixed: bool) -> bool:
        """Takes a step in one pass over all data; returns whether steps have converged."""
        found = expectation(self._density, self._terms, self._draws, 0.5 * self._sd)
        elbo = -math.inf
        if found is not None and self.gaussian is not None:
            elbo = found.value + self.gaussian.entropy
        if self.best is None or elbo > self._best_elbo:
            self.best, self._best_elbo = copy.copy(self.gaussian), elbo
        # if shorter steps do not help, the new precision is what lowers the ELBO
        gained = math.inf
        is_lower = not elbo > self._elbo - _MOST_LOST and self._num_back < 3
        if found is None or (self._found is not None and is_lower):
            self._num_back, self._radius = self._num_back + 1, 0.5 * self._radius
            self._damping = max(10 * self._damping, 0.1)
        else:
            gained, self._elbo = elbo - self._elbo, elbo
            self._loc, self._num_back = self._loc + self._step, 0
            self._found, is_short = found, bool((self._step.abs() < self._most).all())
            self._radius = 2 * self._radius if not is_short or self._radius < 1 else self._radius
            self._damping *= 0.1 * (self._damping > 0.05)
        if self._found is None:
            self._draws = self._loc + _FIRST_SD * (self._draws - self._loc)
            return False
        precision = self._found.precision.damped(self._damping / self._unit**2)
        self.gaussian = gaussian = ElementGaussian(self._loc, precision)
        self._sd, self._most = gaussian.conditional_sd, self._radius * self._unit
        if are_shared_fixed:
            self._most = self._most.index_fill(0, self._shared, 0.0)
        self._step = _limited(gaussian, self._found.gradient, self._most)
        moved = (self._step / self._sd).square()
        largest = float(torch.cat([moved.mean()[None], moved[self._shared]]).max().sqrt())
        gaussian.loc = self._loc + self._step
        if not (are_shared_fixed or self._num_back or self._damping):
            if self._num_pairs == 1 and (largest < 1 or abs(gained) < _MOST_LOST):
                self._num_pairs, self._elbo = _NUM_PAIRS, -math.inf  # other draws have another ELBO
            elif largest < 0.05:
                return True
        most = 3 * self._radius * self._unit
        distance = gaussian.sample(self._noise()) - gaussian.loc
        self._draws = gaussian.loc + distance.clamp(-most, most)
        return False


def _limited(gaussian: ElementGaussian, gradient: Tensor, most: Tensor) -> Tensor:
    """A natural-gradient step, of elements alone if they are far from their best values.

    Shared latents move at most by ``most``, and so do elements to their best values given these; what they
    move along with shared latents is not limited, since that keeps their sum.
    """
    shared, step = gaussian.precision.groups.shared, gaussian.solve(gradient)
    given = gaussian.precision.solve(gradient[:, None])[:, 0]
    excess = float((step[shared].abs() / most[shared]).max()) if len(shared) else 0.0
    alone = given.clamp(-most, most)
    if excess == math.inf or (given / gaussian.conditional_sd).square().mean() > 3**2:
        return alone
    return alone + (step - given) / max(excess, 1.0)
