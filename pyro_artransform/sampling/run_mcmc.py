# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Posterior draws from an ensemble of short Hamiltonian chains."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_median
from pyro.util import get_rng_state
from torch import Tensor

from .._base.arguments import check_call, check_callable, check_flag, check_integer
from .._base.progress import alone, generators_at, progress_bar, seeded
from .._base.time_limit import TimeLimit
from ..diagnostics.checks import warn_of_prior
from ..model import LogJoint
from ..model.coordinates.centering import non_centered
from .chains import Chains, chains_of
from .ensemble import Ensemble

#: the share of the time limit at which chains end; the rest is for diagnostics
CHAINS_UNTIL = 0.85


def mcmc(
    model: Callable[..., Any],
    *args: Any,
    draws: int = 400,
    init_loc_fn: Callable[[Any], Tensor] = init_to_median,
    num_chains: int | None = None,
    relabel: bool = True,
    seed: int | None = None,
    progress: bool = True,
    max_seconds: float | None = None,
    **kwargs: Any,
) -> Chains:
    """Samples a posterior with many short Hamiltonian chains, with nothing to tune.

    The chains start in groups with a common starting point, the superchains. Half of the starting points are
    quantiles of the prior; the others are uniform in (-2, 2) on the unconstrained space, as in Stan, and one
    is given by ``init_loc_fn``. Points without a finite density are replaced. Priors whose scales depend on
    other latents are non-centered, unless the draws are clearly nearer to a Gaussian as the model is written.
    The chains jointly adapt a preconditioner, the step size and the trajectory length. They run until the
    worst latent has the requested number of effective draws, in its bulk and in its tails, and superchains
    agree on each latent and on its outer quantiles (a nested R-hat of at most 1.02). They end earlier if they
    do not move between modes, if too many trajectories diverge, if far more than 3,000 trajectories or
    40,000 gradients per chain would be needed, at the time limit, or with Ctrl-C; the result says which, and
    why, where that can be seen. If superchains stay in several modes, proposals
    located there let chains jump between them. The first third of the draws is discarded.

    :param model: a Pyro model that sees all its data; ``args`` and ``kwargs`` are its arguments.
    :param draws: the number of effective draws of the worst latent, at which chains end. Unlike the number
        of samples of NUTS, it is not that of draws: ``chains.draws`` has all that were kept, usually more.
    :param init_loc_fn: a function of Pyro's ``pyro.infer.autoguide.initialization``, such as
        ``init_to_value(values=...)``, for a starting point.
    :param num_chains: the number of chains, at least 4. By default one per 12 draws, between 16 and 64, fewer
        if evaluating many draws at once is slow, and 8 if the model runs for one draw at a time. Superchains
        have 8 chains, or 4, if that divides the number; otherwise each chain is its own superchain.
    :param relabel: whether draws of a posterior with symmetries, such as exchangeable components, are in one
        of its images (``docs/chains.md``). Otherwise each draw is in a random one, so that draws are of the
        whole posterior; R-hat and effective sample sizes are the same.
    :param seed: makes the draws reproducible and restores the generators afterwards.
    :param progress: whether to show a progress bar.
    :param max_seconds: the wall time after which chains end with the draws so far.
    :raises TypeError: if the arguments do not fit the model.
    :raises ValueError: if a number is out of range, the model has a parameter named like an option or
        subsamples its data, or no starting point has a finite density and gradient.
    :raises RuntimeError: in ``torch.inference_mode``, or inside one of Pyro's handlers.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform.sampling import mcmc
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)
        >>> chains = mcmc(model, torch.ones(3), draws=100, seed=0, progress=False)
        >>> chains.min_ess >= 100, chains.draws["z"].shape[1:], chains.trusted
        (True, torch.Size([3]), True)

    **References**

    1. Nested R-hat: Assessing the Convergence of Markov Chain Monte Carlo When Running Many Short Chains
       (Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman, 2024), https://arxiv.org/abs/2110.13017
    2. An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo (Hoffman, Radul,
       Sountsov, 2021), https://proceedings.mlr.press/v130/hoffman21a.html
    3. Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of
       MCMC (Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021), https://arxiv.org/abs/1903.08008
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("mcmc: expected to be called outside torch.inference_mode")
    check_integer("draws", draws)
    if seed is not None:
        check_integer("seed", seed, 0)
    check_callable("init_loc_fn", init_loc_fn, "a function of Pyro's autoguide initialization")
    check_flag("relabel", relabel)
    check_flag("progress", progress)
    check_call(mcmc, model, args, kwargs)
    with (
        alone("mcmc"),
        seeded(seed),
        progress_bar(progress) as bar,
        TimeLimit(max_seconds, bar.tick, bar.say) as limit,
    ):
        limit.enter_phase(CHAINS_UNTIL)
        bar.say("chains")
        generators = get_rng_state()
        log_joint = LogJoint(model, args, kwargs, init_loc_fn=init_loc_fn)
        ensemble = from_nothing(log_joint, draws, num_chains)
        prior_only = warn_of_prior(log_joint.has_data)
        with generators_at(generators):  # as in a fit, whose guide takes other random numbers
            ensemble.run(draws)
        reason = limit.reason
        limit.enter_phase(1.0, has_grace=True)
        chains = chains_of(ensemble, draws, limit.seconds, reason, prior_only, relabel=relabel)
        return chains.with_model(model)


def from_nothing(
    log_joint: LogJoint, num_samples: float, num_chains: int | None = None
) -> Ensemble:
    """Chains with dispersed starts, in non-centered coordinates."""
    log_joint = non_centered(log_joint.with_coordinates(None), with_shapes=True)
    return Ensemble(log_joint, num_samples, num_chains)
