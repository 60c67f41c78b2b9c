# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits a guide to a model, and says how good the posterior is."""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor, nn

from ..diagnostics import Importance
from ..diagnostics.counts import check_counts
from ..diagnostics.weights import weighted_draws
from ..joint import LogJoint
from ..joint.runs import hidden_sites
from . import checkpoint as files
from .crosscheck import second_opinion
from .ending import keep_the_best
from .gaussians import Gaussians
from .interrupts import Interrupts
from .newton import Modes
from .objectives import Objective, PathObjective, PyroObjective, offers_protocol
from .optimisers import Adam, users_optimiser
from .options import check_names, keyword_only
from .pilots import STEP_SIZES, choose_step_size
from .progress import ProgressBar
from .result import FitResult
from .schedule import Schedule
from .start import Start, find_start
from .training import Training
from .verdict import Facts, judge

_NUM_SAMPLES = 10_000
_NUM_NOISY_SAMPLES = 500
_MAX_CONSTANT = {True: 2000, False: 4000}
_CHECKPOINT_EVERY = 100


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_steps: int | None = None,
    num_particles: int = 64,
    seed: int | None = None,
    progress: bool = True,
    callback: Callable[[int, float], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    optim: Any = None,
    **kwargs: Any,
) -> FitResult:
    """Trains a guide of a model, with nothing to tune, and returns a verdict on the posterior.

    A guide of this package starts at the best of many candidates, judged by their ELBO on common
    noise: as it stands, Gaussians on the way to the modes of the posterior, mean-field fits from
    several points. It is trained by the path gradient. Any other Pyro guide is trained from where it
    is by Pyro's own ELBO. The step size goes down when the ELBO stops moving, and the guide ends with
    the best of the last, the averaged and the best parameters. Parameters of the model are trained
    together with the guide's.

    The verdict rests on draws that were not trained on: k-hat, the ELBO and its standard error, the
    evidence that heavy-tailed draws find around the guide, and the modes that other starts have found.

    Ctrl-C ends the steps, and the verdict is on what was learned until then; a second one interrupts.

    :param model: a Pyro model.
    :param guide: any Pyro guide of it. One that has the methods ``start_at(loc, scale_tril=None)``
        and ``rsample_and_log_prob(n, path=False)``, as those of this package have, is started and
        trained through them.
    :param args: the arguments of model and guide.
    :param num_steps: the number of steps; by default the fit finds out itself.
    :param num_particles: draws for each step, evaluated at once where the model allows.
    :param seed: makes the fit repeatable, and leaves the state of the generators as it was.
    :param progress: whether to show a progress bar, where ``tqdm`` is installed.
    :param callback: called after each step with its number and its ELBO; the fit ends where it
        returns ``True``.
    :param checkpoint: a file to save the fit to as it goes.
    :param resume: a file of an earlier fit of the same model and guide, which then goes on to the
        same steps as if it had not been interrupted.
    :param optim: an optimiser or scheduler of ``pyro.optim``, or a function of a list of parameters
        that returns one of ``torch.optim``; its step size is then its own. By default Adam.
    :param kwargs: the keyword arguments of model and guide.
    :raises ValueError: if the model has a parameter of the name of one of these options, if there is
        no start with a finite density, if an option is out of its range, or if a checkpoint is of
        another fit.
    :raises FitError: if the loss is not finite for many steps in a row.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform import AutoIAF, fit
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> guide = AutoIAF(model)
        >>> result = fit(model, guide, torch.ones(3), num_steps=50, progress=False)
        >>> result.num_steps, guide.sample_posterior(4)["loc"].shape
        (50, torch.Size([4]))

    **References**

    1. Automatic Variational Inference in Stan (Kucukelbir, Ranganath, Gelman, Blei, 2015),
       https://arxiv.org/abs/1506.03431
    2. Advances in Black-Box VI: Normalizing Flows, Importance Weighting, and Optimization (Agrawal,
       Sheldon, Domke, 2020), https://arxiv.org/abs/2006.10343
    3. Yes, but Did It Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson, Gelman, 2018),
       https://arxiv.org/abs/1802.02538
    """
    check_names(model, _OPTIONS)
    check_counts(num_particles=num_particles)
    if num_steps is not None:
        check_counts(num_steps=num_steps)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a function, got {type(callback).__name__}")
    with _seeded(seed), ProgressBar(progress) as bar, Interrupts() as interrupts:
        run = _Fit(model, guide, args, kwargs)
        run.warn_if_slow()
        training = run.begin(num_steps, num_particles, optim, resume, bar)
        is_over = run.go_on(training, callback, checkpoint, bar, interrupts)
        bar.say("verdict")
        return run.conclude(training, is_over)


class _Fit:
    """The parts of a fit, in their order."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._began = time.perf_counter()
        self._model, self._guide = model, guide
        self._args, self._kwargs = args, kwargs
        self._start = Start("the guide as it stood", float("nan"), None)
        self._step_size: float | None = None
        self._num_steps: int | None = None
        self._num_pilot_steps = 0
        self._seconds_before = 0.0
        _set_up(guide, args, kwargs)
        self._log_joint = LogJoint(model, args, kwargs)
        self._by_protocol = offers_protocol(guide) and self._fits()
        self._objective: Objective = (
            PathObjective(self._log_joint, guide)
            if self._by_protocol
            else PyroObjective(model, guide, (args, kwargs), self._log_joint)
        )
        # a guide that lacks a latent is an error now, and not after the last step
        next(weighted_draws(model, guide, 1, args, kwargs, self._log_joint))

    @property
    def _one_at_a_time(self) -> str:
        """Why draws are evaluated one after the other; empty where they are not."""
        if isinstance(self._objective, PyroObjective) and not self._objective.is_vectorized:
            return self._log_joint.reason or "model and guide do not run in a plate of particles"
        return self._log_joint.reason if self._by_protocol else ""

    def warn_if_slow(self) -> None:
        """Tells the user where a step takes as many runs of the model as there are particles."""
        if self._one_at_a_time:
            warnings.warn(
                "the model cannot be evaluated at many draws at once, so that it is run for one draw "
                f"after the other, which is slow ({self._one_at_a_time}). Write it without branches "
                "on values of its latents, and index from the right, or take fewer num_particles",
                stacklevel=3,
            )

    def _fits(self) -> bool:
        """Whether the guide's latents are all latents of the model."""
        with torch.no_grad():
            latent, _ = self._guide.rsample_and_log_prob(1)
        return latent.shape[-1] == self._log_joint.latent_dim

    # Start

    def begin(
        self,
        num_steps: int | None,
        num_particles: int,
        optim: Any,
        resume: Any,
        bar: ProgressBar,
    ) -> Training:
        """A training at its start, or where a checkpoint has left it."""
        self._num_steps = num_steps

        def new_training(step_size: float) -> Training:
            parameters = self._objective.parameters()
            if not parameters:
                raise ValueError(
                    "there is nothing to train: neither guide nor model has parameters"
                )
            made = (
                Adam(parameters, step_size, self._objective.step_units)
                if optim is None
                else users_optimiser(optim, list(parameters.values()))
            )
            schedule = Schedule(num_steps, _MAX_CONSTANT[self._by_protocol], self._by_protocol)
            return Training(self._objective, parameters, made, schedule, num_particles)

        if resume is not None:
            state = files.read(resume)
            _check_same(state, num_steps=num_steps, num_particles=num_particles)
            if (state["step_size"] is None) != (optim is not None):
                raise ValueError("resume: expected the optim that the checkpoint was made with")
            return self._restored(state, new_training)
        if self._by_protocol:
            bar.say("start")
            run = self._run_model
            self._start = find_start(self._log_joint, run, self._guide)
        if optim is None:
            bar.say("step size")
            self._step_size, self._num_pilot_steps = choose_step_size(new_training)
        return new_training(self._step_size or STEP_SIZES[0])

    def _run_model(self) -> Any:
        return self._model(*self._args, **self._kwargs)

    def _restored(
        self, state: dict[str, Any], new_training: Callable[[float], Training]
    ) -> Training:
        if state["guide"] is not None:
            _load(self._guide, state["guide"])
        self._num_steps = state["num_steps"]
        self._step_size = state["step_size"]
        self._num_pilot_steps = state["num_pilot_steps"]
        self._seconds_before = state["seconds"]
        self._start = Start(state["start"], state["start_elbo"], _unpacked(state["modes"]))
        training = new_training(self._step_size or STEP_SIZES[0])
        training.restore(state["training"])
        files.set_random_state(state["random"])
        return training

    # Steps

    def go_on(
        self,
        training: Training,
        callback: Callable[[int, float], Any] | None,
        checkpoint: Any,
        bar: ProgressBar,
        interrupts: Interrupts,
    ) -> bool:
        """Takes steps until the training is over, and says whether it is."""
        bar.say("fit")
        is_asked_to_end = False
        while not (training.is_over() or interrupts.requested or is_asked_to_end):
            loss = training.step()
            bar.update(training.losses, training.schedule.end)
            if checkpoint is not None and training.num_steps % _CHECKPOINT_EVERY == 0:
                self._save(checkpoint, training)
            if callback is not None:
                is_asked_to_end = callback(training.num_steps, -loss) is True
        if checkpoint is not None:
            self._save(checkpoint, training)
        if is_asked_to_end:
            training.schedule.reason = "the callback asked to stop"
        elif not training.is_over():
            training.schedule.reason = "it was interrupted"
        return training.is_over() or is_asked_to_end

    def _save(self, path: Any, training: Training) -> None:
        is_module = isinstance(self._guide, nn.Module)
        state = {
            "guide": self._guide.state_dict() if is_module else None,
            "num_steps": self._num_steps,
            "num_particles": training.num_particles,
            "step_size": self._step_size,
            "num_pilot_steps": self._num_pilot_steps,
            "seconds": self._seconds(),
            "start": self._start.name,
            "start_elbo": self._start.elbo,
            "modes": _packed(self._start.modes),
            "training": training.state(),
            "random": files.random_state(),
        }
        files.write(path, state)

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began

    # End

    def conclude(self, training: Training, is_over: bool) -> FitResult:
        """The result, with the guide at the best parameters."""
        end = keep_the_best(training)
        draws, found = self._weigh()
        facts = Facts(
            skipped_share=training.num_skipped / max(training.num_steps, 1),
            is_over=is_over,
            is_point=draws is not None and bool((draws == draws[:1]).all(0).any()),
            is_subsampled=self._log_joint.is_subsampled,
        )
        second = None
        if draws is not None and not (facts.is_point or facts.is_subsampled):
            second = second_opinion(self._log_joint, draws, found.log_evidence, self._start.modes)
        verdict = judge(found, second, facts)
        return FitResult(
            elbo=found.elbo,
            elbo_se=found.elbo_se,
            log_evidence=found.log_evidence,
            log_evidence_se=found.log_evidence_se,
            khat=found.khat,
            khat_se=found.khat_se,
            ess=found.ess,
            num_samples=found.num_samples,
            trusted=verdict.trusted,
            verdict=verdict.words,
            history=[-loss for loss in training.losses],
            num_steps=training.num_steps,
            num_skipped=training.num_skipped,
            num_gradients=training.num_gradients + self._num_pilot_steps * training.num_particles,
            seconds=self._seconds(),
            stopped_because=training.schedule.reason,
            start=self._start.name,
            end=end,
            step_size=self._step_size,
            culprits=dict(training.culprits),
            one_at_a_time=self._one_at_a_time,
            importance=None if facts.is_subsampled else found,
        )

    def _weigh(self) -> tuple[Tensor | None, Importance]:
        """Draws of the guide on the unconstrained space, where it has them, and their weights."""
        # the weights of minibatches are noise, and draws for them come one at a time
        count = _NUM_NOISY_SAMPLES if self._log_joint.is_subsampled else _NUM_SAMPLES
        draws = weighted_draws(
            self._model, self._guide, count, self._args, self._kwargs, self._log_joint
        )
        chunks = list(draws)
        found = Importance.from_log_weights(torch.cat([chunk.log_weights for chunk in chunks]))
        latents = [chunk.latent for chunk in chunks if chunk.latent is not None]
        return (torch.cat(latents) if latents else None), found


def _packed(modes: Modes | None) -> list[Tensor] | None:
    return None if modes is None else [*modes.gaussians, modes.value, modes.converged]


def _unpacked(tensors: list[Tensor] | None) -> Modes | None:
    if tensors is None:
        return None
    loc, scale_tril, value, converged = tensors
    return Modes(Gaussians(loc, scale_tril), value, converged)


def _check_same(state: dict[str, Any], **options: Any) -> None:
    """Checks that a fit goes on with the options of its checkpoint."""
    for name, value in options.items():
        if value != state[name] and value is not None:
            raise ValueError(f"resume: expected {name}={state[name]!r}, as before, got {value!r}")


def _load(guide: Any, state: Any) -> None:
    try:
        guide.load_state_dict(state)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"resume: expected a checkpoint of this guide, got: {error}") from error


def _set_up(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Lets a guide learn the latents of its model, and enter its parameters into Pyro's store."""
    with torch.no_grad(), hidden_sites():
        guide(*args, **kwargs)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    state = get_rng_state()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)


_OPTIONS = keyword_only(fit)
