# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Saves a running fit to a file between two steps, and resumes it."""

from functools import partial
from typing import Any

import torch
from torch import nn

from .._base import files
from .._base.arguments import warn_user
from ..model.protocols import GuideOfModes
from .optimization.training import Training
from .problem import Problem

_KIND = "a checkpoint of fit, format 11"


def save(problem: Problem, training: Training, path: files.FilePath) -> bool:
    """Saves all that a fit needs to resume; if writing fails, warns and returns ``False``."""
    guide, stream = problem.subject.guide, problem.stream
    of_modes: object = guide
    state = {
        "num_modes": len(of_modes.components) if isinstance(of_modes, GuideOfModes) else 1,
        "guide": guide.state_dict() if isinstance(guide, nn.Module) else None,
        "options": _options(problem),
        "seconds": training.earlier_seconds + problem.limit.seconds,
        "training": training.state(),
        "batches": stream and [stream.num_batches, stream.next_epoch],
        "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    }
    try:
        files.write(path, _KIND, state)
        return True
    except (OSError, RuntimeError) as error:  # torch reports a full disk by either
        warn_user(
            f"checkpoint: {path} could not be written, so the fit continues without it; an earlier file is "
            f"unchanged ({error}). Is the disk full?",
            UserWarning,
        )
        return False


def _options(problem: Problem) -> dict[str, Any]:
    """The options that must be the same in a resumed fit."""
    return {
        "num_steps": problem.schedule.num_steps,
        "num_particles": problem.num_particles,
        "loader": "none" if problem.stream is None else "one",
    }


def resume(problem: Problem, path: files.FilePath) -> Training:
    """Resumes a fit from a checkpoint; with a loader, from the next epoch."""
    state = problem.parallel.first("the checkpoint", partial(files.read, path, _KIND))
    for name, got in _options(problem).items():
        expected = state["options"][name]
        if got not in (expected, None):
            raise ValueError(f"resume: expected {name}={expected}, as before, got {got}")
    problem.choose_for_modes(state.get("num_modes", 1))
    if state["guide"] is not None:
        guide: Any = problem.subject.guide
        try:
            guide.load_state_dict(state["guide"])
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"resume: expected a checkpoint of this guide: {error}") from error
    training = problem.new_training(problem.schedule.of_length(state["options"]["num_steps"]))
    training.restore(state["training"])
    training.earlier_seconds = state["seconds"]
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    problem.parallel.seed_apart()
    if problem.stream is not None:
        problem.stream.go_on(*state["batches"])
    return training
