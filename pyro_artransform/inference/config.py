# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Every number that was tuned for :func:`~pyro_artransform.fit`.

Numbers without a source were found by hand on the posteriors of ``benchmarks/flows.md``. "By loop" is
for models that are run for one draw after the other.
"""

from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

_FEWER = 8  # the share of draws by loop, and of the start by passes


@dataclass(frozen=True)
class InitializationConfig:
    """The draws that a fit begins with, and those that the initial guide is found by."""

    num_draws: int = 400  #: effective draws of each latent, where no other number is asked for
    num_for_start: int = 100  #: the same where they only start the guide, and by loop
    max_trajectories: int = 1000  #: of each chain at most, where no number of draws is asked for
    num_gradients: int = 1000  #: draws whose gradients make the initial Gaussian
    num_compared: int = 1024  #: draws that it is compared with the guide on

    def with_fewer(self) -> "InitializationConfig":
        """The same with fewer draws, where an evaluation is expensive."""
        return _with_fewer(self, "max_trajectories", "num_gradients", "num_compared")


@dataclass(frozen=True)
class OptimizationConfig:
    """The step size, its schedule, the gradient, and the draws that parameters are compared by."""

    num_particles: int = 64  #: draws for each step
    many_latents: int = 200  #: the number of latents from which on draws are expensive
    num_particles_of_many: int = 16  #: the same of many, with a graph: half the time, same ELBO
    step_size: float = 2e-2  #: of Adam
    #: the same where the model has parameters, such as networks: with 2e-2 an autoencoder ended 5 nats an
    #: image lower (tutorials/vae_iaf.ipynb)
    model_step_size: float = 5e-3
    window: int = 300  #: steps whose mean ELBO is compared with that of the same number before
    min_improvement: float = 0.004  #: nats between windows below which a fit does not go on
    #: nats at which the step size falls: one mean that is 0.06 sd off costs so much
    good_gap: float = 0.002
    check_every: int = 50  #: steps between two estimates of the remaining gap
    num_compared: int = 1000  #: draws of such an estimate, and of the comparison at the end
    max_constant: int = 3000  #: the longest constant phase
    decay_share: float = 0.6  #: the decay as a share of the constant phase
    #: what the average of parameters reaches back as a share of all steps (Shamir and Zhang 2013)
    averaged_share: float = 1 / 3
    clip_factor: float = 3.0  #: gradients are clipped to this multiple of the median norm
    #: the factor of the step size where the median loss of the last steps exceeds all of the first ones'
    #: (a Gaussian autoencoder, tutorials/vae_iaf.ipynb)
    retreat: float = 0.25
    num_estimates: int = 32  #: of an ELBO where draws have no log weights
    checkpoint_every: int = 100  #: steps between two checkpoints

    def for_latents(self, latent_dim: int) -> "OptimizationConfig":
        """The same with nats in proportion to the number of latents, from a hundred of them on."""
        nats = {name: getattr(self, name) for name in ("min_improvement", "good_gap")}
        share = max(latent_dim / 100, 1)
        return replace(self, **{name: share * value for name, value in nats.items()})


@dataclass(frozen=True)
class MinibatchConfig:
    """How many mini-batches and draws of them stand for all data."""

    num_compared: int = 32  #: batches that candidates are compared on
    num_for_start: int = 8  #: batches whose mean an initial guide is found in
    min_draws: int = 8  #: the fewest draws a batch
    num_estimates: int = 4  #: independent ones of an ELBO where draws cannot be told apart
    max_batches: int = 500  #: batches of the pass at the end: time
    num_draws: int = 4000  #: its draws
    #: its draws where all batches have the same, and those of a verdict on all data
    num_common_draws: int = 400
    #: draws of what the elements of all batches share, of a pass that weighs them
    num_shared: int = 250
    #: draws of each element given each of these, between them as many as a fit took gradients
    min_inner: int = 4
    max_inner: int = 16


@dataclass(frozen=True)
class EvaluationConfig:
    """The draws behind a verdict.

    The bounds of trust are not settings: ``diagnostics/importance.py`` has them.
    """

    num_samples: int = 10_000  #: draws that the verdict rests on (as in Yao et al. 2018)
    #: more draws, at most as many as gradients of the fit, where k-hat alone decides and is not clearly
    #: below its limit: its standard error goes from 0.09 to 0.05 (benchmarks/khat.md)
    num_more_samples: int = 90_000
    num_noisy_samples: int = 500  #: the same where weights are the noise of mini-batches


@dataclass(frozen=True)
class FitConfig:
    """The settings of a fit, by the stage that they belong to."""

    initialization: InitializationConfig = field(default_factory=InitializationConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    minibatch: MinibatchConfig = field(default_factory=MinibatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def for_strategy(self, strategy: str) -> "FitConfig":
        """The same for how a model is run: by "loop", one draw after the other, with fewer draws."""
        if strategy != "loop":
            return self
        verdict = replace(self.evaluation, num_more_samples=0)
        return replace(
            self,
            initialization=self.initialization.with_fewer(),
            optimization=_with_fewer(self.optimization, "num_particles", "num_compared"),
            evaluation=_with_fewer(verdict, "num_samples"),
        )

    def for_passes(self) -> "FitConfig":
        """The same where an evaluation of the density is a pass over a loader: with fewer draws."""
        few = self.minibatch.num_common_draws
        verdict = replace(self.evaluation, num_samples=few, num_more_samples=0)
        return replace(
            self,
            initialization=self.initialization.with_fewer(),
            optimization=replace(self.optimization, num_compared=few),
            evaluation=verdict,
        )

    def __new__(cls, *args: object, **kwargs: object) -> "FitConfig":
        groups = [group.name for group in fields(cls)]
        for name in kwargs.keys() - {*groups}:
            raise TypeError(
                f"FitConfig: expected {', '.join(groups)}, got {name!r}. {_place_of(name)}"
            )
        return super().__new__(cls)


def _with_fewer(group: Any, *names: str) -> Any:
    """A group of settings with a share of these numbers."""
    return replace(group, **{name: getattr(group, name) // _FEWER for name in names})


def _place_of(name: str) -> str:
    """Where a number that FitConfig itself does not have is set."""
    groups: Any = fields(FitConfig)
    by_name = {number.name: group for group in groups for number in fields(group.default_factory)}
    near = get_close_matches(name, by_name, 1)
    if not near:
        return "Its groups have the numbers"
    group = by_name[near[0]]
    place = f"{group.name}={group.default_factory.__name__}({near[0]}=...)"
    is_option = " or fit(num_particles=...)" if near[0] == "num_particles" else ""
    return f"Did you mean FitConfig({place}){is_option}?"
