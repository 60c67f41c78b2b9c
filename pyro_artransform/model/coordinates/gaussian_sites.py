# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Coordinates of latents given their scales and a normal approximation of their likelihood.

A latent u with a prior of location loc and scale s, and the likelihood of a pseudo-datum with precision p
and mean m, is normal given loc and s. With z = (u - loc) / s, its standardized residual is

.. math::

    e = \sqrt{1 + p s^2} \, z - \frac{s p (m - \mathrm{loc})}{\sqrt{1 + p s^2}},

non-centred where s is small, and centred where s is large. In a funnel with weak data, and for each
coefficient of a horseshoe, both happen in one posterior.

**References**

1. Expectation Propagation for Approximate Bayesian Inference (Minka, 2001),
   https://arxiv.org/abs/1301.2294
2. Estimation of Non-Normalized Statistical Models by Score Matching (Hyvärinen, 2005),
   https://www.jmlr.org/papers/v6/hyvarinen05a.html
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LocScale(NamedTuple):
    """Locations and scales of priors, elementwise; zero scales for latents without Gaussian sites."""

    loc: Tensor
    scale: Tensor


class GaussianSites(NamedTuple):
    """Natural parameters of normal likelihoods, elementwise: precisions, and these times means."""

    precision: Tensor
    shift: Tensor

    def residual(self, e: Tensor, prior: LocScale) -> tuple[Tensor, Tensor]:
        """Maps e to z; returns z and the log-determinant, elementwise."""
        root, moved = self._parts(prior)
        return (e + moved) / root, -root.log()

    def inverse(self, z: Tensor, prior: LocScale) -> tuple[Tensor, Tensor]:
        """Maps z to e; returns e and the log-determinant of the map from e, elementwise."""
        root, moved = self._parts(prior)
        return z * root - moved, -root.log()

    def _parts(self, prior: LocScale) -> tuple[Tensor, Tensor]:
        loc, scale = prior
        root = (1 + self.precision * scale.square()).sqrt()
        return root, scale * (self.shift - self.precision * loc) / root

    def refitted(
        self, e: Tensor, gradients: Tensor, prior: LocScale, sizes: Sequence[int]
    ) -> "GaussianSites":
        """Pseudo-data with which the Fisher divergence between e and a standard normal is the least.

        The gradient of a log-likelihood by u is regressed on u. The precisions of a site vary about that
        of all of its elements with an sd of the same size, which matters where draws hardly tell.

        :param e: draws with these Gaussian sites, shape ``(n, D)``.
        :param gradients: of their log density, same shape.
        :param prior: at the draws.
        :param sizes: the numbers of elements of sites.
        """
        loc, scale = prior
        z, _ = self.residual(e, prior)
        # the gradient of the log-likelihood by z
        slope = gradients * (1 + self.precision * scale.square()).sqrt() + z
        u, tiny = loc + scale * z, torch.finfo(e.dtype).tiny
        precision = self.precision
        for _ in range(4):  # the weights of the regression depend on the precision
            weight = 1 / (1 + precision * scale.square())
            total = (weight * scale.square()).sum(0).clamp_min(tiny)
            mean = (weight * scale.square() * u).sum(0) / total
            level = (weight * scale * slope).sum(0) / total
            away = scale * (u - mean)
            spread = (weight * away.square()).sum(0).clamp_min(tiny)
            change = -(weight * slope * away).sum(0)
            parts = zip(change.split(list(sizes)), spread.split(list(sizes)))
            common = torch.cat([(c.sum() / s.sum()).expand_as(c) for c, s in parts])
            error = slope - scale * level + change / spread * away
            ridge = (weight * error.square()).mean(0) / common.clamp_min(tiny).square()
            precision = (change + ridge * common) / (spread + ridge)
            precision = precision.clamp_min(0.0).nan_to_num(0.0, 0.0, 0.0)
        shift = (level + precision * mean).nan_to_num(0.0, 0.0, 0.0)
        return GaussianSites(precision, torch.where(precision > 0, shift, 0.0))
