# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Every number that was tuned for :func:`~pyro_artransform.fit`.

Numbers without a source were found by hand on the posteriors of ``benchmarks/flows.md``. "By loop" is
for models that are run for one draw after the other.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class InitializationConfig:
    """From where the initial Gaussian is fitted, how, and when a guide becomes it."""

    num_points: int = 12  #: points to start from, all side by side
    num_points_by_loop: int = 4  #: the same by loop, or for one mini-batch
    max_dense_dim: int = 200  #: coordinates at most for a full Gaussian
    num_matches: int = 20  #: steps of batch and match
    num_ascents: int = (
        8  #: natural-gradient steps after that, with a graph once the ELBO has settled
    )
    max_sparse_steps: int = 60  #: the most of those with a graph
    num_compared: int = 1024  #: draws that the best Gaussian is compared with the guide on


@dataclass(frozen=True)
class OptimizationConfig:
    """Step sizes, their schedule, the gradient, and the choice among parameters at the end."""

    num_particles: int = 64  #: draws for each step
    many_latents: int = 200  #: the number of latents from which on draws are expensive
    num_particles_of_many: int = 16  #: the same of many, with a graph: half the time, same ELBO
    #: latents to which the nats below apply; with more of them they grow in proportion
    latents_of_gaps: int = 100
    #: of Adam: the search begins with the second one where the model has parameters: with 2e-2 an
    #: autoencoder ended 14 nats an image lower, for one seed of three (tutorials/vae_iaf.ipynb)
    step_sizes: tuple[float, ...] = (2e-2, 5e-3, 2e-3, 5e-4)
    betas: tuple[float, float] = (0.9, 0.99)  #: of Adam; the second is short since steps are few
    search_steps: int = 60  #: steps for each step size in the search
    search_draws: int = 1024  #: draws that it is judged by
    search_min_gain: float = 1.0  #: nats by which a smaller step size has to win
    warm_up: int = 20  #: steps in which the step size rises at first
    constant_share: float = 0.4  #: the constant part of a given number of steps
    window: int = 300  #: steps whose mean ELBO is compared with that of the same number before
    min_improvement: float = 0.004  #: nats between windows below which a fit does not go on
    check_every: int = 50  #: steps between two estimates of the remaining gap
    check_draws: int = 200  #: draws of an estimate; near the posterior it takes selection_draws
    good_gap: float = 0.0005  #: nats at which a fit ends: what one mean that is 0.03 sd off costs
    max_constant_path: int = 2000  #: the longest constant phase, with the path gradient
    max_constant_pyro: int = 4000  #: the same without the path gradient
    max_constant_epochs: int = 20  #: the same in epochs
    decay_share: float = 0.6  #: the decay as a share of the constant phase
    min_decay: int = 400  #: the shortest decay in steps
    min_good_decay: int = 100  #: the shortest decay where the gap is below min_improvement
    max_decay: int = 1500  #: the longest one
    min_noisy_decay: int = 1000  #: the shortest decay where steps are noisy by mini-batches
    long_decay_gap: float = 0.2  #: the gap in nats from which on the decay is the longest one
    min_epochs: int = 3  #: epochs in a window and in a decay
    tail_steps: int = 100  #: steps for the tails at the end (benchmarks/tails.md)
    tail_particles: int = 8  #: their draws, as a multiple
    tail_step_size: float = 0.5  #: their relative step size
    tail_weight: float = 2.0  #: how much more deviating log weights count in them
    tail_max_deviation: float = 50.0  #: the deviation where that ends
    tail_good_khat: float = 0.4  #: below it they are not taken: 0.5, less a standard error of k-hat
    averaged_steps: int = 100  #: steps that the average of parameters reaches back, at least
    averaged_epochs: int = 2  #: the same in epochs
    averaged_share: float = 1 / 3  #: the same as a share of noisy steps (Shamir and Zhang 2013)
    clip_factor: float = 3.0  #: gradients are clipped to this multiple of the median norm
    clip_window: int = 100  #: steps that the median is taken over
    best_block: int = 50  #: steps whose mean loss says which parameters were the best
    #: the factor of the step size where the median loss of the last block exceeds all of the first one's
    #: (a Gaussian autoencoder, tutorials/vae_iaf.ipynb)
    retreat: float = 0.25
    max_skips: int = 100  #: steps in a row that are not finite before a fit gives up
    max_named: int = 20  #: skipped steps whose sites are named
    selection_draws: int = 5000  #: for candidate parameters, and for the gap to the evidence
    selection_draws_of_many: int = 1000  #: the same of many latents, which took a quarter of a fit
    selection_as_good: float = 0.02  #: nats between ELBOs that are as good where k-hat is smaller
    selection_good_khat: float = 0.25  #: below it any k-hat is as good
    selection_bad_khat: float = 0.5  #: above it weights have no variance (Vehtari et al. 2024)
    khat_price: float = 0.04  #: nats that one unit of k-hat costs (its noise is 0.1)
    khat_price_without_variance: float = 0.2  #: the same above the bad one
    num_estimates: int = 32  #: of an ELBO where draws have no log weights, without mini-batches
    checkpoint_every: int = 100  #: steps between two checkpoints

    def for_latents(self, latent_dim: int) -> "OptimizationConfig":
        """The same with the nats that a fit goes on for in proportion to the number of latents."""
        share, draws = max(latent_dim / self.latents_of_gaps, 1.0), self.selection_draws
        if latent_dim >= self.many_latents:
            draws = min(draws, self.selection_draws_of_many)
        return replace(
            self,
            selection_draws=draws,
            min_improvement=share * self.min_improvement,
            good_gap=share * self.good_gap,
            long_decay_gap=share * self.long_decay_gap,
        )


@dataclass(frozen=True)
class MinibatchConfig:
    """How many mini-batches and draws of them stand for all data."""

    num_compared: int = 32  #: batches that candidates are compared on
    num_for_start: int = 8  #: batches whose mean an initial guide is found in
    draws_divisor: int = 4  #: draws of a comparison, as a part of those without mini-batches
    min_draws: int = 8  #: the fewest draws a batch
    max_draws: int = 256  #: the most draws a batch, in the pass at the end
    num_estimates: int = 4  #: independent ones of an ELBO where draws cannot be told apart
    max_batches: int = 500  #: batches of the pass at the end: time
    num_draws: int = 4000  #: its draws
    num_common_draws: int = 1000  #: its draws where all batches have the same


@dataclass(frozen=True)
class EvaluationConfig:
    """The draws behind a verdict, and the search for missed modes.

    The bounds of trust are not settings: ``diagnostics/importance.py`` has them.
    """

    num_samples: int = 10_000  #: draws that the verdict rests on (as in Yao et al. 2018)
    #: more draws, at most as many as gradients of the fit, where k-hat alone decides and is not clearly
    #: below its limit: its standard error goes from 0.09 to 0.05 (benchmarks/khat.md)
    num_more_samples: int = 90_000
    num_noisy_samples: int = 500  #: the same where weights are the noise of mini-batches
    num_around: int = 10_000  #: draws all around the guide
    num_for_mode: int = 512  #: draws around each mode that was proposed
    max_modes: int = 32  #: such modes
    num_screened: int = 500  #: points screened far outside of the guide
    max_climb_steps: int = 60  #: of a climb by gradients
    max_searches: int = 5  #: for modes, while they find too much for none and too little for a loss
    max_dense_dim: int = 200  #: more coordinates are too many for Hessians and covariances
    num_by_chains: int = 400  #: effective draws of chains that check single latents
    max_by_chains: int = 150  #: their trajectories at most: a check, not the posterior's draws


@dataclass(frozen=True)
class FitConfig:
    """The settings of a fit, by the stage that they belong to."""

    initialization: InitializationConfig = field(default_factory=InitializationConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    minibatch: MinibatchConfig = field(default_factory=MinibatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
