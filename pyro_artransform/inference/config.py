# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Every number that was tuned for :func:`~pyro_artransform.inference.fit`, and where it comes from.

The name after each number is its source: a paper, a benchmark of the repository, or "by hand": then it
worked on the posteriors of ``benchmarks/flows.md``, and nobody has measured others.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class InitializationConfig:
    """How many candidates an initial guide is chosen from, and how they are compared."""

    #: points to start from; each takes a climb to a mode (by hand)
    num_points: int = 12
    #: the same where the model is run for one draw after the other, or for one mini-batch (by hand)
    num_points_by_loop: int = 4
    #: the innermost shell of points around the guide, in units of the unconstrained space (by hand)
    shell_radius: float = 1.0
    #: the ratio of the radii of two shells, so that eight of them reach to a hundred (by hand)
    shell_growth: float = 2.2
    #: points tried in each shell, of which the one of the largest density is taken (by hand)
    num_tried: int = 64
    #: the same where the model is run for one draw after the other (by hand)
    num_tried_by_loop: int = 4
    #: the standard deviation of draws of an improper prior around the start (Stan's radius of 2)
    improper_radius: float = 2.0
    #: halvings of the way to a point of finite density (by hand)
    max_halvings: int = 12
    #: points from which mean-field fits are tried (by hand)
    num_mean_fields: int = 4
    #: steps of Adam of such a fit, its draws a step, its step size, decay rates of its moments, and the
    #: decay of the step size (by hand)
    mean_field_steps: int = 150
    mean_field_particles: int = 8
    mean_field_step_size: float = 0.1
    mean_field_betas: tuple[float, float] = (0.9, 0.99)
    mean_field_decay: float = 0.985
    #: Newton steps of a climb (by hand)
    max_newton_steps: int = 40
    #: more coordinates than this are too many for Hessians (by hand: seconds of a fit)
    max_hessian_dim: int = 200
    #: draws that all candidates are compared on, and those that the finalists are (by hand)
    num_rough: int = 64
    num_fine: int = 1024
    num_finalists: int = 6
    #: the scale of a narrow candidate, which stays within what a model can take (by hand)
    narrow_scale: float = 0.1
    #: standard errors and nats by which a candidate has to beat the guide (by hand)
    min_gain_in_se: float = 2.0
    min_gain: float = 0.01
    #: latents of one mini-batch for which a full Gaussian is affordable (by hand: memory)
    max_minibatch_latents: int = 1000
    #: draws of that Gaussian that an amortized guide is started by, and those compared on (by hand)
    num_minibatch_draws: int = 4000
    num_minibatch_compared: int = 512

    def for_loop(self) -> "InitializationConfig":
        """Fewer points and draws, where the model is run for one draw after the other."""
        return replace(
            self,
            num_points=self.num_points_by_loop,
            num_tried=self.num_tried_by_loop,
            num_fine=self.num_rough,
        )


@dataclass(frozen=True)
class OptimizationConfig:
    """Step sizes, their schedule, the gradient, and the choice among parameters at the end."""

    #: step sizes of Adam, the first one unless the search finds a better one (by hand)
    step_sizes: tuple[float, ...] = (5e-3, 2e-3, 5e-4)
    #: Adam's decay rates; the second one is short since steps are few (by hand)
    betas: tuple[float, float] = (0.9, 0.99)
    #: steps for each step size in the search, and draws that it is judged by (by hand)
    search_steps: int = 60
    search_draws: int = 1024
    #: nats by which a smaller step size has to win (by hand)
    search_min_gain: float = 1.0
    #: steps in which the step size rises at first (by hand)
    warm_up: int = 20
    #: the constant part of a given number of steps (by hand)
    constant_share: float = 0.4
    #: steps whose mean ELBO is compared with that of as many before (by hand)
    window: int = 300
    #: an improvement between windows that is too small to go on for, in nats (by hand)
    min_improvement: float = 0.004
    #: the longest constant phase, with the path gradient and without (by hand)
    max_constant_path: int = 2000
    max_constant_pyro: int = 4000
    #: the same in epochs (by hand)
    max_constant_epochs: int = 20
    #: the decay as a share of the constant phase, with its bounds in steps (by hand)
    decay_share: float = 0.6
    min_decay: int = 400
    max_decay: int = 1500
    #: the shortest decay where steps are noisy by mini-batches (by hand)
    min_noisy_decay: int = 1000
    #: a decay of so many steps where more than so many nats are left (benchmarks/flows.md)
    long_decay: int = 2800
    long_decay_gap: float = 0.2
    #: epochs in a window and in a decay (by hand)
    min_epochs: int = 3
    #: steps for the tails at the end, their draws as a multiple, their relative step size (by hand)
    tail_steps: int = 100
    tail_particles: int = 8
    tail_step_size: float = 0.2
    #: how much more deviating log weights count in them, and where that ends (by hand)
    tail_weight: float = 2.0
    tail_max_deviation: float = 50.0
    #: a k-hat below which they are not taken: 0.5, less the noise of k-hat (by hand)
    tail_good_khat: float = 0.35
    #: steps that the running average of parameters reaches back, at least (by hand)
    averaged_steps: int = 100
    averaged_epochs: int = 2
    #: the same as a share of the noisy steps so far (Shamir and Zhang 2013, by hand)
    averaged_share: float = 1 / 3
    #: a gradient is clipped to so many times the median norm of the last so many (by hand)
    clip_factor: float = 3.0
    clip_window: int = 100
    #: steps whose mean loss says which parameters were the best (by hand)
    best_block: int = 50
    #: steps in a row that are not finite before a fit gives up, and those whose sites are named (by hand)
    max_skips: int = 100
    max_named: int = 20
    #: draws that candidate parameters and the gap to the evidence are judged by (by hand)
    selection_draws: int = 5000
    #: ELBOs within so many nats are as good where a k-hat is smaller (by hand)
    selection_as_good: float = 0.02
    #: k-hat below this is as good as any, above that one weights have no variance (Vehtari et al. 2024)
    selection_good_khat: float = 0.25
    selection_bad_khat: float = 0.5
    #: nats that one unit of k-hat costs, and more of them above the bad one (by hand; its noise is 0.1)
    khat_price: float = 0.04
    khat_price_without_variance: float = 0.2
    #: estimates of an ELBO where single draws have no log weights, without mini-batches (by hand)
    num_estimates: int = 32
    #: steps between two checkpoints (by hand)
    checkpoint_every: int = 100


@dataclass(frozen=True)
class MinibatchConfig:
    """How many mini-batches and draws of them stand for all data."""

    #: batches that candidates are compared on, and those whose mean an initial guide is found in (by hand)
    num_compared: int = 32
    num_for_start: int = 8
    #: draws of a comparison, as a part of those without mini-batches, and at least (by hand)
    draws_divisor: int = 4
    min_draws: int = 8
    max_draws: int = 256
    #: independent estimates of an ELBO where draws cannot be told apart (by hand)
    num_estimates: int = 4
    #: batches and draws of the pass at the end (by hand: time)
    max_batches: int = 500
    num_draws: int = 4000
    num_common_draws: int = 1000


@dataclass(frozen=True)
class EvaluationConfig:
    """The draws behind a verdict, the search for missed modes, and the bounds of trust."""

    #: draws that the verdict rests on (Yao et al. 2018 use as many)
    num_samples: int = 10_000
    #: the same where weights are the noise of mini-batches (by hand)
    num_noisy_samples: int = 500
    #: heavy-tailed draws around the guide and the modes, and the degrees of freedom (by hand)
    num_heavy: int = 4000
    heavy_degrees: float = 3.0
    #: the widening of the Gaussian around the guide, and its part of the mixture (by hand)
    heavy_inflation: float = 1.2
    heavy_guide_share: float = 0.5
    #: the effective share of these draws from which their evidence is used (by hand)
    heavy_min_ess: float = 0.02
    #: modes in the mixture (by hand)
    max_modes: int = 8
    #: mean squared distance a coordinate, in its standard deviations, of two modes that are not the
    #: same (by hand)
    min_mode_distance: float = 1.0
    #: how far outside modes are looked for, in standard deviations of the guide (by hand)
    far: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0)
    #: points screened there, and climbs from the best of them (by hand)
    num_screened: int = 500
    num_climbs: int = 16
    #: the same where the model is run for one draw after the other (by hand)
    num_screened_by_loop: int = 40
    num_climbs_by_loop: int = 4
    #: Newton steps of a climb, and more coordinates than are affordable for it (as for initial guides)
    max_newton_steps: int = 40
    max_hessian_dim: int = 200
    #: a mode has been missed if its share of the draws is less than this part of its mass (by hand)
    min_draws_share: float = 0.1
    #: a missed mode with less of the mass than this is no loss; with more, no trust (by hand)
    max_lost: float = 0.05
    #: the distance of the ELBO from the evidence, and its standard error, in nats (by hand)
    max_gap: float = 0.1
    max_se: float = 0.05
    #: the share of steps that were skipped (by hand)
    max_skipped: float = 0.1
    #: a tail above all other weights by less than this share of their sum moves nothing (by hand)
    small_tail: float = 0.001


@dataclass(frozen=True)
class FitConfig:
    """The settings of a fit, by the stage that they belong to. The defaults are meant for everybody."""

    initialization: InitializationConfig = field(default_factory=InitializationConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    minibatch: MinibatchConfig = field(default_factory=MinibatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
