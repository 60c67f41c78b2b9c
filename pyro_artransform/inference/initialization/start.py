# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Initializes a guide: at its current parameters or at a Gaussian fitted to an ensemble, chosen by ELBO.

A guide that sees the elements of plates in mini-batches starts near draws of the latents of one mini-batch.
"""

import math
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..._base.time_limit import abandonable, check_time
from ...diagnostics.importance_sampling import CLEAR_IN_SE
from ...model import FullDataDensity, LogJoint
from ...model.coordinates.centering import centered_by_draws
from ...model.elements import ElementTerms
from ...model.graphs.dependencies import MAX_HALVINGS, value_and_gradient
from ...model.graphs.sparse_gaussian import SparseGaussian
from ...model.protocols import FlowGuide, MinibatchGuide, StructuredGuide
from ...sampling import Ensemble
from ..loader import Batch
from ..optimization.training import common_noise, copies, copy_to
from .from_draws import DRAWS_BY_DIM, DenseGaussian, dense_gaussian, sparse_gaussian
from .natural_gradient import fit_gaussian

#: the name of the candidate that leaves the guide unchanged
UNCHANGED = "initial guide"
#: its name if chains found no Gaussian to compare it with
FAILED = "initial guide, since no Gaussian fitted to the chains has a finite ELBO"
BY_STEPS = "a Gaussian fitted by natural-gradient steps"
AT_DRAWS = "a Gaussian fitted to the draws of the ensemble"
AT_BATCHES = "a Gaussian fitted to short chains on mini-batches, which only start the guide"
# draws to find the Gaussian and compare it with the guide, fewer of many latents
_NUM_COMPARED = 1024
_MOST_LATENTS = 1000  # of a mini-batch, limited for memory


class InitialGuide(NamedTuple):
    """The name of the chosen candidate, and its ELBO."""

    name: str
    elbo: float


@torch.no_grad()
def find_start(
    density: LogJoint,
    guide: FlowGuide,
    ensemble: Ensemble | None,
    why_no_chains: str = "",
    *,
    fewer: int = 1,
) -> InitialGuide:
    """Sets a guide to the Gaussian that matches draws and gradients, unless the guide's own ELBO is better.

    Out of time, the guide stays as it is.

    :param density: the log joint density in the coordinates of the guide, which change in place.
    :param ensemble: chains of this density or of a similar one; ``None`` if none could be run.
    :param why_no_chains: the reason for ``None``.
    :param fewer: divides the number of draws that compare candidates.
    :raises ValueError: if neither has a finite ELBO.
    """
    before = copies(_tensors(guide))
    count = min(_NUM_COMPARED // fewer, max(2**18 // density.latents.latent_dim, 128))
    with abandonable():
        elbo, needed = _elbo_and_bound(density, guide, count)
        gaussian_elbo = -math.inf
        if ensemble is not None:
            gaussian_elbo = _start_at_draws(density, guide, ensemble, count)
            # a larger ELBO has round-off of a nat or more
            eps = torch.finfo(ensemble.draws.dtype).eps
            if gaussian_elbo > needed and abs(gaussian_elbo) < max(1 / eps, abs(needed)):
                return InitialGuide(AT_DRAWS, gaussian_elbo)
            copy_to(_tensors(guide), before)
        if elbo > -math.inf:
            return InitialGuide(UNCHANGED if gaussian_elbo > -math.inf else FAILED, elbo)
        if why_no_chains:
            raise ValueError(why_no_chains)
        z, _ = guide.rsample_and_log_prob(count)
        worst = torch.cat([z[~density(z).isfinite()], density.start[None]])[:1]
        sites = ", ".join(density.nonfinite_sites(worst)) or "the sum of its sites"
        raise ValueError(
            f"expected a finite log density near the initial values, got none: {sites} is not finite there. "
            "Give the guide an init_loc_fn with values at which the log density is finite"
        )
    copy_to(_tensors(guide), before)
    return InitialGuide(UNCHANGED, math.nan)


@torch.no_grad()
def find_start_of_elements(
    density: FullDataDensity, guide: StructuredGuide, terms: ElementTerms
) -> InitialGuide:
    """Sets a guide of elements of plates to the best Gaussian, by natural-gradient steps, if there is one."""
    candidates, elbos = fit_gaussian(density, terms), list[float]()
    if not candidates:
        return InitialGuide(UNCHANGED, math.nan)
    for gaussian in candidates:
        guide.start_at_elements(gaussian)
        elbos.append(_elbo_and_bound(density, guide, 64)[0])  # on all rows
    if elbos[-1] < max(elbos):
        guide.start_at_elements(candidates[0])
    return InitialGuide(BY_STEPS, max(elbos))


def _tensors(guide: FlowGuide | MinibatchGuide) -> list[Tensor]:
    """The tensors of a guide that a start sets: its parameters, and lambda of its coordinates."""
    found: list[Tensor] = [*guide.parameters()]
    given = guide.coordinates
    return found if given is None else [*found, *given.buffers()]


def _start_at_draws(
    density: LogJoint, guide: FlowGuide, ensemble: Ensemble, num_draws: int
) -> float:
    """Sets a guide to the best candidate Gaussian; returns its ELBO, or -inf if none has a finite one."""
    u = _thinned(ensemble.draws.flatten(0, 1), num_draws)
    if guide.chooses_coordinates:
        coordinates = guide.coordinates
        unit = density.with_coordinates(coordinates.non_centered())
        coordinates.set_(centered_by_draws(unit, u), coordinates.unit)
    if len(guide.components) == 1:
        return _start_at(density, guide, u, num_draws)
    for component, part in zip(guide.components, ensemble.parts()):
        _start_at(density, component, _thinned(part, num_draws), num_draws)
    guide.weigh(density, num_draws)
    return _elbo_and_bound(density, guide, num_draws)[0]


def _thinned(draws: Tensor, num_draws: int) -> Tensor:
    """As many of the draws ``(n, D)`` as determine a Gaussian."""
    return draws[:: max(len(draws) // max(num_draws, DRAWS_BY_DIM * draws.shape[1]), 1)]


def _start_at(density: LogJoint, guide: FlowGuide, u: Tensor, num_draws: int) -> float:
    """Sets a guide to the best Gaussian of unconstrained draws ``(n, D)``; returns as above."""
    z, _ = density.from_unconstrained(u)
    _, gradients = value_and_gradient(density, z)
    is_finite = (z.isfinite() & gradients.isfinite()).all(-1)
    finite = z[is_finite].double(), gradients[is_finite].double()
    candidates = list[DenseGaussian | SparseGaussian]()
    with suppress(torch.linalg.LinAlgError, ValueError):  # too few draws, or identical ones
        if isinstance(guide, StructuredGuide):
            candidates.append(sparse_gaussian(*finite, guide.markov_graph()))
        # a sparse precision needs fewer draws than a full covariance
        if not candidates or len(z) >= DRAWS_BY_DIM * z.shape[1]:
            candidates.append(dense_gaussian(*finite))
    best, needed, chosen = -math.inf, -math.inf, list[Callable[[], None]]()
    for gaussian in candidates:
        # the mean gradient of a posterior is zero, so that a nonzero one corrects the mean
        loc, before = gaussian.loc + gaussian.solve(finite[1].mean(0)), -math.inf
        for k in range(MAX_HALVINGS):  # a wide scale may reach regions of low or zero density
            put = partial(_put, guide, gaussian, loc, 0.5**k)
            try:
                put()
            except ValueError:  # the Gaussian is not finite
                break
            elbo, bound = _elbo_and_bound(density, guide, num_draws)
            if elbo > needed:
                best, needed, chosen = elbo, bound, [put]
            if -math.inf < before >= elbo:
                break
            before = elbo
    for put_best in chosen:
        put_best()
    return best


def _put(
    guide: FlowGuide, gaussian: DenseGaussian | SparseGaussian, loc: Tensor, factor: float
) -> None:
    """Sets a guide to a Gaussian moved to mean ``loc``, with its scale multiplied by ``factor``."""
    if isinstance(gaussian, SparseGaussian):
        scale, root_tril = factor * gaussian.scale, factor * gaussian.root_tril
        moved = replace(gaussian, loc=loc, scale=scale, root_tril=root_tril)
        cast(StructuredGuide, guide).start_at_gaussian(moved)
        return
    try:
        guide.start_at(loc, factor * gaussian.scale_tril)
    except ValueError:  # the guide has no correlations
        guide.start_at(loc, factor * gaussian.independent_sd().diag())


def _elbo_and_bound(density: LogJoint, guide: FlowGuide, count: int) -> tuple[float, float]:
    """The ELBO of a guide with common random numbers, and the ELBO that another candidate must exceed."""
    check_time()
    with common_noise():
        z, log_q = guide.rsample_and_log_prob(count)
    ratios = density(z) - log_q
    mean, median = ratios.mean(), ratios.median()
    error = (ratios.std() / len(ratios) ** 0.5).nan_to_num(0.0, 0.0, 0.0)
    bound = mean + CLEAR_IN_SE * error
    # tails are one-sided, so the bound is at most the median if that exceeds the mean
    bound = torch.where((mean <= median) & (median < bound), median, bound)
    elbo, bound = torch.stack([mean, bound]).nan_to_num(-torch.inf, -torch.inf, -torch.inf).tolist()
    return elbo, bound + 0.01


def minibatch_density(
    log_joint: LogJoint, share: float = 1.0, shared: Collection[str] = ()
) -> LogJoint:
    """The unscaled log joint density of a mini-batch, as if there were no other data.

    It is the same mini-batch in each run, a ``share`` of all data; ``shared`` names the global latents.
    """
    run = _Unscaled(share, shared)(log_joint.run)
    if not log_joint.is_random:
        return log_joint.view(run=run)
    run = partial(_run_from, torch.get_rng_state(), run)
    return log_joint.evaluated(is_random=False).view(run=run)


class _Unscaled(Messenger):
    """Scales all sites but the global latents, whose priors alone make their posterior proper."""

    def __init__(self, share: float, shared: Collection[str]) -> None:
        super().__init__()
        self._share, self._shared = share, shared

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] not in self._shared:
            message["scale"] = message["scale"] * self._share


def _run_from(state: Tensor, run: Callable[[], object]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        run()


def find_initial_minibatch_guide(
    log_joint: LogJoint,
    guide: MinibatchGuide,
    batch: Batch,
    elbo_draws: Callable[[int], Tensor],
    chains_of: Callable[[LogJoint], Ensemble | None],
    *,
    fewer: int = 1,
) -> InitialGuide:
    """Starts a guide near draws of the latents of one mini-batch, if its ELBO is larger there.

    A guide with too many latents, or without shared ones, stays unchanged.

    :param elbo_draws: returns estimates of the guide's ELBO from a number of draws.
    :param chains_of: returns chains of a density, ``None`` if none can be run.
    """
    structure = log_joint.structure(*batch)
    is_large = log_joint.latents.latent_dim > _MOST_LATENTS
    if not structure.global_latents or is_large or log_joint.strategy == "loop":
        return InitialGuide(UNCHANGED, math.nan)
    share = 1 / structure.scale
    shared = minibatch_density(log_joint, share, structure.global_latents)

    def candidate(name: str) -> InitialGuide:
        with common_noise():
            elbo = elbo_draws(_NUM_COMPARED // fewer).mean()
        return InitialGuide(name, elbo.nan_to_num(-torch.inf, -torch.inf, -torch.inf).item())

    initial, before = candidate(UNCHANGED), copies(_tensors(guide))
    if (ensemble := chains_of(shared)) is not None:
        u = ensemble.draws.flatten(0, 1)
        if guide.chooses_coordinates:
            guide.center_at(u, log_joint, share)
        coordinates = guide.coordinates.for_elements(shared.latents)
        z, _ = shared.with_coordinates(coordinates).from_unconstrained(u)
        with suppress(torch.linalg.LinAlgError):  # the covariance may be singular at a boundary
            guide.start_near(log_joint.latents.constrain(z), share)
        moved = candidate(AT_BATCHES)
        if moved.elbo > initial.elbo:
            return moved
    copy_to(_tensors(guide), before)
    return initial
