# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Elements of plates given all other latents, by the gradients of all data at a guide's draws.

The density of a guide given all latents but one element is rarely known, but that of the posterior is, up to
a constant. At draws of the posterior an element's score :math:`s = \partial_z \log p(z, y)` has the mean 0,
and its covariance is the mean of :math:`H = -\partial_z^2 \log p(z, y)` (Fisher's identity). With
:math:`\bar H = L L^T`, draws of the guide give the mean m and the covariance C of :math:`L^{-1} s`, and

.. math:: \tfrac12 (\mathrm{tr}\, C + m^T m - d - \log \det C)

is the divergence, if all is Gaussian, of the element's conditional posterior from the guide. It is 0 if the
guide is the posterior. Elements that are independent given all other latents move at once, so that all of
their second derivatives take one more gradient for each coordinate of an element.

**References**

1. Measuring Sample Quality with Stein's Method (Gorham, Mackey, 2015), https://arxiv.org/abs/1506.03039
"""

from typing import cast

import torch
from torch import Tensor

from ...diagnostics.plates import ConditionalDiagnostics
from ...model import FullDataDensity
from ...model.elements import ElementGroups, ElementTerms
from ...model.graphs.dependencies import value_and_gradient
from ...model.sites import Latents

_STEP = 0.25  # of differences of gradients, in sds of the guide's draws


@torch.no_grad()
def conditional_diagnostics(
    density: FullDataDensity, draws: Tensor, terms: ElementTerms | None = None
) -> dict[str, ConditionalDiagnostics]:
    """Compares a guide with the posterior of each element given all other latents, by plate.

    :param draws: unconstrained draws of the guide, shape ``(S, D)``.
    :param terms: the elements that data read, if known.
    :return: empty if there are no latents in plates, or elements of a plate depend on each other.
    """
    density = cast(FullDataDensity, density.with_coordinates(None))
    is_known = not density.is_enumerated and density.strategy != "loop"
    if terms is None and is_known and ElementGroups.of(density.latents).members:
        terms = ElementTerms.of(density, density.parts)
    if terms is None:
        return {}
    # steps to either side in turn, so that third derivatives cancel
    signs = torch.where(torch.arange(len(draws), device=draws.device) % 2 == 0, 1.0, -1.0)
    steps = _STEP * draws.std(0) * signs[:, None].to(draws)
    score, found = value_and_gradient(density, draws)[1], dict[str, ConditionalDiagnostics]()
    for own in terms.groups.members:
        columns = []
        for slot in own.T:
            moved = draws.clone()
            moved[:, slot] += steps[:, slot]
            change = score - value_and_gradient(density, moved)[1]
            columns.append(change[:, own].double() / steps[:, slot, None])
        plate, index = _place(density.latents, own)
        curvature = torch.stack(columns, -1).mean(0)
        gap, gap_se = _divergences(score[:, own].double(), 0.5 * (curvature + curvature.mT))
        found[plate] = ConditionalDiagnostics(plate=plate, gap=gap, gap_se=gap_se, index=index)
    return found


def _divergences(score: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each element and its standard error, by scores ``(S, n, d)`` and curvatures.

    The expected value under the posterior, to first order in 1 / S, is subtracted. Infinite if the curvature
    is not positive definite, as no posterior has it.

    :param curvature: the mean of minus the second derivatives, shape ``(n, d, d)``.
    """
    count, dim = len(score), score.shape[-1]
    lower, info = torch.linalg.cholesky_ex(curvature)
    white = torch.linalg.solve_triangular(lower, score.movedim(0, -1), upper=False).mT  # (n, S, d)
    mean = white.mean(1)
    centered = white - mean[:, None]
    covariance = centered.mT @ centered / (count - 1)
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    gap = 0.5 * (trace + mean.square().sum(-1) - dim - covariance.logdet())
    gap = gap - (dim + dim * (dim + 1) / 2) / (2 * count)
    # the error by the derivative of the gap by the weight of each draw
    inverse = torch.linalg.inv_ex(covariance)[0]
    quadratic = (centered - centered @ inverse) * centered
    influence = (centered * mean[:, None]).sum(-1) + 0.5 * quadratic.sum(-1)
    error = influence.std(1) / count**0.5
    gap = torch.where(info == 0, gap, torch.inf).nan_to_num(torch.inf, torch.inf)
    return gap.clamp_min(0.0).to("cpu"), error.nan_to_num(0.0).to("cpu")


def _place(latents: Latents, own: Tensor) -> tuple[str, Tensor]:
    """The names of the plates around elements with coordinates ``(n, d)``, and their indices in these."""
    frames = {f: None for site in latents.sites.values() for f in site.plates if f.dim is not None}
    by_name = {frame.name: latents.elements_of(frame)[own[:, 0].to("cpu")] for frame in frames}
    inside = {name: index for name, index in by_name.items() if bool((index >= 0).all())}
    return "/".join(inside), torch.stack([*inside.values()], -1).squeeze(-1)
