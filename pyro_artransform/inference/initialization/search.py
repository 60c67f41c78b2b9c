# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Where a fit starts: the best of many candidates, by their ELBO on common noise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...joint import LogDensity
from .gaussians import Gaussians, elbos, evaluated, noise
from .mean_field import mean_field
from .newton import HESSIAN_LIMIT, Modes, climb
from .points import starting_points

_NUM_POINTS = 12
_NUM_POINTS_BY_LOOP = 4
_NUM_MEAN_FIELDS = 4
_ROUGH, _FINE = 64, 1024
_NUM_FINALISTS = 6
# a scale that stays within what a model can take, if its edge is near
_NARROW = 0.1
# a start has to be better than the guide by so many standard errors and nats to take its place
_CLEARLY = 2.0
_WORTHWHILE = 0.01


#: the name of a start that leaves the guide alone
AS_IT_STOOD = "the guide as it stood"


class Start(NamedTuple):
    """What the search for a start found.

    :param name: the candidate that won.
    :param elbo: its ELBO.
    :param modes: the modes that were found on the way, as far as second derivatives were affordable.
    """

    name: str
    elbo: float
    modes: Modes | None


class _Candidates(NamedTuple):
    names: list[str]
    gaussians: Gaussians

    def __add__(self, other: "_Candidates") -> "_Candidates":  # type: ignore[override]
        both = (torch.cat(pair) for pair in zip(self.gaussians, other.gaussians))
        return _Candidates(self.names + other.names, Gaussians(*both))

    def take(self, index: Tensor) -> "_Candidates":
        return _Candidates([self.names[i] for i in index.tolist()], self.gaussians.take(index))


def find_start(log_joint: LogDensity, model: Callable[[], Any], guide: Any) -> Start:
    """Puts a guide at the best of: itself, Gaussians on the way to modes, mean-field fits.

    :param log_joint: the log joint density of the model.
    :param model: the model, with its arguments.
    :param guide: a guide with ``start_at`` and ``rsample_and_log_prob``.
    :raises ValueError: if neither the guide nor any candidate has a finite ELBO.
    """
    home, own_elbo, own_se = _as_it_stands(log_joint, guide)
    points = starting_points(log_joint, model, home, _num_points(log_joint))
    if not len(points):
        raise ValueError(_no_start(log_joint, home))
    candidates, modes = _gather(log_joint, points)
    best, elbo = _best(log_joint, candidates)
    needed = own_elbo + _CLEARLY * own_se + _WORTHWHILE
    if elbo > needed and _place(guide, log_joint, best, own_elbo):
        return Start(best.names[0], elbo, modes)
    if own_elbo == -torch.inf:
        raise ValueError(_no_start(log_joint, home))
    return Start(AS_IT_STOOD, own_elbo, modes)


def best_gaussian(
    log_joint: LogDensity, model: Callable[[], Any], home: Tensor, count: int
) -> tuple[str, Gaussians, Modes | None] | None:
    """The best of the Gaussians, by its ELBO.

    :param log_joint: the log joint density of the model.
    :param model: the model, with its arguments.
    :param home: a point to look around, shape ``(latent_dim,)``.
    :param count: from how many points to look.
    :return: its name, itself as the only one of its kind, and the modes that were found on the way;
        nothing if the density is not finite anywhere, or no ELBO is.
    """
    points = starting_points(log_joint, model, home, count)
    if not len(points):
        return None
    candidates, modes = _gather(log_joint, points)
    best, elbo = _best(log_joint, candidates)
    return (best.names[0], best.gaussians, modes) if elbo > -torch.inf else None


def _num_points(log_joint: LogDensity) -> int:
    return _NUM_POINTS_BY_LOOP if log_joint.strategy == "loop" else _NUM_POINTS


def _no_start(log_joint: LogDensity, home: Tensor) -> str:
    return (
        "expected a model with a finite log density somewhere near its starting values, found none: "
        f"{', '.join(log_joint.nonfinite_sites(home[None])) or 'the sum of its sites'} is not finite there. "
        "Give the guide an init_loc_fn with values that the data allow"
    )


@torch.no_grad()
def _as_it_stands(log_joint: LogDensity, guide: Any) -> tuple[Tensor, float, float]:
    """The centre of a guide, its ELBO, and the standard error of it."""
    z, log_q = guide.rsample_and_log_prob(_FINE if log_joint.strategy != "loop" else _ROUGH)
    ratios = evaluated(log_joint, z) - log_q
    error = ratios.std() / len(ratios) ** 0.5
    elbo = ratios.mean().nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    return z.median(0).values, elbo.item(), error.nan_to_num(0.0, 0.0, 0.0).item()


def _gather(log_joint: LogDensity, points: Tensor) -> tuple[_Candidates, Modes | None]:
    candidates = _from_mean_fields(log_joint, points)
    if log_joint.latents.latent_dim > HESSIAN_LIMIT:
        return candidates, None
    try:
        modes, best, _ = climb(log_joint, points, noise(points, _ROUGH))
    except RuntimeError:  # a model whose gradient cannot be differentiated has no Hessian
        return candidates, None
    unit = Gaussians(modes.gaussians.loc, torch.diag_embed(torch.ones_like(points)))
    narrow = Gaussians(modes.gaussians.loc, _NARROW * unit.scale_tril)
    count = len(points)
    candidates += _Candidates(["a Gaussian on the way to a mode"] * count, best)
    candidates += _Candidates(["the curvature at a mode"] * count, modes.gaussians)
    candidates += _Candidates(["a mode, with unit scale"] * count, unit)
    candidates += _Candidates(["a mode, with a small scale"] * count, narrow)
    return candidates, modes


def _from_mean_fields(log_joint: LogDensity, points: Tensor) -> _Candidates:
    scales = torch.diag_embed(torch.full_like(points, _NARROW))
    rough = elbos(log_joint, Gaussians(points, scales), noise(points, _ROUGH))
    promising = points[rough.argsort(descending=True)[:_NUM_MEAN_FIELDS]]
    fitted = mean_field(log_joint, promising)
    return _Candidates(["a mean-field fit"] * len(promising), fitted)


def _best(log_joint: LogDensity, candidates: _Candidates) -> tuple[_Candidates, float]:
    like = candidates.gaussians.loc
    rough = elbos(log_joint, candidates.gaussians, noise(like, _ROUGH))
    finalists = candidates.take(rough.argsort(descending=True)[:_NUM_FINALISTS])
    fine = _FINE if log_joint.strategy != "loop" else _ROUGH
    scores = elbos(log_joint, finalists.gaussians, noise(like, fine))
    k = scores.argmax(keepdim=True)
    return finalists.take(k), scores[k].item()


def _place(guide: Any, log_joint: LogDensity, best: _Candidates, own_elbo: float) -> bool:
    """Starts the guide at a candidate, without its correlations if it cannot have any."""
    try:
        guide.start_at(best.gaussians.loc[0], best.gaussians.scale_tril[0])
    except ValueError:
        independent = best.gaussians.diagonal()
        if elbos(log_joint, independent, noise(independent.loc, _FINE)).item() <= own_elbo:
            return False
        guide.start_at(independent.loc[0], independent.scale_tril[0])
    return True
