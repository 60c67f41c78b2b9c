# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Posterior draws from an ensemble of short Hamiltonian chains."""

from collections.abc import Callable

import torch

from ..arguments import check_callable, check_integer, naming_arguments
from ..diagnostics.base_space import ensemble_of
from ..diagnostics.importance_weights import ModelAndGuide
from ..joint import LogJoint
from ..joint.coordinates import non_centered
from ..sampling import Ensemble
from ..time_limit import TimeLimit
from .chains import Chains, chains_of
from .evaluation.verdict import FitStatus
from .prior_only import warn_of_prior
from .progress import alone, progress_bar, seeded

#: the share of the time limit at which chains end; the rest is for diagnostics
CHAINS_UNTIL = 0.85


def mcmc(
    model: Callable[..., object],
    guide: Callable[..., object] | None,
    num_samples: int,
    *args: object,
    num_chains: int | None = None,
    seed: int | None = None,
    progress: bool = True,
    max_seconds: float | None = None,
    **kwargs: object,
) -> Chains:
    """Samples a posterior with many short Hamiltonian chains, with nothing to tune.

    Without a guide the chains start at widely dispersed quantiles of the prior, in groups with a common
    starting point, the superchains. Priors whose scales depend on other latents are non-centered. The chains
    jointly adapt a preconditioner, the step size and the trajectory length. They run until the worst latent
    has ``num_samples`` effective draws, in its bulk and in its tails, and superchains agree on each latent
    and on its outer quantiles (a nested R-hat of at most 1.02). They end earlier if they do not move between
    modes, if too many trajectories diverge or far more than 3,000 would be needed, at the time limit, or
    with Ctrl-C; the result says which. If superchains stay in several modes, proposals located there let
    chains jump between them. The first third of the draws is discarded.

    With a guide the chains move in its base space, from starting points wider than its draws. In the base
    space of a good guide the posterior is nearly a standard normal, so that chains move far in a few steps,
    whatever its k-hat. Any guide of continuous latents will do. If it has a transform, as Pyro's Gaussian and
    flow guides and those of this package do, the chains use the transform. Otherwise they use the means and
    sds of its draws, as they do for a Gaussian guide of a hierarchy, in coordinates from the prior. Modes far
    from the guide are not found.

    :param model: a Pyro model that sees all its data.
    :param guide: a guide for the model, or ``None``; both take ``args`` and ``kwargs``.
    :param num_samples: the number of effective draws of each latent.
    :param num_chains: the number of chains, at least 4. By default one per 12 draws, between 16 and 64, fewer
        if evaluating many draws at once is slow, and 8 if the model runs for one draw at a time. Superchains
        have 8 chains, or 4, if that divides the number; otherwise each chain is its own superchain.
    :param seed: makes the draws reproducible and restores the generators afterwards.
    :param progress: whether to show a progress bar.
    :param max_seconds: the wall time after which chains end with the draws so far.
    :raises ValueError: if a number is out of range, the model subsamples its data, too few starts have a
        finite density, or the guide lacks a latent, was made for another model, is a point, has discrete
        sites, or has no finite draws.
    :raises RuntimeError: in ``torch.inference_mode``, or inside one of Pyro's handlers.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform.inference import mcmc
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(3))
        >>> chains = mcmc(model, None, 100, seed=0, progress=False)
        >>> chains.draws["z"].shape, chains.trusted
        (torch.Size([100, 3]), True)

    **References**

    1. Nested R-hat: Assessing the Convergence of Markov Chain Monte Carlo When Running Many Short Chains
       (Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman, 2024), https://arxiv.org/abs/2110.13017
    2. An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo (Hoffman, Radul,
       Sountsov, 2021), https://proceedings.mlr.press/v130/hoffman21a.html
    3. NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport (Hoffman, Sountsov,
       Dillon, Langmore, Tran, Vasudevan, 2019), https://arxiv.org/abs/1903.03704
    4. Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of
       MCMC (Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021), https://arxiv.org/abs/1903.08008
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("mcmc: expected to be called outside torch.inference_mode")
    check_integer("num_samples", num_samples)
    if guide is not None:
        check_callable("guide", guide, "a guide for the model, or None")
    if seed is not None:
        check_integer("seed", seed, 0)
    with (
        alone("mcmc"),
        seeded(seed),
        progress_bar(progress) as bar,
        TimeLimit(max_seconds, bar.tick, bar.say) as limit,
    ):
        limit.enter_phase(CHAINS_UNTIL)
        bar.say("chains")
        with naming_arguments(model, args, kwargs):
            if guide is None:
                log_joint = LogJoint(model, args, kwargs)
                ensemble = from_nothing(log_joint, num_samples, num_chains)
            else:
                subject = ModelAndGuide.of(model, guide, args, kwargs)
                log_joint = subject.log_joint
                ensemble = ensemble_of(subject, num_samples, num_chains)
        status = FitStatus(prior_only=warn_of_prior(log_joint))
        ensemble.run(num_samples)
        reason = limit.reason
        chains = chains_of(ensemble, num_samples, limit.seconds, reason, status)
        return chains.with_model(model)


def from_nothing(
    log_joint: LogJoint, num_samples: float, num_chains: int | None = None
) -> Ensemble:
    """Chains that start at quantiles of the prior, in non-centered coordinates."""
    log_joint = non_centered(log_joint.with_coordinates(None), with_shapes=True)
    return Ensemble(log_joint, num_samples, num_chains)
