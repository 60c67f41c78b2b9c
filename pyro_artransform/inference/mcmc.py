# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a posterior by an ensemble of short Hamiltonian chains."""

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

#: the share of the seconds after which chains end, so that the rest judges them
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
    """Draws of a posterior by many short Hamiltonian chains, with nothing to tune.

    Without a guide the chains begin at quantiles of the prior, far apart, in groups that begin at one point,
    the superchains, and in units of the priors, where these have scales that depend on other latents. They
    learn the scale of all directions, their step size and the length of trajectories together, and go on
    until the worst latent has ``num_samples`` effective draws, of its bulk and of its tails, and
    superchains agree on each latent and on its outer quantiles (a nested R-hat of at most 1.02). They end
    earlier in modes that they do not move between, where too many trajectories diverge or far more than 3,000
    would be needed, when the time is over, or by Ctrl-C: the result says which. Where superchains stay in
    several modes, proposals at these let chains jump between them. The first third of the draws is discarded.

    With a guide chains begin at points of its base space, wider than its draws, and move there: in the base
    space of a good guide the posterior is nearly a standard normal, so that chains move far in a few steps,
    whatever k-hat is. Any guide of continuous latents will do: one with a transform, as Pyro's Gaussian
    and flow guides and those of this package have, by its transform, another one by the means and sds of
    its draws, and so a Gaussian one of a hierarchy, in coordinates from the prior. Modes that are far from
    the guide are not found.

    :param model: a Pyro model that sees all its data.
    :param guide: ``None``, or a guide of it; ``args`` and ``kwargs`` are the arguments of both.
    :param num_samples: how many effective draws of each latent.
    :param num_chains: how many chains, 4 at least; by default one for each 12 draws, 16 to 64, fewer where
        many draws at once take long, and 8 where the model runs for one draw after the other. Superchains
        are 8 of them, or 4, if the number can be divided by that, else each chain is one.
    :param seed: makes the draws repeatable, and leaves the generators as they were.
    :param progress: whether to show a progress bar, where ``tqdm`` is installed.
    :param max_seconds: the wall time after which chains end with what there is.
    :raises ValueError: if a number is out of its range, the model sub-samples its data, too few starts have a
        finite density, or the guide lacks a latent, was made for another model, is a point, has discrete
        sites, or has no finite draws.
    :raises RuntimeError: in ``torch.inference_mode``, or inside of one of Pyro's handlers.

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
        raise RuntimeError("mcmc: expected gradients, got torch.inference_mode: leave it")
    check_integer("num_samples", num_samples)
    if guide is not None:
        check_callable("guide", guide, "a guide of the model, or None")
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
        found = chains_of(ensemble, num_samples, limit.seconds, reason, status)
        return found.with_model(model)


def from_nothing(
    log_joint: LogJoint, num_samples: float, num_chains: int | None = None
) -> Ensemble:
    """Chains that begin at quantiles of the prior, in its units."""
    log_joint = non_centered(log_joint.with_coordinates(None), with_shapes=True)
    return Ensemble(log_joint, num_samples, num_chains)
