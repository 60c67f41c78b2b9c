# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a posterior with symmetries, in one image or in all, and their convergence."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from ..diagnostics.convergence import (
    MODES_RHAT,
    Convergence,
    effective_draws,
    nested_rhat,
    nested_rhat_of_values,
)
from ..model.relabelling import Relabelling, unconstrained_images
from ..model.sites import Latents
from ..model.symmetries import ROTATION, Symmetry


def images(
    draws: Tensor, symmetries: tuple[Symmetry, ...], latents: Latents, num_superchains: int
) -> tuple[Tensor, Relabelling | None]:
    """Images of unconstrained draws ``(C, n, D)``, and the map if they are in one image.

    If superchains still agree when each is in another image, chains mix over all images, and these draws are
    returned. Otherwise each draw is mapped to its image nearest to a common centre.
    """
    flat = draws.flatten(0, 1)
    values = latents.constrain(flat)
    spread, repeats = dict(values), len(flat) // num_superchains
    for symmetry in symmetries:
        elements = symmetry.spread(num_superchains, flat)
        spread = symmetry.applied(spread, elements.repeat_interleave(repeats, 0))
    found = unconstrained_images(latents, spread, flat).view_as(draws)
    if float(nested_rhat_of_values(found, num_superchains).max()) <= MODES_RHAT:
        return found, None
    some = {name: v[:: max(len(flat) // 2000, 1)] for name, v in values.items()}
    to_image = Relabelling.of(symmetries, some)
    return unconstrained_images(latents, to_image(values), flat).view_as(draws), to_image


def random_images(
    symmetries: Sequence[Symmetry], latents: Latents, draws: Tensor
) -> list[Callable[[Tensor], Tensor]]:
    """Maps as many unconstrained points as ``draws`` ``(C, D)`` to random images, and back.

    There are none without symmetries.
    """
    pairs = [(s, s.random(len(draws), draws)) for s in symmetries]
    inverse = [(symmetry, elements.mT) for symmetry, elements in reversed(pairs)]
    return [partial(_image, latents, each) for each in (pairs, inverse) if each]


def _image(latents: Latents, pairs: Sequence[tuple[Symmetry, Tensor]], u: Tensor) -> Tensor:
    values = latents.constrain(u)
    for symmetry, elements in pairs:
        values = symmetry.applied(values, elements)
    return unconstrained_images(latents, values, u)


def with_functionals(
    found: Convergence,
    draws: Tensor,
    energies: Tensor,
    symmetries: Sequence[Symmetry],
    latents: Latents,
    num_superchains: int,
) -> Convergence:
    """The worse convergence of each latent with symmetries and of what all images share.

    A wrong image then cannot hide that chains have not mixed. Entries that may be rotated are judged by what
    images share alone.

    :param draws: in any images, shape ``(C, n, D)``; ``energies`` have the shape ``(C, n)``.
    """
    values = latents.constrain(draws.flatten(0, 1))
    of_energy = nested_rhat(energies[..., None].to(draws), num_superchains).max()
    rhat, bulk, tail = (part.clone() for part in found)
    for symmetry in symmetries:
        shared = symmetry.invariants(values).unflatten(0, draws.shape[:2])
        worst = nested_rhat(shared, num_superchains).max().maximum(of_energy)
        least = [part.min() for part in effective_draws(shared)]
        views = [latents.views(part) for part in (rhat, bulk, tail)]
        for name, _ in symmetry.slots:
            parts = [view[name] for view in views]
            if symmetry.kind == ROTATION:
                for part, value in zip(parts, (worst, *least)):
                    part.fill_(value)
            else:
                parts[0].clamp_(min=worst)
                parts[1].clamp_(max=least[0])
                parts[2].clamp_(max=least[1])
    return Convergence(rhat, bulk, tail)
