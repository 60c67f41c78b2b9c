# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a posterior with symmetries, mapped to one of their images.

**References**

1. Dealing with Label Switching in Mixture Models (Stephens, 2000), https://doi.org/10.1111/1467-9868.00265
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .sites import Latents
from .symmetries import PERMUTATION, ROTATION, SIGN, Symmetry, Values


class Relabelling(NamedTuple):
    """The images of draws that are nearest to a common centre.

    :param symmetries: of the posterior.
    :param centers: for each of them, the mean values of each component in units of ``scales``, ``(K, F)``.
    :param scales: the sds within components, ``(F,)``; infinite for constants.
    """

    symmetries: tuple[Symmetry, ...]
    centers: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    @classmethod
    def of(cls, symmetries: tuple[Symmetry, ...], values: Values) -> "Relabelling":
        """Finds a centre for values ``(n,) + site shape``, from the last draw on."""
        parts = [symmetry.components(values) for symmetry in symmetries]
        scales = tuple(_sds(part.flatten(0, 1)) for part in parts)
        found = cls(symmetries, tuple(p[-1] / s for p, s in zip(parts, scales)), scales)
        for _ in range(6):
            images = found(values)
            parts = [symmetry.components(images) for symmetry in symmetries]
            scales = tuple(_sds((part - part.mean(0)).flatten(0, 1)) for part in parts)
            found = cls(symmetries, tuple(p.mean(0) / s for p, s in zip(parts, scales)), scales)
        return found

    def __call__(self, values: Values) -> dict[str, Tensor]:
        """The nearest image of each draw, of values ``(n,) + site shape``."""
        found = dict(values)
        for symmetry, center, scale in zip(*self):
            elements = symmetry.nearest(symmetry.components(found) / scale @ center.T)
            found = symmetry.applied(found, elements)
        return found

    def of_latents(self, latents: Latents, u: Tensor) -> Tensor:
        """The nearest images on the unconstrained space, ``(n, D)``; ``u`` where rounding leaves none."""
        return unconstrained_images(latents, self(latents.constrain(u)), u)

    def uncertainties(self, values: Values) -> list[float]:
        """The probability that a label is wrong, for each symmetry, given draws that are relabelled.

        It is that of two normal components with the same sds.
        """
        found = []
        for symmetry, center, scale in zip(*self):
            if symmetry.kind == ROTATION:
                found.append(math.nan)
                continue
            product = symmetry.components(values) / scale @ center.T
            own, margins = product.diagonal(dim1=1, dim2=2), list[Tensor]()
            if symmetry.kind != SIGN:
                exchanged = own[:, :, None] + own[:, None] - product - product.mT
                rows, columns = zip(*itertools.combinations(range(symmetry.size), 2))
                margins.append(exchanged[:, rows, columns])
            if symmetry.kind != PERMUTATION:
                margins.append(2 * own)
            least = torch.cat(margins, 1).amin(1)
            found.append(float(least.neg().sigmoid().mean()))
        return found


def unconstrained_images(latents: Latents, images: Values, u: Tensor) -> Tensor:
    """Images of draws ``u`` on the unconstrained space, ``(n, D)``; ``u`` where rounding leaves none."""
    found = latents.unconstrain(images)
    return torch.where(found.isfinite().all(-1, keepdim=True), found, u)


def _sds(draws: Tensor) -> Tensor:
    scale, size = draws.std(0), draws.abs().amax(0)
    return torch.where(scale > torch.finfo(draws.dtype).eps ** 0.5 * size, scale, torch.inf)
