# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A second opinion on a posterior, from draws that are not the guide's.

A guide's own draws never come from where it has no mass, so that their weights look good where a
whole mode is missing. Two looks from outside: importance sampling with heavy tails around the
guide and around every mode that is known; and, where there are too many dimensions for that, the
mass of each mode by its curvature beside the share of draws near it. The modes are those that the
search for a start has found, and those that are reached from points far outside of the guide.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics import Importance
from ...diagnostics.importance import GOOD_KHAT
from ...joint import LogJoint
from ..initialization.gaussians import Gaussians, evaluated
from ..initialization.newton import HESSIAN_LIMIT, Modes, climb

_NUM_DRAWS = 4000
_DEGREES = 3.0
_INFLATION = 1.2
_MAX_MODES = 8
_GUIDE_SHARE = 0.5
# a mode with less of the mass than this is no loss
_SMALL_SHARE = 0.05
# how far outside to look for modes, in standard deviations of the guide
_FAR = (3.0, 10.0, 30.0, 100.0)
_NUM_SCREENED = 500
_NUM_CLIMBS = 16
_NUM_CLIMBS_BY_LOOP = 4


class SecondOpinion(NamedTuple):
    """What the outside looks found.

    :param log_evidence: the log evidence from heavy-tailed draws, ``nan`` if it is not reliable.
    :param log_evidence_se: its standard error.
    :param lost_mass: the share of the posterior in modes of which the guide has no draws, from 0 to 1.
    :param num_lost: how many such modes there are.
    """

    log_evidence: float
    log_evidence_se: float
    lost_mass: float
    num_lost: int


def second_opinion(
    log_joint: LogJoint, draws: Tensor, log_evidence: float, modes: Modes | None
) -> SecondOpinion:
    """Looks for mass of the posterior that a guide has missed.

    :param log_joint: the log joint density of the model.
    :param draws: draws of the guide on the unconstrained space, shape ``(n, latent_dim)``.
    :param log_evidence: the log evidence according to them.
    :param modes: the modes that are known.
    """
    draws = draws[draws.isfinite().all(-1)]
    if len(draws) < 2:
        return SecondOpinion(math.nan, math.nan, 0.0, 0)
    around = _around(draws)
    known = _distinct([found for found in (modes, _from_afar(log_joint, around)) if found])
    found = _heavy_tailed(log_joint, around, known)
    reliable = found.khat <= GOOD_KHAT and found.ess > 0.02 * _NUM_DRAWS
    if reliable and found.log_evidence - log_evidence < -math.log1p(-_SMALL_SHARE):
        # mass that a curvature promises and draws do not find is not there
        return SecondOpinion(found.log_evidence, found.log_evidence_se, 0.0, 0)
    share, count = (0.0, 0) if known is None else _lost(draws, known, log_evidence)
    log_z = found.log_evidence if reliable else math.nan
    return SecondOpinion(log_z, found.log_evidence_se, share, count)


def _around(draws: Tensor) -> Gaussians:
    centred = draws - draws.mean(0)
    sd = centred.std(0).clamp_min(torch.finfo(draws.dtype).tiny ** 0.5)
    scaled = centred / sd
    covariance = scaled.T @ scaled / max(len(draws) - 1, 1)
    jitter = 1e-6 * torch.eye(len(sd), dtype=draws.dtype, device=draws.device)
    lower = torch.linalg.cholesky(covariance + jitter)
    return Gaussians(draws.mean(0)[None], (_INFLATION * sd[:, None] * lower)[None])


class Known(NamedTuple):
    """Distinct modes, and the log evidence of each by its curvature."""

    gaussians: Gaussians
    log_masses: Tensor


def _from_afar(log_joint: LogJoint, around: Gaussians) -> Modes | None:
    """The modes above points far outside of a Gaussian, as far as Hessians are affordable."""
    if log_joint.latents.latent_dim > HESSIAN_LIMIT:
        return None
    count = _NUM_CLIMBS_BY_LOOP if log_joint.strategy == "loop" else _NUM_CLIMBS
    points = _surprising(log_joint, around, count)
    if not len(points):
        return None
    try:
        modes, _, _ = climb(log_joint, points, torch.zeros_like(points[:1]))
    except RuntimeError:  # a model whose gradient cannot be differentiated has no Hessian
        return None
    return modes


def _surprising(log_joint: LogJoint, around: Gaussians, count: int) -> Tensor:
    """Far points: half of them any, half those whose density exceeds the Gaussian's tail the most."""
    (loc,), (scale_tril,) = around
    screened = _NUM_SCREENED if log_joint.strategy != "loop" else 10 * count
    noise = torch.randn_like(loc.expand(screened, -1))
    far = loc.new_tensor(_FAR).repeat(math.ceil(screened / len(_FAR)))[:screened, None]
    points = loc + far * noise @ scale_tril.T
    density = evaluated(log_joint, points)
    points, density = points[density.isfinite()], density[density.isfinite()]
    half = count // 2
    surprise = density + 0.5 * points.shape[-1] * _distances(around, points)[0]
    order = surprise[half:].argsort(descending=True)[: count - half]
    return torch.cat([points[:half], points[half:][order]])


def _distinct(found: list[Modes]) -> Known | None:
    """The maxima that are not the same, those with the most mass first."""
    if not found:
        return None
    loc, scale_tril = (torch.cat(part) for part in zip(*(modes.gaussians for modes in found)))
    masses = torch.cat([_log_masses(modes) for modes in found])
    converged = torch.cat([modes.converged for modes in found])
    gaussians, kept = Gaussians(loc, scale_tril), list[int]()
    for i in masses.argsort(descending=True).tolist():
        if not bool(converged[i]) or len(kept) == _MAX_MODES:
            continue
        distances = _distances(gaussians.take(kept), loc[i : i + 1])
        if bool((distances > 1.0).all()):
            kept.append(i)
    return Known(gaussians.take(kept), masses[kept]) if kept else None


def _log_masses(modes: Modes) -> Tensor:
    """The log evidence of each mode by its curvature (Laplace's approximation)."""
    dim = modes.gaussians.loc.shape[-1]
    return modes.value + modes.gaussians.log_volume() + 0.5 * dim * math.log(2 * math.pi)


def _distances(gaussians: Gaussians, points: Tensor) -> Tensor:
    """Squared distances of points from each Gaussian in its own units, by its dimension.

    :param gaussians: S of them.
    :param points: shape ``(n, D)``.
    :return: shape ``(S, n)``.
    """
    away = (points - gaussians.loc[:, None]).mT
    units = torch.linalg.solve_triangular(gaussians.scale_tril, away, upper=False)
    return (units**2).mean(-2)


def _lost(draws: Tensor, known: Known, log_evidence: float) -> tuple[float, int]:
    """The share of the mass in modes with next to no draws, and the number of these modes."""
    dim = draws.shape[-1]
    ball = 1 + 3 * math.sqrt(2 / dim)  # in which a Gaussian has all but its tail
    share_of_draws = (_distances(known.gaussians, draws) < ball).double().mean(-1)
    share = (known.log_masses.double() - log_evidence).exp()
    share = share / (1 + share)
    lost = (share > _SMALL_SHARE) & (share_of_draws < 0.1 * share)
    total = share[lost].sum().clamp(max=1.0)
    return float(total), int(lost.sum())


def _heavy_tailed(log_joint: LogJoint, around: Gaussians, known: Known | None) -> Importance:
    """Importance sampling from a mixture of Student's t around the guide and around each mode."""
    parts = [around] if known is None else [around, known.gaussians]
    mixture = Gaussians(*(torch.cat(part) for part in zip(*parts)))
    count = len(mixture.loc)
    others = (1 - _GUIDE_SHARE) / max(count - 1, 1)
    weights = [_GUIDE_SHARE if count > 1 else 1.0] + [others] * (count - 1)
    shares = mixture.loc.new_tensor(weights)
    which = torch.multinomial(shares, _NUM_DRAWS, replacement=True)
    noise = torch.randn_like(mixture.loc[which])
    gamma = torch.distributions.Chi2(torch.full_like(noise[:, :1], _DEGREES)).sample()
    noise = noise * (_DEGREES / gamma).sqrt()
    draws = mixture.loc[which]
    for k, scale_tril in enumerate(mixture.scale_tril):
        # a scale for each draw would take their number times D^2 of memory
        draws[which == k] += noise[which == k] @ scale_tril.mT
    log_q = (_student_log_probs(mixture, draws) + shares.log()[:, None]).logsumexp(0)
    return Importance.from_log_weights(evaluated(log_joint, draws) - log_q)


def _student_log_probs(gaussians: Gaussians, points: Tensor) -> Tensor:
    """The log-densities of multivariate t distributions at points, shape ``(S, n)``."""
    dim = points.shape[-1]
    half = 0.5 * (_DEGREES + dim)
    constant = math.lgamma(half) - math.lgamma(0.5 * _DEGREES)
    constant -= 0.5 * dim * math.log(_DEGREES * math.pi)
    squared = _distances(gaussians, points) * dim
    return constant - gaussians.log_volume()[:, None] - half * torch.log1p(squared / _DEGREES)
