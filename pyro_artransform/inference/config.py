# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Every number that was tuned for :func:`~pyro_artransform.fit`.

Numbers without a source were found by hand on the posteriors of ``benchmarks/flows.md``. "By loop" is
for models that are run for one draw after the other.
"""

from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

_FEWER = 8  # the divisor of numbers of draws by loop, and of the start by passes


@dataclass(frozen=True)
class InitializationConfig:
    """The draws that a fit begins with, and those that the initial guide is found by."""

    num_draws: int = 400  #: effective draws of each latent, where no other number is asked for
    num_for_start: int = 100  #: the same where they only start the guide, and by loop
    max_trajectories: int = 1000  #: of each chain at most, where no number of draws is asked for
    num_compared: int = 1024  #: draws of the initial Gaussian, and of its comparison with the guide


@dataclass(frozen=True)
class OptimizationConfig:
    """The step size, and when it falls."""

    num_particles: int = 64  #: draws for each step
    step_size: float = 2e-2  #: of Adam
    #: the same where the model has parameters, such as networks: with 2e-2 an autoencoder ended 5 nats an
    #: image lower (tutorials/vae_iaf.ipynb)
    model_step_size: float = 5e-3
    window: int = 200  #: steps whose mean ELBO is compared with that of the same number before
    min_improvement: float = 0.01  #: nats between windows below which a fit does not go on
    #: the gap in nats at which the decay starts: what a mean that is off by 0.1 sd costs
    good_gap: float = 0.005
    num_compared: int = 1000  #: draws of an estimate of the gap, at each quarter of a window
    max_constant: int = 3000  #: the longest constant phase
    checkpoint_every: int = 100  #: steps between two checkpoints

    def for_latents(self, latent_dim: int) -> "OptimizationConfig":
        """The same with nats in proportion to the number of latents, from a hundred of them on."""
        nats = {name: getattr(self, name) for name in ("min_improvement", "good_gap")}
        share = max(latent_dim / 100, 1)
        return replace(self, **{name: share * value for name, value in nats.items()})


@dataclass(frozen=True)
class MinibatchConfig:
    """How many mini-batches and draws of them stand for all data."""

    num_compared: int = 32  #: batches that guides are compared on
    num_for_start: int = 8  #: batches whose mean an initial guide is found in
    max_batches: int = 500  #: batches of the pass at the end: time
    num_draws: int = 4000  #: its draws
    #: its draws where all batches have the same, and those of a verdict on all data
    num_common_draws: int = 400
    #: draws of what the elements of all batches share, of a pass that weighs them
    num_shared: int = 250
    min_inner: int = 4  #: the fewest draws of each element given each of these


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
            initialization=_with_fewer(self.initialization, "max_trajectories", "num_compared"),
            optimization=_with_fewer(self.optimization, "num_particles", "num_compared"),
            evaluation=_with_fewer(verdict, "num_samples"),
        )

    def for_passes(self) -> "FitConfig":
        """The same where an evaluation of the density is a pass over a loader: with fewer draws."""
        few = self.minibatch.num_common_draws
        verdict = replace(self.evaluation, num_samples=few, num_more_samples=0)
        return replace(
            self,
            initialization=_with_fewer(self.initialization, "max_trajectories", "num_compared"),
            optimization=replace(
                self.optimization, num_compared=min(few, self.optimization.num_compared)
            ),
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
