# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Every tuning constant of :func:`~pyro_artransform.fit`.

Values without a source were tuned by hand on the posteriors of ``benchmarks/flows.md``. "By loop" refers
to models that run for one draw at a time.
"""

from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

_FEWER = 8  # divides counts for models by loop, and for initialization by passes over a loader


@dataclass(frozen=True)
class InitializationConfig:
    """The draws at the beginning of a fit, and those that determine the initial guide."""

    num_draws: int = 400  #: effective draws of each latent, unless the user requests a number
    num_for_start: int = 100  #: effective draws if they only initialize the guide, or by loop
    max_trajectories: int = 1000  #: limit per chain, unless the user requests a number of draws
    num_compared: int = 1024  #: draws to find the initial Gaussian and compare it with the guide


@dataclass(frozen=True)
class OptimizationConfig:
    """The step size and its schedule."""

    num_particles: int = 64  #: draws per step
    step_size: float = 2e-2  #: step size of Adam
    #: step size of Adam if the model has parameters, such as networks: with 2e-2 an autoencoder ended 5
    #: nats per image lower (tutorials/vae_iaf.ipynb)
    model_step_size: float = 5e-3
    window: int = 200  #: steps whose mean ELBO is compared with that of the preceding window
    min_improvement: float = 0.01  #: improvement in nats between windows below which training stops
    #: the gap in nats at which the decay starts: the cost of a mean that is off by 0.1 sd
    good_gap: float = 0.005
    num_compared: int = 1000  #: draws for an estimate of the gap, every quarter of a window
    max_constant: int = 3000  #: the longest phase of constant step size
    checkpoint_every: int = 100  #: steps between two checkpoints

    def for_latents(self, latent_dim: int) -> "OptimizationConfig":
        """Multiplies nats by ``latent_dim / 100`` for more than a hundred latents."""
        nats = {name: getattr(self, name) for name in ("min_improvement", "good_gap")}
        share = max(latent_dim / 100, 1)
        return replace(self, **{name: share * value for name, value in nats.items()})


@dataclass(frozen=True)
class MinibatchConfig:
    """How many mini-batches and draws represent all data."""

    num_compared: int = 32  #: batches on which guides are compared
    num_for_start: int = 8  #: batches whose mean log density determines the initial guide
    max_batches: int = 500  #: batches of the final pass, limited for time
    num_draws: int = 4000  #: draws of the final pass
    #: draws of the final pass if all batches use the same ones, and of a verdict on all data
    num_common_draws: int = 400
    #: draws of the latents that all elements share, in the pass that computes their weights
    num_shared: int = 250
    min_inner: int = 4  #: the fewest draws of each element per draw of the shared latents


@dataclass(frozen=True)
class EvaluationConfig:
    """The draws behind a verdict.

    The thresholds of trust are not settings; they are in ``diagnostics/importance.py``.
    """

    num_samples: int = 10_000  #: draws behind the verdict (as in Yao et al. 2018)
    #: additional draws, at most as many as the gradients of the fit, if only k-hat is in doubt: its
    #: standard error falls from 0.09 to 0.05 for an index of 0.65
    num_more_samples: int = 90_000
    num_noisy_samples: int = 500  #: draws behind a verdict on weights with mini-batch noise


@dataclass(frozen=True)
class FitConfig:
    """The settings of a fit, by stage."""

    initialization: InitializationConfig = field(default_factory=InitializationConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    minibatch: MinibatchConfig = field(default_factory=MinibatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def for_strategy(self, strategy: str) -> "FitConfig":
        """The settings for an evaluation strategy: fewer draws by "loop", one draw at a time."""
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
        """The settings with fewer draws, for a density whose evaluation is a pass over a loader."""
        few = self.minibatch.num_common_draws
        num_compared = min(few, self.optimization.num_compared)
        return replace(
            self,
            initialization=_with_fewer(self.initialization, "max_trajectories", "num_compared"),
            optimization=replace(self.optimization, num_compared=num_compared),
            evaluation=replace(self.evaluation, num_samples=few, num_more_samples=0),
        )

    def __new__(cls, *args: object, **kwargs: object) -> "FitConfig":
        groups = [group.name for group in fields(cls)]
        for name in kwargs.keys() - {*groups}:
            raise TypeError(
                f"FitConfig: expected {', '.join(groups)}, got {name!r}. {_place_of(name)}"
            )
        return super().__new__(cls)


def _with_fewer(group: Any, *names: str) -> Any:
    """A group of settings with the named counts divided by ``_FEWER``."""
    return replace(group, **{name: getattr(group, name) // _FEWER for name in names})


def _place_of(name: str) -> str:
    """A hint at the group that has a setting which FitConfig itself lacks."""
    groups: Any = fields(FitConfig)
    by_name = {number.name: group for group in groups for number in fields(group.default_factory)}
    near = get_close_matches(name, by_name, 1)
    if not near:
        return "Its groups have the numbers"
    group = by_name[near[0]]
    place = f"{group.name}={group.default_factory.__name__}({near[0]}=...)"
    is_option = " or fit(num_particles=...)" if near[0] == "num_particles" else ""
    return f"Did you mean FitConfig({place}){is_option}?"
